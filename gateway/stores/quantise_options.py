"""`--quantize`, `--quantize-backbone`, `--quantize-head` and `--group-size`, as `extract` and `plan` share them."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from extraction.quantise import Quantization
    from extraction.quantised_parts import QuantisedParts


class QuantizeScheme(StrEnum):
    """What parts of a store can be quantised to."""

    INT8 = "int8"
    INT4 = "int4"


QuantizeOption = Annotated[
    Optional[QuantizeScheme],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option(help="Experts as 8-bit or 4-bit codes: smaller, and another model."),
]
BackboneOption = Annotated[
    Optional[QuantizeScheme],  # noqa: UP045
    typer.Option(help="The same of attention projections, dense layers and shared experts."),
]
HeadOption = Annotated[
    Optional[QuantizeScheme],  # noqa: UP045
    typer.Option(help="The same of the head; the embedding stays as it is."),
]
GroupSizeOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(metavar="32|64|128", help="With int4: inputs that share a scale; default: 32."),
]


def read_quantised(
    experts: QuantizeScheme | None,
    backbone: QuantizeScheme | None,
    head: QuantizeScheme | None,
    group_size: int | None,
) -> QuantisedParts:
    """group_size: of all parts that are int4. Raises BadParameter where it goes with none."""
    from extraction.quantise import GROUP_SIZES
    from extraction.quantised_parts import QuantisedParts

    has_groups = QuantizeScheme.INT4 in (experts, backbone, head)
    if group_size is not None and (not has_groups or group_size not in GROUP_SIZES):
        raise typer.BadParameter(
            "--group-size is 32, 64 or 128, and goes with --quantize, --quantize-backbone or --quantize-head int4"
        )
    return QuantisedParts(*(_quantization(scheme, group_size) for scheme in (experts, backbone, head)))


def option_words(parts: QuantisedParts) -> list[str]:
    """What to type for them: the inverse of `read_quantised`."""
    named = {
        "--quantize": parts.experts,
        "--quantize-backbone": parts.backbone,
        "--quantize-head": parts.head,
    }
    words = [word for option, part in named.items() if part is not None for word in (option, part.scheme)]
    sizes = {part.group_size for part in named.values() if part is not None and part.group_size is not None}
    assert len(sizes) <= 1, sizes
    return words + [word for size in sizes for word in ("--group-size", str(size))]


def _quantization(scheme: QuantizeScheme | None, group_size: int | None) -> Quantization | None:
    from extraction.quantise import DEFAULT_GROUP_SIZE, Quantization

    if scheme is None:
        return None
    size = (group_size or DEFAULT_GROUP_SIZE) if scheme is QuantizeScheme.INT4 else None
    return Quantization.model_validate({"scheme": scheme.value, "group_size": size})
