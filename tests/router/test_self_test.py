"""The proof at start: it accepts this machine and refuses kernels whose rows depend on their neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from experts.errors import NotRowInvariant
from experts.ffn import compute_segments
from experts.native_products import TORCH, VARIABLE, chosen_level
from experts.numerics import CANDIDATES, RowKernel, swiglu
from router import self_test
from router.attention import attend
from router.model_config import ModelConfig
from router.native_attention import attend_in_cache
from router.self_test import prove_row_invariance
from tests.router.configs import tiny_config


def _refusal(dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(NotRowInvariant) as refused:
        prove_row_invariance(tiny_config(), dtype)
    return str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [12, 16, 128])
def test_this_machine_passes(dtype: torch.dtype, head_dim: int) -> None:
    kernel = prove_row_invariance(tiny_config(head_dim=head_dim), dtype)
    if chosen_level(dtype) is None:
        assert (kernel.product, kernel.row_multiple) in CANDIDATES[dtype]
    else:
        assert kernel == RowKernel(1, "native", str(chosen_level(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_this_machine_passes_with_every_switch(dtype: torch.dtype) -> None:
    config = tiny_config(
        model_type="qwen2_moe",
        shared_expert_intermediate_size=56,
        use_sliding_window=True,
        sliding_window=100,
        mlp_only_layers=[1],
    )
    kernel = prove_row_invariance(config, dtype)
    if chosen_level(dtype) is None:
        assert (kernel.product, kernel.row_multiple) in CANDIDATES[dtype]
    else:
        assert kernel == RowKernel(1, "native", str(chosen_level(dtype)))


def test_norm_over_the_whole_width_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(model_type="olmoe", num_attention_heads=6)
    mean = torch.Tensor.mean

    def vary(rows: Tensor, *others: Any, **named: Any) -> Tensor:
        return mean(rows, *others, **named) * (1 + 1e-6 * (rows.shape[0] > 9 and rows.shape[1] == 96))

    monkeypatch.setattr(torch.Tensor, "mean", vary)
    with pytest.raises(NotRowInvariant, match="norm of width 96"):
        prove_row_invariance(config, torch.float32)


def test_window_that_varies_with_the_batch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, TORCH)

    def variant(q: Tensor, keys: Tensor, values: Tensor, limits: Tensor, window: int | None) -> Tensor:
        error = 0.0 if window is None else 1e-6 * q.shape[0]
        return attend(q, keys, values, limits, window) * (1 + error)

    monkeypatch.setattr(self_test, "attend", variant)
    prove_row_invariance(tiny_config(), torch.float32)
    with pytest.raises(NotRowInvariant, match="attention with heads of 16"):
        prove_row_invariance(tiny_config(use_sliding_window=True, sliding_window=9), torch.float32)


def _after(kernel: Callable[..., Tensor], changes: Callable[[Tensor], float]) -> Callable[..., Tensor]:
    """The kernel, with an error that depends on the shape of its first argument."""

    def variant(first: Tensor, *others: Any) -> Tensor:
        return kernel(first, *others) * (1 + changes(first))

    return variant


def test_attention_that_varies_with_batch_or_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, TORCH)
    for changes in (lambda q: 1e-6 * q.shape[0], lambda q: 1e-6 * (q.shape[1] <= 8)):
        monkeypatch.setattr(self_test, "attend", _after(attend, changes))
        assert "attention with heads of 16 in float32" in _refusal()


def test_attention_that_varies_with_threads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, TORCH)
    by_threads = _after(attend, lambda q: 1e-6 * (torch.get_num_threads() == 1))
    monkeypatch.setattr(self_test, "attend", by_threads)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert "attention with heads of 16 in float32" in _refusal()
    finally:
        torch.set_num_threads(before)


def test_attention_that_varies_with_masked_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, TORCH)

    def variant(q: Tensor, keys: Tensor, *others: Any) -> Tensor:
        return attend(q, keys, *others) + keys.shape[1] * 1e-6

    monkeypatch.setattr(self_test, "attend", variant)
    assert "attention" in _refusal()


def test_activation_that_varies_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, TORCH)
    monkeypatch.setattr(self_test, "swiglu", _after(swiglu, lambda rows: 0.01 * (rows.shape[0] == 1)))
    assert "activation of width 24 in torch.bfloat16" in _refusal(torch.bfloat16)


@pytest.mark.skipif(chosen_level(torch.float32) is None, reason="native products are not built here")
def test_gated_products_that_vary_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    varying = _after(compute_segments, lambda rows: 1e-6 * (rows.shape[0] == 7))
    monkeypatch.setattr(self_test, "compute_segments", varying)
    assert "gated products of width 24 in torch.float32" in _refusal()


@pytest.mark.skipif(chosen_level(torch.float32) is None, reason="native products are not built here")
@pytest.mark.parametrize("windowed", [False, True])
def test_native_attention_or_norm_that_varies_is_refused(
    windowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def variant(level: str, config: ModelConfig, qkv: Tensor, *others: Any) -> Tensor:
        applies = qkv.shape[0] == 8 and windowed == (config.sliding_window is not None)
        return attend_in_cache(level, config, qkv, *others) * (1 + 1e-6 * applies)

    window = {"use_sliding_window": True, "sliding_window": 9} if windowed else {}
    with monkeypatch.context() as patched:
        patched.setattr(self_test, "attend_in_cache", variant)
        with pytest.raises(NotRowInvariant, match="attention with heads of 16"):
            prove_row_invariance(tiny_config(**window), torch.float32)
    norm = self_test.norm_rows
    monkeypatch.setattr(self_test, "norm_rows", lambda *given: norm(*given) + 1e-3 * (len(given[1]) == 7))
    assert "norm of width 64" in _refusal()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_machine_passes_without_our_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, TORCH)
    kernel = prove_row_invariance(tiny_config(), dtype)
    assert (kernel.product, kernel.row_multiple) in CANDIDATES[dtype]


def test_norm_that_varies_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rsqrt", _after(torch.rsqrt, lambda rows: 1e-6 * (rows.shape[0] > 9)))
    assert "norm of width 64" in _refusal()


@pytest.mark.parametrize("from_rows", [2, 41, 100])
def test_products_that_vary_with_the_number_of_rows_are_refused(
    monkeypatch: pytest.MonkeyPatch, from_rows: int
) -> None:
    """Also where only a long chunk of a prompt would show it."""
    linear = RowKernel.linear

    def variant(self: RowKernel, x: Tensor, weight: Tensor) -> Tensor:
        return linear(self, x, weight) * (1 + 1e-6 * (x.shape[0] >= from_rows))

    monkeypatch.setattr(RowKernel, "linear", variant)
    assert "in torch.float32 gives a row other bits" in _refusal()
