"""Attention and norms by the C source in `experts/native`: queries, keys and values of a step, in one call a layer.

As `router.attention`, a row's bits depend on what it sees alone; the cache is read where it lies, block by block, and
written on the way. Sums are float32. Every pointer that goes in is of a tensor checked here. Called by
`router.decoder_layer`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.native_products import DTYPES, LEVELS, library_for
from router.attention import BLOCK_POSITIONS
from router.kv_cache import KvPool, blocks_for
from router.model_config import ModelConfig
from router.step_batch import Span


@dataclass(frozen=True)
class Places:
    """Where a step's rows are written, and which blocks their sequences have; the same for every layer."""

    num_tokens: int
    num_spans: int
    most_blocks: int
    largest_block: int
    blocks_T: array[int]
    offsets_T: array[int]
    spans: array[int]
    """Four numbers each: first row, rows, where its blocks stand in `tables`, position of the first row."""
    tables: array[int]

    @classmethod
    def of(cls, spans: Sequence[Span]) -> Places:
        """Raises ValueError for a span that its blocks do not cover."""
        blocks, offsets, numbers, tables = (array("q") for _ in range(4))
        row = most_blocks = 0
        for span in spans:
            end = span.first + span.count
            needed = blocks_for(end)
            if span.first < 0 or span.count < 1 or needed > len(span.table) or min(span.table) < 0:
                raise ValueError(f"{span.count} rows from position {span.first} in blocks {span.table}")
            if span.count == 1:  # of a stream, beside many others
                blocks.append(span.table[needed - 1])
                offsets.append(span.first % BLOCK_POSITIONS)
            else:
                _add_places(span, blocks, offsets)
            numbers.extend((row, span.count, len(tables), span.first))
            tables.extend(span.table[:needed])
            row, most_blocks = row + span.count, max(most_blocks, needed)
        return cls(row, len(spans), most_blocks, max(tables, default=0), blocks, offsets, numbers, tables)


def _add_places(span: Span, blocks: array[int], offsets: array[int]) -> None:
    """Block by block."""
    end = span.first + span.count
    for index in range(span.first // BLOCK_POSITIONS, blocks_for(end)):
        begin = index * BLOCK_POSITIONS
        inside = range(max(span.first - begin, 0), min(end - begin, BLOCK_POSITIONS))
        blocks.extend(array("q", (span.table[index],)) * len(inside))
        offsets.extend(inside)


@dataclass(frozen=True)
class HeadNorms:
    """Weights of each head's norm, (head_dim,) each; None where queries and keys come normed."""

    q: Tensor | None = None
    k: Tensor | None = None


NO_NORMS = HeadNorms()


def attend_in_cache(
    level: str,
    config: ModelConfig,
    qkv_TO: Tensor,
    norms: HeadNorms,
    rotation: tuple[Tensor, Tensor],
    pool: KvPool,
    layer: int,
    places: Places,
) -> Tensor:
    """Norm, rotate, write to the cache, attend: (T, heads * head_dim) in qkv's dtype.

    rotation: cos and sin, (T, 1, head_dim) float32. Raises ValueError where anything does not fit, MemoryError.
    """
    width, dtype = config.head_dim, qkv_TO.dtype
    outputs = (config.num_heads + 2 * config.num_kv_heads) * width
    num_tokens, shape = places.num_tokens, pool.keys.shape
    expect(qkv_TO, (num_tokens, outputs), dtype)
    for weight in (norms.q, norms.k):
        if weight is not None:
            expect(weight, (width,), dtype)
    for table in rotation:
        expect(table, (num_tokens, 1, width), torch.float32)
    for cache in (pool.keys, pool.values):
        expect(cache, (shape[0], shape[1], config.num_kv_heads, BLOCK_POSITIONS, width), dtype)
    if not 0 <= layer < shape[0] or places.largest_block >= shape[1] or dtype not in DTYPES or width % 2:
        raise ValueError(f"no layer {layer} or block {places.largest_block} in a cache of {tuple(shape)}")
    out_TO = qkv_TO.new_empty(num_tokens, config.num_heads * width)
    block_bytes = config.num_kv_heads * BLOCK_POSITIONS * width * dtype.itemsize
    numbers = array(
        "q",
        (
            *(num_tokens, config.num_heads, config.num_kv_heads, width, config.window(layer) or 0),
            *(places.num_spans, block_bytes, places.most_blocks),
        ),
    )
    factors = array("f", (config.rms_norm_eps, width**-0.5))
    layer_bytes = layer * shape[1] * block_bytes
    found = library_for(level)
    code = found.attend(
        LEVELS.index(level),
        dtype == torch.bfloat16,
        numbers.buffer_info()[0],
        factors.buffer_info()[0],
        qkv_TO.data_ptr(),
        None if norms.q is None else norms.q.data_ptr(),
        None if norms.k is None else norms.k.data_ptr(),
        rotation[0].data_ptr(),
        rotation[1].data_ptr(),
        pool.keys.data_ptr() + layer_bytes,
        pool.values.data_ptr() + layer_bytes,
        places.blocks_T.buffer_info()[0],
        places.offsets_T.buffer_info()[0],
        places.spans.buffer_info()[0],
        places.tables.buffer_info()[0],
        out_TO.data_ptr(),
        found.run_in_threads,
        torch.get_num_threads(),
    )
    if code:
        raise MemoryError(f"no memory for the attention of {num_tokens} rows")
    return out_TO


def norm_rows(level: str, x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm of each row in float32, rounded to its dtype before and after the weight. (R, D) -> (R, D).

    Raises ValueError where shapes or dtypes do not fit, MemoryError.
    """
    num_rows, width = x_RD.shape
    x_RD = x_RD.contiguous()
    expect(x_RD, (num_rows, width), x_RD.dtype)
    expect(weight_D, (width,), x_RD.dtype)
    if x_RD.dtype not in DTYPES or not width:
        raise ValueError(f"no norm of {x_RD.dtype} rows of {width}")
    out_RD = torch.empty_like(x_RD)
    found = library_for(level)
    code = found.norm(
        LEVELS.index(level),
        x_RD.dtype == torch.bfloat16,
        x_RD.data_ptr(),
        num_rows,
        width,
        width * x_RD.itemsize,
        weight_D.data_ptr(),
        eps,
        out_RD.data_ptr(),
        found.run_in_threads,
        torch.get_num_threads(),
    )
    if code:
        raise MemoryError(f"no memory for the norm of {num_rows} rows")
    return out_RD


def expect(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises ValueError for a tensor that is not contiguous on the CPU, or of another shape or dtype."""
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
        found = f"{tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
        raise ValueError(f"{found} where {dtype} {shape} was expected")
