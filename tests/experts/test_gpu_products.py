"""Our kernel on a GPU, where there is one with Triton: sound for every form of weights, at sizes of published models.

tests/experts/test_triton_products.py and test_triton_compiled.py hold it on machines without one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from experts.device_proof import prove_experts, sound_groupings
from experts.devices import settle_arithmetic
from experts.numerics import RowKernel
from experts.quantised import _is_grouping_proven, choose_product
from experts.triton_products import why_not_there
from extraction.quantise import Quantization
from tests.gpu import GPU, WHY_NOT

DEVICE = torch.device("cuda", 0)
WHY_NO_KERNEL = WHY_NOT or why_not_there(DEVICE, torch.bfloat16)
pytestmark = [
    *GPU,
    pytest.mark.skipif(WHY_NO_KERNEL is not None, reason=f"has no kernel of our own: {WHY_NO_KERNEL}"),
]
SIZES = ((2048, 768), (64, 24))
"""Widths of a model and of its experts: Qwen3-30B-A3B's, and some that nothing divides."""
CODES = (
    Quantization(scheme="int8", group_size=None),
    *(Quantization(scheme="int4", group_size=size) for size in (32, 64, 128)),
)


@pytest.mark.parametrize("sizes", SIZES)
def test_kernel_is_sound_and_chosen(sizes: tuple[int, int]) -> None:
    settle_arithmetic(DEVICE)
    kernel = prove_experts(*sizes, torch.bfloat16, DEVICE)
    assert kernel.grouping == "triton" and "triton" in kernel.name
    assert next(sound_groupings(*sizes, RowKernel(64, "blocks", device=DEVICE), torch.float32)) != "triton"


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("form", CODES, ids=lambda form: form.name)
def test_codes_are_multiplied_as_they_are(form: Quantization, sizes: tuple[int, int]) -> None:
    settle_arithmetic(DEVICE)
    width, inner = sizes
    kernel = replace(prove_experts(width, inner, torch.bfloat16, DEVICE), grouping="triton")
    shapes = [(2 * inner, width), (width, inner)]
    assert choose_product(shapes, form, torch.bfloat16, kernel) == "triton"
    assert _is_grouping_proven(shapes, form, torch.bfloat16, kernel)
