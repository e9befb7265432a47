"""The expert's arithmetic against a plain reference, and the row kernel's promise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from experts.call import ExpertCall
from experts.errors import NotRowInvariant
from experts.ffn import compute_experts, view_expert
from experts.numerics import RowKernel, calibrate, swiglu

WIDTH, EXPERT_WIDTH = 64, 24


def _weights(dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(3 * EXPERT_WIDTH * WIDTH, generator=generator) * 0.1).to(dtype).view(torch.uint8)
        for _ in range(count)
    ]


def _call(tokens: torch.Tensor, counts: tuple[int, ...], seed: int = 0) -> ExpertCall:
    rows = torch.randint(0, len(tokens), (sum(counts),), generator=torch.Generator().manual_seed(seed))
    return ExpertCall("model", 0, tuple(range(len(counts))), counts, tuple(rows.tolist()), tokens)


def _reference(call: ExpertCall, records: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    rows, first = [], 0
    for expert, count in zip(call.experts, call.counts, strict=True):
        gate, up, down = records[expert].view(dtype).double().view(3, -1)
        x = call.tokens_TD[list(call.token_of_R[first : first + count])].double()
        hidden = F.silu(x @ gate.view(EXPERT_WIDTH, WIDTH).T) * (x @ up.view(EXPERT_WIDTH, WIDTH).T)
        rows.append(hidden @ down.view(WIDTH, EXPERT_WIDTH).T)
        first += count
    return torch.cat(rows)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_rows_agree_with_a_plain_reference(dtype: torch.dtype, tolerance: float) -> None:
    records = _weights(dtype, 4)
    tokens = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype)
    call = _call(tokens, (1, 3, 9, 2))
    kernel = calibrate([(2 * EXPERT_WIDTH, WIDTH), (WIDTH, EXPERT_WIDTH)], dtype)
    out = compute_experts(call, [view_expert(record, dtype, WIDTH) for record in records], kernel)
    torch.testing.assert_close(out.double(), _reference(call, records, dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_whatever_comes_with_it(dtype: torch.dtype) -> None:
    weights = [view_expert(record, dtype, WIDTH) for record in _weights(dtype, 3)]
    tokens = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype)
    kernel = calibrate([(2 * EXPERT_WIDTH, WIDTH), (WIDTH, EXPERT_WIDTH)], dtype)
    whole = compute_experts(_call(tokens, (31, 2, 40)), weights, kernel)
    rows = _call(tokens, (31, 2, 40)).token_of_R
    for row, expert in ((0, 0), (30, 0), (31, 1), (40, 2), (72, 2)):
        alone = ExpertCall("model", 0, (expert,), (1,), (0,), tokens[rows[row]].unsqueeze(0))
        assert torch.equal(compute_experts(alone, [weights[expert]], kernel)[0], whole[row])


def test_record_of_a_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="does not hold three"):
        view_expert(torch.zeros(100, dtype=torch.uint8), torch.float32, WIDTH)


def test_swiglu_agrees_with_silu_and_survives_extremes() -> None:
    rows = torch.tensor([[-200.0, -1.0, 0.0, 50.0, 2.0, 3.0, 4.0, 5.0]])
    torch.testing.assert_close(swiglu(rows), F.silu(rows[:, :4]) * rows[:, 4:])


def test_calibration_refuses_a_library_that_is_never_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(self: RowKernel, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, weight.t()) + x.shape[0] * 1e-3

    monkeypatch.setattr(RowKernel, "linear", noisy)
    with pytest.raises(NotRowInvariant, match="24x64"):
        calibrate([(EXPERT_WIDTH, WIDTH)], torch.float32)


def test_kernel_pads_with_rows_that_do_not_show() -> None:
    x, weight = torch.randn(3, WIDTH), torch.randn(EXPERT_WIDTH, WIDTH)
    out = RowKernel(8).linear(x, weight)
    assert out.shape == (3, EXPERT_WIDTH)
    torch.testing.assert_close(out, x @ weight.T)
