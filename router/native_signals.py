"""The signals of `router.snarc` by the C source in `experts/native`: all that look back in one call.

`router.snarc` says what they are, in PyTorch, which sums in another order. Called by `router.signal_memory` and
`router.steering`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from experts.native_products import DTYPES, OUT_OF_MEMORY, library_for
from router.native_attention import expect

_INT64, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _PastSignals(ctypes.Structure):
    """`past_signals` of signals.c."""

    _fields_ = (
        *(
            (name, _INT64)
            for name in ("num_rows", "groups", "size", "num_ring_rows", "back", "recent", "stride")
        ),
        *((name, _POINTER) for name in ("hidden", "signs", "ring_directions", "ring_lengths", "past")),
        *((name, _POINTER) for name in ("num_recent", "num_past")),
        ("num_kept", _INT64),
        *((name, _POINTER) for name in ("kept_rows", "kept_directions", "kept_lengths")),
        *((name, _POINTER) for name in ("directions", "lengths")),
        *((name, _POINTER) for name in ("surprise", "novelty", "arousal")),
        ("is_narrow", ctypes.c_int32),
    )


def past_signals(
    level: str,
    hidden_TD: Tensor,
    signs_GS: Tensor,
    ring: tuple[Tensor, Tensor],
    past_TW: Tensor,
    num_recent: int,
    existing: tuple[Tensor, Tensor],
    kept: tuple[Tensor | None, Tensor, Tensor],
    asked: Sequence[bool],
) -> list[Tensor | None]:
    """Surprise, novelty and arousal, (T,) float32, of those that are asked for.

    ring: directions (M, S) and lengths (M,). past_TW: the positions before, nearest first: rows of the ring, then these
    rows. num_recent: of them, how many predict. existing: see `snarc.Past`. kept: numbers of rows, or None for all, and
    room for their directions and lengths. Raises ValueError where anything does not fit, MemoryError.
    """
    (num_rows, width), (groups, size), back = hidden_TD.shape, signs_GS.shape, past_TW.shape[1]
    directions_MS, lengths_M = ring
    num_ring_rows, (kept_rows, kept_directions_KS, kept_lengths_K) = len(lengths_M), kept
    num_kept = len(kept_lengths_K)
    if width != groups * size or hidden_TD.dtype not in DTYPES or hidden_TD.device.type != "cpu":
        raise ValueError(f"no signs for {hidden_TD.dtype} {tuple(hidden_TD.shape)}")
    hidden_TD = hidden_TD if hidden_TD.stride(1) == 1 else hidden_TD.contiguous()
    expect(signs_GS, (groups, size), torch.float32)
    expect(directions_MS, (num_ring_rows, size), torch.float32)
    expect(lengths_M, (num_ring_rows,), torch.float32)
    expect(past_TW, (num_rows, back), torch.int64)
    for counts_T in existing:
        expect(counts_T, (num_rows,), torch.float32)
    expect(kept_directions_KS, (num_kept, size), torch.float32)
    expect(kept_lengths_K, (num_kept,), torch.float32)
    if kept_rows is not None:
        expect(kept_rows, (num_kept,), torch.int64)
    elif num_kept != num_rows:
        raise ValueError(f"room for {num_kept} of {num_rows} rows")
    room_TS, found = torch.empty(num_rows, size), torch.empty(4, num_rows)
    signals = [found[number] if is_asked else None for number, is_asked in enumerate(asked)]
    given = _PastSignals(
        *(num_rows, groups, size, num_ring_rows, back, num_recent, hidden_TD.stride(0) * hidden_TD.itemsize),
        *(hidden_TD.data_ptr(), signs_GS.data_ptr(), directions_MS.data_ptr(), lengths_M.data_ptr()),
        *(past_TW.data_ptr(), *(counts_T.data_ptr() for counts_T in existing)),
        *(num_kept, None if kept_rows is None else kept_rows.data_ptr()),
        *(kept_directions_KS.data_ptr(), kept_lengths_K.data_ptr()),
        *(room_TS.data_ptr(), found[3].data_ptr()),
        *(None if signal is None else signal.data_ptr() for signal in signals),
        hidden_TD.dtype == torch.bfloat16,
    )
    found_library = library_for(level)
    code = found_library.past_signals(
        ctypes.addressof(given), found_library.run_in_threads, torch.get_num_threads()
    )
    if code == OUT_OF_MEMORY:
        raise MemoryError(f"no memory for the signals of {num_rows} rows")
    if code:
        raise ValueError(f"places outside the {num_ring_rows} of the ring and {num_rows} rows")
    return signals


def conflict_of(level: str, logits_TE: Tensor) -> Tensor:
    """See `snarc.conflict`. logits_TE: float32. Raises ValueError where they are none."""
    num_rows, num_experts = logits_TE.shape
    logits_TE = logits_TE.contiguous()
    expect(logits_TE, (num_rows, num_experts), torch.float32)
    conflict_T = torch.empty(num_rows)
    library_for(level).conflict(logits_TE.data_ptr(), num_rows, num_experts, conflict_T.data_ptr())
    return conflict_T
