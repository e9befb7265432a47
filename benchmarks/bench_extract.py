"""Does extraction keep up with copying? Against `cp`, fsync and SHA-256 of the same bytes, alternating in one run.

The checkpoint is generated: random bfloat16 at Qwen3-30B-A3B's width, in shards whose boundaries fall inside experts.
Also: how long an index of 6,144 experts takes (sparse shards), and how much memory the command needs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from benchmarks.checkpoint_writer import Row, write_shards
from benchmarks.random_store import QWEN3_30B_A3B
from benchmarks.report import finish, spread
from extraction.extract import extract
from extraction.layouts import layout_for
from extraction.manifest import ROLES
from extraction.verify import verify

COMMAND = "import gateway.cli; gateway.cli.main()"


def main() -> None:
    """Prints one JSON line; `--keep` keeps it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2, help="of 1.2 GB each")
    parser.add_argument("--shard-mb", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary one")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-extract-", dir=options.folder) as folder:
        root = Path(folder)
        results = _copying(root, options) | _indexing(root, options.rounds)
    config = {
        "layers": options.layers,
        "shard_mb": options.shard_mb,
        "rounds": options.rounds,
        "width": QWEN3_30B_A3B["hidden_size"],
        "experts_per_layer": QWEN3_30B_A3B["num_experts"],
    }
    finish("bench_extract", config, results, is_kept=options.keep)


def _copying(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    source = root / "checkpoint"
    config = QWEN3_30B_A3B | {"num_hidden_layers": options.layers, "vocab_size": 8192}
    nbytes, straddling = write_checkpoint(source, config, options.shard_mb * 1_000_000, is_sparse=False)
    contenders: dict[str, Callable[[Path], object]] = {
        "cp_fsync_sha256": lambda dest: _copy_sync_hash(source, dest),
        "extract": lambda dest: extract(source, dest),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.rounds + 1):
        for name, run in contenders.items():
            took = _timed(run, root / "out")
            if number:  # The first round warms the page cache up.
                seconds[name].append(took)
    extract(source, root / "store")
    started = time.perf_counter()
    verify(root / "store", source)
    verified = time.perf_counter() - started
    shutil.rmtree(root / "store")
    peak, empty = _peak_rss(["extract", str(source), str(root / "out")]), _peak_rss(None)
    shutil.rmtree(root / "out")
    shutil.rmtree(source)
    ratios = [a / b for a, b in zip(seconds["cp_fsync_sha256"], seconds["extract"], strict=True)]
    return {
        "bytes": nbytes,
        "experts_in_two_shards": straddling,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "mb_per_s": {name: spread([nbytes / 1e6 / s for s in values]) for name, values in seconds.items()},
        "rate_against_cp": spread(ratios),
        "verify_seconds": verified,
        "peak_rss_mb": {"command": peak / 1e6, "empty_process": empty / 1e6},
    }


def _indexing(root: Path, rounds: int) -> dict[str, Any]:
    """The command, started anew each time, over sparse shards of the whole model."""
    source = root / "sparse"
    nbytes, _ = write_checkpoint(source, QWEN3_30B_A3B, 4_000_000_000, is_sparse=True)

    def run(dest: Path) -> None:
        command = [sys.executable, "-c", COMMAND, "extract", str(source), str(dest), "--index-only"]
        subprocess.run(command, check=True, capture_output=True)

    seconds = [_timed(run, root / "out") for _ in range(rounds)]
    shutil.rmtree(source)
    num_experts = QWEN3_30B_A3B["num_hidden_layers"] * QWEN3_30B_A3B["num_experts"]
    return {"index_only": {"experts": num_experts, "bytes": nbytes, "seconds": spread(seconds)}}


def _timed(run: Callable[[Path], object], dest: Path) -> float:
    os.sync()  # What the contender before left dirty is not this one's work.
    started = time.perf_counter()
    run(dest)
    took = time.perf_counter() - started
    shutil.rmtree(dest)
    return took


def _copy_sync_hash(source: Path, dest: Path) -> list[str]:
    subprocess.run(["cp", "-r", str(source), str(dest)], check=True)
    digests = []
    for path in sorted(dest.iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests


def _peak_rss(arguments: list[str] | None) -> int:
    """Bytes of the command's process, or of a Python that does nothing."""
    script = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', *sys.argv[1:]], check=True, capture_output=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    child = ["pass"] if arguments is None else [COMMAND, *arguments]
    done = subprocess.run([sys.executable, "-c", script, *child], check=True, capture_output=True, text=True)
    return int(done.stdout)


def write_checkpoint(
    root: Path, config: dict[str, Any], shard_bytes: int, *, is_sparse: bool
) -> tuple[int, int]:
    """Shards of at most that size, cut between any two tensors. Returns bytes, and how many experts lie in two."""
    root.mkdir()
    random = np.random.default_rng(0)
    rows = _rows(config)

    def fill(out: BinaryIO, row: Row) -> None:
        if is_sparse:
            out.seek(row[3], os.SEEK_CUR)
        else:
            out.write(random.bytes(row[3]))

    weight_map = write_shards(root, rows, shard_bytes, fill)
    (root / "config.json").write_text(json.dumps(config))
    homes: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if ".experts." in name:
            homes.setdefault(name.rsplit(".", 2)[0], set()).add(file)
    return sum(row[3] for row in rows), sum(len(files) > 1 for files in homes.values())


def _rows(config: dict[str, Any]) -> list[Row]:
    """In the order in which models are saved: layer by layer."""
    (component,) = layout_for(config).components
    assert component.decoder is not None
    shapes: dict[str, tuple[int, ...]] = {
        name if name == "lm_head.weight" else f"model.{name}": shape
        for name, shape in component.backbone_shapes.items()
    }
    for key in sorted(component.experts):
        for role in ROLES:
            name = f"model.layers.{key.layer}.mlp.experts.{key.expert}.{role}_proj.weight"
            shapes[name] = component.decoder.expert_shape(role)
    return [(name, "BF16", shape, 2 * math.prod(shape)) for name, shape in shapes.items()]


if __name__ == "__main__":
    main()
