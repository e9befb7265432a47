"""Family tables: which components a checkpoint of a family has, and how their tensors are published.

One entry a family. Pure; called by `extraction.plan`. The first component is the decoder that a store serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from extraction.backbone_shapes import backbone_shapes
from extraction.component_layout import (
    QWEN_ROLES,
    BackboneTensor,
    ComponentLayout,
    ExpertTensor,
    Placement,
)
from extraction.decoder_config import read_decoder
from extraction.errors import FamilyUnknown, TensorUnexpected
from extraction.manifest import ExpertKey
from extraction.omni_layout import omni_components


@dataclass(frozen=True)
class TextFamily:
    """How a family with one decoder publishes its names; sizes and switches are in `decoder_config.TRAITS`."""

    renames: tuple[tuple[str, str], ...] = ()
    role_of: Mapping[str, str] = field(default_factory=lambda: QWEN_ROLES)


OMNI = "qwen3_omni_moe"
TEXT_FAMILIES: Mapping[str, TextFamily] = {
    "qwen3_moe": TextFamily(),
    "qwen2_moe": TextFamily(),
    "olmoe": TextFamily(),
    "mixtral": TextFamily(
        renames=((".block_sparse_moe.", ".mlp."),),
        role_of={"w1": "gate", "w3": "up", "w2": "down"},
    ),
}


@dataclass(frozen=True)
class Layout:
    """What a checkpoint of one family and configuration must hold."""

    family: str
    components: tuple[ComponentLayout, ...]

    @property
    def experts(self) -> frozenset[ExpertKey]:
        return frozenset(key for component in self.components for key in component.experts)

    def place(self, name: str, shape: tuple[int, ...]) -> tuple[Placement, ...]:
        """What the tensor is, slice by slice. Raises TensorUnexpected for what the configuration does not imply."""
        owner = self._owner(name)
        if owner is None:
            raise TensorUnexpected(name, f"is not known in family {self.family}")
        component, rest = owner
        return component.place(name, rest, shape)

    def is_ignored(self, name: str) -> bool:
        """Tensors that some programs write although the configuration does not use them."""
        owner = self._owner(name)
        return owner is not None and owner[0].is_ignored(owner[1])

    def expected(self) -> set[ExpertTensor | BackboneTensor]:
        """Everything that must be there."""
        return {tensor for component in self.components for tensor in component.expected()}

    def reported_name(self, tensor: ExpertTensor | BackboneTensor) -> str:
        """The name under which a missing tensor is reported."""
        is_one_of_several = len(self.components) > 1
        if isinstance(tensor, ExpertTensor):
            where = f"{tensor.key.component} " if is_one_of_several else ""
            return f"{where}layer {tensor.key.layer} expert {tensor.key.expert} {tensor.role}"
        return f"{tensor.component} {tensor.name}" if is_one_of_several else tensor.name

    def _owner(self, name: str) -> tuple[ComponentLayout, str] | None:
        """The component whose prefix fits best, and the rest of the name."""
        fitting = [
            (len(prefix), component)
            for component in self.components
            for prefix in component.prefixes
            if name.startswith(prefix)
        ]
        if not fitting:
            return None
        length, component = max(fitting, key=lambda entry: entry[0])
        return component, name[length:]


def layout_for(config: Mapping[str, Any]) -> Layout:
    """Raises FamilyUnknown with the known ones, or ConfigInvalid for a damaged configuration."""
    model_type = str(config.get("model_type"))
    if model_type == OMNI:
        return Layout(OMNI, omni_components(config))
    table = TEXT_FAMILIES.get(model_type)
    if table is None:
        raise FamilyUnknown(model_type, tuple(sorted((OMNI, *TEXT_FAMILIES))))
    decoder = read_decoder(config)
    component = ComponentLayout(
        name="model",
        config=config,
        prefixes=("model.", ""),
        decoder=decoder,
        renames=table.renames,
        role_of=table.role_of,
        backbone_shapes=backbone_shapes(decoder),
    )
    return Layout(model_type, (component,))
