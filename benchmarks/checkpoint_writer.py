"""Writes generated checkpoints shard by shard: whoever calls it fills one tensor at a time into the open file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from extraction.plan import SHARD_INDEX
from extraction.safetensors_file import write_header

PIECE_ELEMENTS = 1 << 24
"""Written at once."""
BINADE_RMS = math.sqrt(7 / 3)
"""Root mean square of values spread evenly over [1, 2)."""
Row = tuple[str, str, tuple[int, ...], int]
"""Name, safetensors dtype code, shape, bytes."""


def write_shards(
    root: Path, rows: Sequence[Row], shard_bytes: int, fill: Callable[[BinaryIO, Row], None]
) -> dict[str, str]:
    """Shards of at most that size, cut between any two tensors, and their index. Returns tensor name -> file.

    fill: writes exactly the row's bytes at the file's position, or seeks past them.
    """
    shards = list(_shards(rows, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys((row[0] for row in shard), file)
        header = write_header(shard)
        with open(root / file, "wb") as out:
            out.write(header)
            for row in shard:
                fill(out, row)
            out.truncate(len(header) + sum(row[3] for row in shard))
    (root / SHARD_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def _shards(rows: Sequence[Row], shard_bytes: int) -> Iterator[list[Row]]:
    shard: list[Row] = []
    held = 0
    for row in rows:
        if shard and held + row[3] > shard_bytes:
            yield shard
            shard, held = [], 0
        shard.append(row)
        held += row[3]
    yield shard


def write_random(out: BinaryIO, generator: np.random.Generator, num_elements: int, rms: float) -> None:
    """Bfloat16 values of random sign and mantissa with one exponent: many times faster than normal ones."""
    exponent = round(math.log2(rms / BINADE_RMS)) + 127
    for first in range(0, num_elements, PIECE_ELEMENTS):
        count = min(PIECE_ELEMENTS, num_elements - first)
        words = np.frombuffer(bytearray(generator.bytes(2 * count)), dtype=np.uint16)
        words &= 0x807F
        words |= exponent << 7
        out.write(words.data)
