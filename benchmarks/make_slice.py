"""Writes a slice: a checkpoint of a published model's full width with few layers, random weights and shaped gates.

What memory and disk do to a mixture of experts depends on widths and on routing, not on what the weights mean. The
gates are calibrated (`benchmarks.slice_routing`) to a stated skew (share of activations that the busier half of
the experts takes) and locality (share of a token's experts that the token before it used), and both are then
measured by running the checkpoint. Written in pieces: takes little memory, whatever the size.

Usage: python -m benchmarks.make_slice OUT --family qwen3_moe --layers 4 [--skew 0.75 --locality 0.3 | --near-uniform]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from benchmarks.checkpoint_writer import PIECE_ELEMENTS, Row, write_random, write_shards
from benchmarks.published import PUBLISHED
from benchmarks.slice_probe import probe_routing
from benchmarks.slice_routing import (
    GateShape,
    HiddenShape,
    RoutingUnreachable,
    calibrate,
    embedding_rows,
    gate_matrix,
    head_rows,
)
from benchmarks.slice_tokenizer import write_byte_tokenizer
from extraction.component_layout import ComponentLayout
from extraction.decoder_config import DecoderShape
from extraction.extract import extract
from extraction.layouts import layout_for
from extraction.manifest import ROLES

SHARD_BYTES = 4_000_000_000
SPARE_BYTES = 1 << 28
"""Free disk that must remain."""
NEAR_UNIFORM = (0.6, 0.16)
"""The worst case for a cache: about what the bundled model does on texts that it has not seen."""
OUTPUT_GAIN = 0.25
"""Of the matrices that write to the hidden state: what the layers add stays small beside the embeddings."""


class DiskTooSmall(Exception):
    """The slice would not fit."""

    def __init__(self, path: str, needed: int, free: int) -> None:
        super().__init__(path, needed, free)
        self.path, self.needed, self.free = path, needed, free

    def __str__(self) -> str:
        return f"{self.path}: the slice needs {self.needed} bytes of disk and {self.free} are free"


@dataclass(frozen=True)
class SliceSpec:
    """What is written."""

    config: Mapping[str, Any]
    skew: float = 0.75
    locality: float = 0.3
    seed: int = 0
    is_stacked: bool = False
    """Each layer's experts in two tensors, as `transformers` has them in memory; else one by one, as published."""


def write_slice(spec: SliceSpec, out: Path) -> int:
    """Write the checkpoint to a new folder. Returns the bytes of its tensors.

    Raises DiskTooSmall, RoutingUnreachable, FileExistsError, or ConfigInvalid.
    """
    (component,) = layout_for(spec.config).components
    decoder = component.decoder
    assert decoder is not None
    hidden = HiddenShape(decoder.hidden_size)
    gate = calibrate(
        spec.skew, spec.locality, decoder.num_experts, decoder.experts_per_token, hidden.num_topics
    )
    rows = _rows(component, decoder, is_stacked=spec.is_stacked)
    needed = sum(row[3] for row in rows)
    free = shutil.disk_usage(_existing(out)).free
    if needed + SPARE_BYTES > free:
        raise DiskTooSmall(str(out), needed + SPARE_BYTES, free)
    out.mkdir(parents=True)
    write_shards(out, rows, SHARD_BYTES, _Weights(gate, hidden, decoder, spec.seed).fill)
    (out / "config.json").write_text(json.dumps(dict(spec.config), indent=1))
    write_byte_tokenizer(out, decoder.vocab_size)
    return needed


class _Weights:
    """Fills tensors by their published names, in the order in which they are written."""

    def __init__(self, gate: GateShape, hidden: HiddenShape, decoder: DecoderShape, seed: int) -> None:
        self._gate, self._hidden, self._decoder = gate, hidden, decoder
        self._torch = torch.Generator().manual_seed(seed)
        self._numpy = np.random.default_rng(seed)

    def fill(self, out: BinaryIO, row: Row) -> None:
        name, _, shape, _ = row
        if name.endswith("embed_tokens.weight"):
            self._fill_rows(out, shape[0], embedding_rows)
        elif name == "lm_head.weight":
            self._fill_rows(out, shape[0], head_rows)
        elif name.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight")):
            _write(out, gate_matrix(self._gate, self._hidden, self._decoder.num_experts, self._torch))
        elif len(shape) == 1:
            value = 0.0 if name.endswith("bias") else 1.0
            _write(out, torch.full(shape, value))
        else:
            gain = OUTPUT_GAIN if shape[-2] == self._decoder.hidden_size and "_proj" in name else 1.0
            write_random(out, self._numpy, math.prod(shape), gain * shape[-1] ** -0.5)

    def _fill_rows(
        self,
        out: BinaryIO,
        num_rows: int,
        make: Callable[[int, int, HiddenShape, torch.Generator], Tensor],
    ) -> None:
        step = max(1, PIECE_ELEMENTS // self._hidden.width)
        for first in range(0, num_rows, step):
            _write(out, make(first, min(step, num_rows - first), self._hidden, self._torch))


def _write(out: BinaryIO, values: Tensor) -> None:
    out.write(values.to(torch.bfloat16).view(torch.int16).numpy().data)


def _rows(component: ComponentLayout, decoder: DecoderShape, *, is_stacked: bool) -> list[Row]:
    """In the order in which models are saved: the backbone, then experts layer by layer."""
    shapes = {_published(component, name): shape for name, shape in component.backbone_shapes.items()}
    width, expert_width, experts = decoder.hidden_size, decoder.expert_width, decoder.num_experts
    projections = {role: projection for projection, role in component.role_of.items()}
    for layer in sorted(decoder.moe_layers):
        prefix = f"layers.{layer}.mlp.experts"
        if is_stacked:
            shapes[f"model.{prefix}.gate_up_proj"] = (experts, 2 * expert_width, width)
            shapes[f"model.{prefix}.down_proj"] = (experts, width, expert_width)
            continue
        for expert in range(experts):
            for role in ROLES:
                name = f"{prefix}.{expert}.{projections[role]}.weight"
                shapes[_published(component, name)] = decoder.expert_shape(role)
    return [(name, "BF16", shape, 2 * math.prod(shape)) for name, shape in shapes.items()]


def _published(component: ComponentLayout, canonical: str) -> str:
    for published, ours in component.renames:
        canonical = canonical.replace(ours, published)
    return canonical if canonical.startswith("lm_head.") else f"model.{canonical}"


def _existing(path: Path) -> Path:
    """The path, or its nearest ancestor that is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def main() -> None:
    options = _parser().parse_args()
    skew, locality = NEAR_UNIFORM if options.near_uniform else (options.skew, options.locality)
    config = dict(PUBLISHED[options.family]) | {"num_hidden_layers": options.layers}
    if options.vocab_size is not None:
        config["vocab_size"] = options.vocab_size
    config |= {"bos_token_id": None, "pad_token_id": None, "eos_token_id": config["vocab_size"] - 1}
    spec = SliceSpec(config, skew, locality, options.seed, options.stacked)
    try:
        nbytes = write_slice(spec, options.out)
    except (DiskTooSmall, RoutingUnreachable) as error:
        sys.exit(str(error))
    except FileExistsError:
        sys.exit(f"{options.out}: is there already")
    print(f"wrote {nbytes / 1e9:.2f} GB to {options.out}; running it to see how it routes ...", flush=True)
    with tempfile.TemporaryDirectory(prefix="slice-") as folder:
        extract(options.out, Path(folder) / "store", index_only=True)
        layers = probe_routing(Path(folder) / "store", options.probe_tokens)
    for layer, facts in sorted(layers.items()):
        print(f"layer {layer:3}: skew {facts.skew:.3f}, locality {facts.locality:.3f}")
    facts_json = {
        "family": options.family,
        "asked": {"skew": skew, "locality": locality},
        "seed": options.seed,
        "layers": {layer: vars(facts) for layer, facts in sorted(layers.items())},
    }
    (options.out / "slice.json").write_text(json.dumps(facts_json, indent=1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=sorted(PUBLISHED), default="qwen3_moe")
    parser.add_argument("--layers", type=_at_least(1), default=4)
    parser.add_argument("--skew", type=_share, default=0.75, help="at least 0.5, which is uniform")
    parser.add_argument("--locality", type=_share, default=0.3)
    parser.add_argument(
        "--near-uniform", action="store_true", help="skew {}, locality {}".format(*NEAR_UNIFORM)
    )
    parser.add_argument("--vocab-size", type=_at_least(257), help="default: the published one")
    parser.add_argument("--stacked", action="store_true", help="each layer's experts in two tensors")
    parser.add_argument("--seed", type=_at_least(0), default=0)
    parser.add_argument("--probe-tokens", type=_at_least(2), default=1024)
    return parser


def _at_least(lowest: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is below {lowest}")
        return value

    return whole


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


if __name__ == "__main__":
    main()
