"""The models that `bench_peers` and `bench_roofline` measure on, in every form that a contender wants.

Checkpoint, stores and GGUF files lie in one folder, are made when they are first asked for and found there again.
Prompts are a function of model, length and seed: every contender of a round gets the same ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.make_slice import SliceSpec, write_slice
from benchmarks.peer_gguf import GgufType, quantise_gguf, write_gguf
from benchmarks.published import PUBLISHED
from benchmarks.report import TEXTS
from benchmarks.slice_routing import HiddenShape, token_walk
from extraction.extract import extract
from extraction.quantise import Quantization
from extraction.quantised_parts import NOT_QUANTISED, QuantisedParts

BUNDLED = "stories"
BUNDLED_CHECKPOINT = Path(__file__).parent.parent / "models" / "stories-moe"
TINY: Mapping[str, int] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 1024,
    "eos_token_id": 511,
}
"""What `--quick` computes: no speed of it means anything."""
TINY_ROUTING = (0.7, 0.45)
_INT8 = Quantization(scheme="int8", group_size=None)
_INT4 = Quantization(scheme="int4", group_size=32)
FORMS: Mapping[str, QuantisedParts] = {
    "bf16": NOT_QUANTISED,
    "int8": QuantisedParts(_INT8, _INT8, _INT8),
    "int4": QuantisedParts(_INT4, _INT4, _INT4),
}
"""Every matrix in the one form, as the peer's files are."""


@dataclass(frozen=True)
class PeerModel:
    """One model in a folder."""

    folder: Path
    family: str
    """A published family, of which a slice is taken, or `stories`."""
    num_layers: int = 4
    vocab_size: int | None = None
    """None means the published one; a small one leaves next to nothing of the head."""
    is_tiny: bool = False

    @property
    def name(self) -> str:
        if self.family == BUNDLED:
            return BUNDLED
        size = "tiny" if self.is_tiny else str(self.num_layers)
        return f"{self.family}-{size}" + (f"-v{self.vocab_size}" if self.vocab_size else "")

    def checkpoint(self) -> Path:
        """Raises DiskTooSmall or what writing raises."""
        if self.family == BUNDLED:
            return BUNDLED_CHECKPOINT
        path = self.folder / self.name
        if not path.exists():
            partial = self.folder / f"{self.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            skew, locality = TINY_ROUTING if self.is_tiny else (0.75, 0.3)
            write_slice(SliceSpec(self._config(), skew, locality), partial)
            partial.rename(path)
        return path

    def store(self, form: str) -> Path:
        """form: a name of FORMS. Plain weights stay in the checkpoint's shards."""
        path = self.folder / f"{self.name}-{form}-store"
        if not path.exists():
            extract(self.checkpoint(), path, index_only=form == "bf16", quantised=FORMS[form])
        return path

    def gguf(self, kind: GgufType, num_threads: int) -> Path:
        path = self.folder / f"{self.name}-{kind}.gguf"
        if not path.exists():
            partial = self.folder / f"{self.name}-{kind}.partial"
            if kind == "bf16":
                write_gguf(self.checkpoint(), partial)
            else:
                quantise_gguf(self.gguf("bf16", num_threads), partial, kind, num_threads)
            partial.rename(path)
        return path

    @property
    def context(self) -> int:
        """Most positions of one text."""
        config = json.loads((self.checkpoint() / "config.json").read_text())
        return int(config["max_position_embeddings"])

    def prompts(self, count: int, length: int, seed: int) -> list[list[int]]:
        """Of a slice walks through its topics, of the bundled model pieces of a book."""
        generator = torch.Generator().manual_seed(seed)
        config = json.loads((self.checkpoint() / "config.json").read_text())
        if self.family == BUNDLED:
            book = _book(self.checkpoint())
            starts = torch.randint(len(book) - length, (count,), generator=generator).tolist()
            return [book[start : start + length] for start in starts]
        topics = HiddenShape(config["hidden_size"]).num_topics
        # The last id ends a text, which not every contender takes in a prompt.
        ids = config["vocab_size"] - 1
        return [token_walk(length, ids, topics, generator).tolist() for _ in range(count)]

    def _config(self) -> dict[str, Any]:
        published = dict(PUBLISHED[self.family])
        config = published | {"num_hidden_layers": self.num_layers}
        if self.is_tiny:
            config = published | {name: size for name, size in TINY.items() if name in published}
        if self.vocab_size is not None:
            config["vocab_size"] = self.vocab_size
        end = config["vocab_size"] - 1
        return config | {"bos_token_id": None, "pad_token_id": None, "eos_token_id": end}


def _book(checkpoint: Path) -> list[int]:
    from gateway.text.tokenizer import TextTokenizer

    text = sorted(TEXTS.glob("*.txt"))[0].read_text()
    return list(TextTokenizer.from_folder(checkpoint).encode(text))
