"""Dispatch and combine against a plain loop, and their indifference to how rows were computed."""

from __future__ import annotations

import torch

from router.dispatch import combine, dispatch
from router.scoring import route_native


def _routed(num_tokens: int, num_experts: int, k: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    return (
        torch.randn(num_tokens, width, generator=generator),
        torch.randn(num_tokens, num_experts, generator=generator),
    )


def test_call_is_valid_and_sends_each_token_once() -> None:
    tokens, logits = _routed(9, 8, 3, 4)
    call = dispatch("model", 2, tokens, route_native(logits, 3, True)).call
    call.validate()
    assert call.tokens_TD is tokens
    assert call.num_rows == 27


def test_combine_undoes_dispatch() -> None:
    tokens, logits = _routed(9, 8, 3, 4)
    routing = route_native(logits, 3, True)
    dispatched = dispatch("model", 0, tokens, routing)
    scale = torch.randn(8)
    experts_of_rows = [
        e for e, n in zip(dispatched.call.experts, dispatched.call.counts, strict=True) for _ in range(n)
    ]
    rows = tokens[list(dispatched.call.token_of_R)] * scale[experts_of_rows].unsqueeze(1)
    expected = torch.zeros(9, 4)
    for token in range(9):
        for rank in range(3):
            expert = int(routing.experts_TK[token, rank])
            expected[token] += routing.weights_TK[token, rank] * (tokens[token] * scale[expert])
    torch.testing.assert_close(combine(dispatched, rows), expected, rtol=1e-6, atol=1e-6)


def test_a_token_combines_to_the_same_bits_in_any_batch() -> None:
    tokens, logits = _routed(16, 8, 4, 32)
    routing = route_native(logits, 4, False)
    whole = dispatch("model", 0, tokens, routing)
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    alone_routing = route_native(logits[5:6], 4, False)
    alone = dispatch("model", 0, tokens[5:6], alone_routing)
    slots = [
        whole.row_of_slot[5 * 4 + routing.experts_TK[5].tolist().index(expert)].item()
        for expert in alone.call.experts
    ]
    assert torch.equal(combine(alone, rows[slots])[0], combine(whole, rows)[5])


def test_native_routing_normalises_only_where_told() -> None:
    _, logits = _routed(6, 8, 2, 4)
    assert torch.allclose(route_native(logits, 2, True).weights_TK.sum(-1), torch.ones(6))
    assert (route_native(logits, 2, False).weights_TK.sum(-1) < 1).all()
    assert torch.equal(route_native(logits, 8, False).experts_TK[:, 0], logits.argmax(-1))
