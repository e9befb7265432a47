"""Pieces of the towers at sizes of published ones: against PyTorch's own, and with any number of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experts.numerics import computing_threads
from router.media.tower_parts import LayerNorm, attend, gelu, gelu_tanh

DTYPES = [torch.float32, torch.bfloat16]


def _rows(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).mul_(3).to(dtype)


def _same_with_any_threads(compute: Callable[[], Tensor]) -> None:
    with computing_threads(1):
        alone = compute()
    for num_threads in (2, 3, 8):
        with computing_threads(num_threads):
            assert torch.equal(compute(), alone), f"{num_threads} threads"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width", "rows"), [(16, 72, 1200), (16, 72, 333), (20, 64, 104)])
def test_attention(heads: int, width: int, rows: int, dtype: torch.dtype) -> None:
    qkv = _rows(rows, 3, heads, width, dtype=dtype).permute(1, 2, 0, 3)
    _same_with_any_threads(lambda: attend(*qkv))
    q, k, v = qkv.double()
    plain = (q @ k.transpose(1, 2) * width**-0.5).softmax(-1) @ v
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (attend(*qkv).double() - plain.transpose(0, 1).flatten(1)).abs().max() < tolerance * v.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ours", "approximate"), [(gelu, "none"), (gelu_tanh, "tanh")])
def test_activations(ours: Callable[[Tensor], Tensor], approximate: str, dtype: torch.dtype) -> None:
    x = _rows(1001, 4303, dtype=dtype)
    _same_with_any_threads(lambda: ours(x))
    theirs = F.gelu(x, approximate=approximate)
    assert ours(x).dtype == dtype
    torch.testing.assert_close(ours(x), theirs, rtol=0, atol=2e-6 if dtype == torch.float32 else 0.05)
    extremes = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4], dtype=dtype)
    torch.testing.assert_close(ours(extremes), F.gelu(extremes, approximate=approximate))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype: torch.dtype) -> None:
    norm = LayerNorm(_rows(1152, dtype=dtype), _rows(1152, dtype=dtype), 1e-6)
    x = _rows(1200, 1152, dtype=dtype)
    _same_with_any_threads(lambda: norm(x))
    assert torch.equal(norm(x)[700:701], norm(x[700:701]))
