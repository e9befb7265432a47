"""What names the keys and values of a block: everything that decides their bits.

A chain of hashes: a block's key covers its own tokens, what those of media stand for, the same of all blocks before
it, and the scope that they were computed in. Equal keys mean equal bits (docs/exactness.md). Pure; called by
`router.kv_room`.
"""

from __future__ import annotations

import hashlib
import json
import struct
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from router.attention import BLOCK_POSITIONS
from router.prompt_inputs import MediaSpan


@dataclass(frozen=True)
class PrefixScope:
    """What texts must have in common, beside tokens, to share keys and values."""

    store: str
    """Hash of the store."""
    numerics_class: str
    """With what is quantised, and how it is multiplied (docs/exactness.md)."""
    experts_per_token: int
    policy: str = "native"
    owner: str = ""
    """Whose texts they are; nobody finds another's, not even by the time that an answer takes."""

    def root(self) -> bytes:
        """What the chain begins with."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).digest()


def extend_keys(
    keys: list[bytes],
    root: bytes,
    tokens: Sequence[int],
    num_blocks: int,
    media: Sequence[MediaSpan] = (),
) -> None:
    """Append the keys of a text's blocks up to `num_blocks`, which its tokens must fill.

    Rotary positions follow from the tokens, and where media stand among them and how large they are, which their
    digests cover.
    """
    for block in range(len(keys), num_blocks):
        first = block * BLOCK_POSITIONS
        own = array("I", tokens[first : first + BLOCK_POSITIONS])
        assert len(own) == BLOCK_POSITIONS, f"block {block} of {len(tokens)} tokens is not full"
        before = keys[-1] if keys else root
        seen = b"".join(
            span.digest + struct.pack("<qq", span.first, span.length)
            for span in media
            if span.first < first + BLOCK_POSITIONS and first < span.first + span.length
        )
        keys.append(hashlib.sha256(before + own.tobytes() + seen).digest())
