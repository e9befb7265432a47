"""A device's attention and norms: what the CPU's give within rounding, and a row's bits by themselves."""

from __future__ import annotations

import pytest
import torch

from experts.devices import CPU
from experts.errors import NotRowInvariant
from router import device_self_test
from router.attention import BLOCK_POSITIONS, attend
from router.device_attention import PAIRS, QUERY_ROWS, attend_in_tiles, multiply_pairs, sum_by_halves
from router.device_norm import norm_on_device
from tests.router.configs import tiny_config

HEAD_DIM = 16


def _inputs(num_sets: int, num_tiles: int, num_blocks: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_sets)
    q = torch.randn(num_sets, num_tiles * QUERY_ROWS, HEAD_DIM, generator=generator)
    shape = (num_sets, num_blocks, BLOCK_POSITIONS, HEAD_DIM)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    limits = torch.randint(1, num_blocks * BLOCK_POSITIONS + 1, q.shape[:2], generator=generator)
    return q, keys, values, limits


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(
    ("num_sets", "num_tiles", "num_blocks"), [(1, 1, 1), (3, 2, 5), (2, 40, 16), (50, 1, 2)]
)
def test_tiles_are_attention_within_rounding(
    num_sets: int, num_tiles: int, num_blocks: int, window: int | None
) -> None:
    q, keys, values, limits = _inputs(num_sets, num_tiles, num_blocks)
    found = attend_in_tiles(q, keys, values, limits, window)
    assert torch.allclose(found, attend(q, keys, values, limits, window), atol=1e-5)


@pytest.mark.parametrize("num_pairs", [1, PAIRS - 1, PAIRS, PAIRS + 1, 3 * PAIRS, 3 * PAIRS + 5])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_every_product_of_pairs_has_one_shape(
    monkeypatch: pytest.MonkeyPatch, num_pairs: int, is_transposed: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(num_pairs, 4, 6, generator=generator)
    b = torch.randn((num_pairs, 5, 6) if is_transposed else (num_pairs, 6, 5), generator=generator)
    multiply, shapes = torch.bmm, set()

    def watched(x: torch.Tensor, y: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        shapes.add((x.shape, y.shape, y.stride()))
        return multiply(x, y, **named)

    monkeypatch.setattr(torch, "bmm", watched)
    found = multiply_pairs(a, b, is_transposed=is_transposed)
    assert torch.allclose(found, multiply(a, b.transpose(1, 2) if is_transposed else b), atol=1e-5)
    assert len(shapes) == 1 and shapes.pop()[0][0] == PAIRS


@pytest.mark.parametrize("width", [1, 2, 3, 16, 52, 63, 64, 2048])
def test_halves_add_up_to_the_sum(width: int) -> None:
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(sum_by_halves(x), x.sum(-1), atol=1e-4)


@pytest.mark.parametrize("kind", ["fused", "halves"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_the_plain_one_within_rounding(kind: device_self_test.Norm, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight = (
        torch.randn(5, 3, 52, generator=generator).to(dtype),
        torch.randn(52, generator=generator).to(dtype),
    )
    wide = x.double()
    plain = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()
    found = norm_on_device(kind, x, weight, 1e-6)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), plain, rtol=1e-5 if dtype == torch.float32 else 2e-2)


def test_self_test_takes_the_other_norm_where_the_library_s_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = device_self_test.norm_on_device

    def spoilt(
        kind: device_self_test.Norm, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        found = norm(kind, x, weight, eps)
        return found * (1 + 1e-6 * (len(x) < 8)) if kind == "fused" else found

    monkeypatch.setattr(device_self_test, "norm_on_device", spoilt)
    assert device_self_test._choose_norm(tiny_config(), torch.float32, CPU) == "halves"


def test_self_test_refuses_attention_that_depends_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = device_self_test.attend_in_tiles

    def spoilt(q: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return attention(q, *rest) * (1 + 1e-6 * (q.shape[1] == QUERY_ROWS))  # type: ignore[arg-type]

    monkeypatch.setattr(device_self_test, "attend_in_tiles", spoilt)
    with pytest.raises(NotRowInvariant, match="attention"):
        device_self_test._prove_attention(HEAD_DIM, None, CPU)
