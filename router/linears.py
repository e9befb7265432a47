"""The backbone's matrices as they lie in memory: in a float dtype, or quantised and packed for this machine's kernel.

How they are multiplied is `experts.packed_matrix.linear`'s; which product with codes is used is proven when an engine
is made, for the backbone's linear layers and the head apart, as for experts. Called by `router.loading`,
`router.weights` and `router.footprint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from experts.devices import CPU
from experts.numerics import RowKernel
from experts.packed_matrix import CanonicalMatrix, PackedMatrix, PackedProduct, packed_bytes, stacked
from experts.quantised import choose_product, packed_for, planned_product, product_suffix
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts
from router.model_config import ModelConfig


@dataclass(frozen=True)
class LinearForm:
    """Matrices as codes and scales, and the product that they are made for."""

    quantization: Quantization
    dtype: torch.dtype
    product: PackedProduct

    def packed(self, matrices: Sequence[CanonicalMatrix], kernel: RowKernel) -> PackedMatrix:
        """As one matrix, one below the other."""
        return packed_for(self.product, stacked(matrices), self.dtype, kernel)

    def loaded_bytes(self, shape: tuple[int, int]) -> int:
        """Of a packed matrix, known before it is read."""
        if self.product == "pack":
            return packed_bytes(shape, self.quantization, self.dtype)
        return self.quantization.code_bytes(shape) + self.quantization.scale_bytes(shape)


@dataclass(frozen=True)
class LinearForms:
    """Of the backbone's parts; None where a part is in a float dtype."""

    backbone: LinearForm | None = None
    head: LinearForm | None = None

    @property
    def class_suffix(self) -> str:
        """What they add to the name of the numerics class, behind what the experts add."""
        named = {"backbone": self.backbone, "head": self.head}
        return "".join(
            product_suffix(form.quantization, form.product).replace("/", f"/{part}-", 1)
            for part, form in named.items()
            if form is not None
        )


FLOAT = LinearForms()


def prove_linears(
    quantised: QuantisedParts, config: ModelConfig, kernel: RowKernel, dtype: torch.dtype
) -> LinearForms:
    """The fastest products that keep the promise for this model's shapes. Raises NotRowInvariant."""
    head_shape = (config.vocab_size, config.hidden_size)
    return LinearForms(
        _prove(quantised.backbone, sorted(set(config.backbone_matrices())), kernel, dtype),
        _prove(quantised.head, [head_shape], kernel, dtype),
    )


def planned_linears(quantised: QuantisedParts, dtype: torch.dtype, device: torch.device = CPU) -> LinearForms:
    """What `prove_linears` nearly always finds, for planning only: nothing is proven."""
    return LinearForms(
        *(
            None if part is None else LinearForm(part, dtype, planned_product(dtype, device))
            for part in (quantised.backbone, quantised.head)
        )
    )


def _prove(
    quantization: Quantization | None, shapes: list[tuple[int, int]], kernel: RowKernel, dtype: torch.dtype
) -> LinearForm | None:
    if quantization is None:
        return None
    return LinearForm(quantization, dtype, choose_product(shapes, quantization, dtype, kernel))
