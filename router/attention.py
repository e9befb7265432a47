"""Causal attention over KV blocks, with bits that do not depend on batch, chunk or padding.

Keys are always cut into blocks of `BLOCK_POSITIONS`, whatever the number of queries; each block's part is
computed by a product of fixed inner size, and the parts are added in a binary tree in which absent blocks count
as zeros. The maximum over keys is exact in any order. All of it in float32. Called by `router.backbone`.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_POSITIONS = 64
"""Positions in a KV block; also the piece in which keys are summed, so part of the numerics."""
ROW_MULTIPLE = 8
"""Query rows of one key-value head are padded to this; a self-test at start proves that it is enough."""
MAX_SCORE_ELEMENTS = 1 << 21
"""Queries are cut into pieces so that one piece's scores take about 8 MiB. Does not change any bit."""


def attend(
    q_BMd: Tensor, keys_BNpd: Tensor, values_BNpd: Tensor, limits_BM: Tensor, window: int | None = None
) -> Tensor:
    """Softmax attention of B independent sets of M query rows over N key blocks each.

    q_BMd: float32, already scaled; M a multiple of ROW_MULTIPLE. keys_BNpd, values_BNpd: float32, p =
    BLOCK_POSITIONS. limits_BM: int64, row (b, m) sees the keys at positions below its limit, which is at least 1;
    with a window, only the last that many of them.
    Returns (B, M, d) float32.
    """
    num_sets, num_rows, _ = q_BMd.shape
    keys_per_row = num_sets * keys_BNpd.shape[1] * BLOCK_POSITIONS
    step = max(1, MAX_SCORE_ELEMENTS // keys_per_row // ROW_MULTIPLE) * ROW_MULTIPLE
    if step >= num_rows:
        return _attend_rows(q_BMd, keys_BNpd, values_BNpd, limits_BM, window)
    pieces = []
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        # Blocks behind the last visible key would only add zeros.
        num_blocks = -(-int(limits_BM[:, rows].max()) // BLOCK_POSITIONS)
        pieces.append(
            _attend_rows(
                q_BMd[:, rows],
                keys_BNpd[:, :num_blocks],
                values_BNpd[:, :num_blocks],
                limits_BM[:, rows],
                window,
            )
        )
    return torch.cat(pieces, dim=1)


def _attend_rows(
    q_BMd: Tensor, keys_BNpd: Tensor, values_BNpd: Tensor, limits_BM: Tensor, window: int | None
) -> Tensor:
    num_sets, num_rows, head_dim = q_BMd.shape
    num_blocks = keys_BNpd.shape[1]
    per_block = (num_sets * num_blocks, -1, head_dim)
    q = q_BMd.unsqueeze(1).expand(-1, num_blocks, -1, -1).reshape(per_block)
    scores = torch.bmm(q, keys_BNpd.reshape(per_block).transpose(1, 2))
    scores_BNMp = scores.view(num_sets, num_blocks, num_rows, BLOCK_POSITIONS)
    positions_Np = torch.arange(num_blocks * BLOCK_POSITIONS, device=q.device).view(
        1, num_blocks, 1, BLOCK_POSITIONS
    )
    scores_BNMp.masked_fill_(positions_Np >= limits_BM[:, None, :, None], float("-inf"))
    if window is not None:
        # Blocks before the window stay in the tree as zeros: leaving them out would move the others in it.
        scores_BNMp.masked_fill_(positions_Np < limits_BM[:, None, :, None] - window, float("-inf"))
    largest_BM = scores_BNMp.amax(dim=(1, 3))
    weights_BNMp = scores_BNMp.sub_(largest_BM[:, None, :, None]).exp_()
    totals_BNM = weights_BNMp.sum(dim=3)
    parts = torch.bmm(scores, values_BNpd.reshape(per_block))
    parts_BNMd = parts.view(num_sets, num_blocks, num_rows, head_dim)
    return tree_sum(parts_BNMd).div_(tree_sum(totals_BNM).unsqueeze(-1))


def tree_sum(parts_BN: Tensor) -> Tensor:
    """Add along dimension 1 in pairs, then pairs of pairs. Zeros appended at the end change nothing."""
    while (num_parts := parts_BN.shape[1]) > 1:
        paired = parts_BN[:, 0 : num_parts - 1 : 2] + parts_BN[:, 1::2]
        if num_parts % 2:
            paired = torch.cat((paired, parts_BN[:, -1:]), dim=1)
        parts_BN = paired
    return parts_BN[:, 0]
