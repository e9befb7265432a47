"""Choosing by snarc scores, and means in place of absent experts, by the C source in `experts/native`.

`router.scoring` and `router.stand_in` say what is computed, in PyTorch, whose softmax sums in another order: one call
takes a few microseconds where those operations take hundreds. Called by `router.choosing`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from experts.native_products import LEVELS, OUT_OF_MEMORY, library_for
from router.native_attention import expect
from router.scoring import ScoreFactors, SnarcWeights

_INT64, _POINTER, _FLOAT, _INT32 = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float, ctypes.c_int32


class _Choices(ctypes.Structure):
    """`choices` of choosing.c."""

    _fields_ = (
        *((name, _INT64) for name in ("num_rows", "num_experts", "top_k", "keep_best")),
        *((name, _POINTER) for name in ("logits", "surprise", "reward", "novelty", "trust", "sizes", "cold")),
        *((name, _POINTER) for name in ("chosen", "weights", "is_cold", "is_spared")),
        *((f"{name}_weight", _FLOAT) for name in ("gate", "novelty", "trust", "warmth")),
        ("threshold", _FLOAT),
        ("is_scaled", _INT32),
        ("is_normalised", _INT32),
        ("num_replaced", _INT64),
    )


class _StandIns(ctypes.Structure):
    """`stand_ins` of choosing.c."""

    _fields_ = (
        *((name, _INT64) for name in ("num_rows", "num_experts", "top_k", "width", "num_replaced")),
        *((name, _POINTER) for name in ("rows", "chosen", "weights", "is_spared", "means", "out")),
    )


def choose_rows(
    level: str,
    logits_RE: Tensor,
    factors: ScoreFactors,
    weights: SnarcWeights,
    k: int,
    normalise: bool,
    cold_E: Tensor,
    size_E: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Experts int64, mixing weights float32, and bool which are cold and which are spared, (R, K) each, best first.

    logits_RE: float32. cold_E: bool. size_E: see `stand_in.spare`; None where nothing may be spared. None comes back
    where nothing is. Of equal scores the lower expert comes first.

    Raises ValueError where anything does not fit, MemoryError.
    """
    num_rows, num_experts = logits_RE.shape
    if not 0 < k <= num_experts:
        raise ValueError(f"no {k} of {num_experts} experts")
    facts = factors.facts
    surprise_R = factors.surprise_T if weights.novelty else None
    reward_R = factors.reward_T if weights.trust else None
    held = (
        _checked(logits_RE, (num_rows, num_experts)),
        None if surprise_R is None else _checked(surprise_R, (num_rows,)),
        None if reward_R is None else _checked(reward_R, (num_rows,)),
        _checked(facts.novelty_E, (num_experts,)),
        _checked(facts.trust_E, (num_experts,)),
        None if size_E is None else _checked(size_E, (num_experts,)),
        _checked(cold_E, (num_experts,), torch.bool),
    )
    chosen_RK = torch.empty(num_rows, k, dtype=torch.int64)
    weights_RK = torch.empty(num_rows, k)
    flags_2RK = torch.empty(1 if size_E is None else 2, num_rows, k, dtype=torch.bool)
    choices = _Choices(
        *(num_rows, num_experts, k, min(weights.keep_best, k)),
        *(None if tensor is None else tensor.data_ptr() for tensor in held),
        *(chosen_RK.data_ptr(), weights_RK.data_ptr()),
        *(flags_2RK[0].data_ptr(), flags_2RK[-1].data_ptr()),
        *(weights.router, weights.novelty, weights.trust, weights.warmth),
        *(weights.stand_in / k, weights.is_scaled, normalise),
    )
    found = library_for(level)
    code = found.choose(
        LEVELS.index(level), ctypes.addressof(choices), found.run_in_threads, torch.get_num_threads()
    )
    if code:
        raise MemoryError(f"no memory for the choice of {num_rows} rows")
    return chosen_RK, weights_RK, flags_2RK[0], flags_2RK[1] if choices.num_replaced else None


def sum_means(
    level: str, rows_N: Tensor, experts_RK: Tensor, weights_RK: Tensor, spared_RK: Tensor, means_ED: Tensor
) -> Tensor:
    """(N, D) float32: of some rows the weighted sums of the means of what is spared, rank by rank.

    Raises ValueError where anything does not fit, MemoryError.
    """
    num_experts, width = means_ED.shape
    num_rows, k = experts_RK.shape
    held = (
        _checked(rows_N, (len(rows_N),), torch.int64),
        _checked(experts_RK, (num_rows, k), torch.int64),
        _checked(weights_RK, (num_rows, k)),
        _checked(spared_RK, (num_rows, k), torch.bool),
        _checked(means_ED, (num_experts, width)),
    )
    output_ND = torch.empty(len(rows_N), width)
    given = _StandIns(
        *(num_rows, num_experts, k, width, len(rows_N)),
        *(tensor.data_ptr() for tensor in held),
        output_ND.data_ptr(),
    )
    found = library_for(level)
    code = found.stand_in(ctypes.addressof(given), found.run_in_threads, torch.get_num_threads())
    if code == OUT_OF_MEMORY:
        raise MemoryError(f"no memory for what stands in for experts of {len(rows_N)} rows")
    if code:
        raise ValueError(f"rows or experts outside the {num_rows} and {num_experts} that there are")
    return output_ND


def _checked(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """As the library reads it, a copy where it is not."""
    tensor = tensor.contiguous()
    expect(tensor, shape, dtype)
    return tensor
