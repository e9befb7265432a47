"""Attention by a device's products, each of which has one shape whatever the batch, so that its library has one kernel.

As `router.attention`, which says what is computed: keys in blocks of 64 positions, the blocks' parts added in a binary
tree, all in float32. Queries are cut into tiles of QUERY_ROWS rows, and pairs of a tile and a block are multiplied
PAIRS at a time; everything else goes element by element. Called by `router.decoder_layer`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from router.attention import BLOCK_POSITIONS, tree_sum

QUERY_ROWS = 64
PAIRS = 32
MAX_PAIRS = 1024
"""At a time, if that is a tile of every set at least: 16 MiB of scores, and with heads of 128 32 MiB each of keys and
values, which are laid out anew for every tile."""


def attend_in_tiles(
    q_BMd: Tensor, keys_BNpd: Tensor, values_BNpd: Tensor, limits_BM: Tensor, window: int | None = None
) -> Tensor:
    """As `router.attention.attend`, with M a multiple of QUERY_ROWS. Returns (B, M, d) float32."""
    num_sets, num_rows, _ = q_BMd.shape
    step = max(1, MAX_PAIRS // (num_sets * keys_BNpd.shape[1])) * QUERY_ROWS
    pieces = []
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        pieces.append(_attend_tiles(q_BMd[:, rows], keys_BNpd, values_BNpd, limits_BM[:, rows], window))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _attend_tiles(
    q_BMd: Tensor, keys_BNpd: Tensor, values_BNpd: Tensor, limits_BM: Tensor, window: int | None
) -> Tensor:
    """Every tile (t) is a set of its own, with its set's keys."""
    num_sets, num_rows, head_dim = q_BMd.shape
    num_blocks, num_tiles = keys_BNpd.shape[1], num_rows // QUERY_ROWS
    shape = (num_sets, num_tiles, num_blocks)
    q = q_BMd.view(num_sets, num_tiles, 1, QUERY_ROWS, head_dim).expand(*shape, -1, -1).flatten(0, 2)
    keys, values = (
        part.unsqueeze(1).expand(*shape, -1, -1).flatten(0, 2) for part in (keys_BNpd, values_BNpd)
    )
    scores_BtNMp = multiply_pairs(q, keys, is_transposed=True).view(*shape, QUERY_ROWS, BLOCK_POSITIONS)
    limits = limits_BM.view(num_sets, num_tiles, 1, QUERY_ROWS, 1)
    positions = torch.arange(num_blocks * BLOCK_POSITIONS, device=q.device)
    positions_Np = positions.view(1, 1, num_blocks, 1, BLOCK_POSITIONS)
    scores_BtNMp.masked_fill_(positions_Np >= limits, float("-inf"))
    if window is not None:
        scores_BtNMp.masked_fill_(positions_Np < limits - window, float("-inf"))
    largest_BtM = scores_BtNMp.amax(dim=(2, 4))
    weights_BtNMp = scores_BtNMp.sub_(largest_BtM[:, :, None, :, None]).exp_()
    totals = sum_by_halves(weights_BtNMp).flatten(0, 1)
    parts = multiply_pairs(weights_BtNMp.flatten(0, 2), values, is_transposed=False)
    parts = parts.view(num_sets * num_tiles, num_blocks, QUERY_ROWS, head_dim)
    attended = tree_sum(parts).div_(tree_sum(totals).unsqueeze(-1))
    return attended.view(num_sets, num_rows, head_dim)


def multiply_pairs(a_QRI: Tensor, b_Q: Tensor, *, is_transposed: bool) -> Tensor:
    """a @ b for each of Q pairs, PAIRS in a call: (Q, R, O). b: (Q, O, I) where transposed, else (Q, I, O)."""
    num_pairs = a_QRI.shape[0]
    missing = PAIRS - num_pairs
    if missing > 0:
        a_QRI, b_Q = (pad(part, (0, 0, 0, 0, 0, missing)) for part in (a_QRI, b_Q))
    b_QIO = b_Q.transpose(1, 2) if is_transposed else b_Q
    if missing >= 0:
        return torch.bmm(a_QRI, b_QIO)[:num_pairs]
    out_QRO = a_QRI.new_empty(num_pairs, a_QRI.shape[1], b_QIO.shape[2])
    for first in range(0, num_pairs, PAIRS):
        start = min(first, num_pairs - PAIRS)  # some of the last are computed twice, to the same bits
        part = slice(start, start + PAIRS)
        torch.bmm(a_QRI[part], b_QIO[part], out=out_QRO[part])
    return out_QRO


def sum_by_halves(x: Tensor) -> Tensor:
    """Over the last dimension, by adding its second half to its first until one number is left, so element by element:
    a library's sum would choose its order by the number of rows."""
    while (width := x.shape[-1]) > 1:
        if width % 2:
            x = pad(x, (0, 1))
            width += 1
        x = x[..., : width // 2] + x[..., width // 2 :]
    return x.squeeze(-1)
