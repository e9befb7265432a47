"""The checkpoint's own routing by the C source in `experts/native`: a row's experts depend on its logits alone.

`router.scoring.route_native` is the same in PyTorch, with other bits: its softmax sums in another order. Called by
`router.scoring`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experts.native_products import DTYPES, LEVELS, library_for


def route_rows(level: str, logits_TE: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Softmax over all experts in float32, then the best: experts int64 and weights float32, (T, K) each, best first.

    Of equal probabilities the lower expert comes first. Raises ValueError where anything does not fit, MemoryError.
    """
    num_rows, num_experts = logits_TE.shape
    if logits_TE.dtype not in DTYPES or logits_TE.device.type != "cpu" or not 0 < top_k <= num_experts:
        raise ValueError(f"no {top_k} of {logits_TE.dtype} logits {tuple(logits_TE.shape)}")
    if logits_TE.stride(1) != 1:
        logits_TE = logits_TE.contiguous()
    experts_TK = torch.empty(num_rows, top_k, dtype=torch.int64)
    weights_TK = torch.empty(num_rows, top_k)
    found = library_for(level)
    code = found.route(
        LEVELS.index(level),
        logits_TE.dtype == torch.bfloat16,
        logits_TE.data_ptr(),
        num_rows,
        num_experts,
        logits_TE.stride(0) * logits_TE.itemsize,
        top_k,
        normalise,
        experts_TK.data_ptr(),
        weights_TK.data_ptr(),
        found.run_in_threads,
        torch.get_num_threads(),
    )
    if code:
        raise MemoryError(f"no memory for the routing of {num_rows} rows")
    return experts_TK, weights_TK
