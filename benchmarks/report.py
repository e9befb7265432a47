"""What every benchmark prints and keeps: medians and spread, and with them the commit, versions and hardware."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TEXTS = Path(__file__).parent / "texts"
"""Public-domain books and WikiText-2's test set."""


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, 5th and 95th percentile, and how many samples there were: at least one."""
    cuts = statistics.quantiles(samples, n=20, method="inclusive") if len(samples) > 1 else samples
    return {"median": statistics.median(samples), "p5": cuts[0], "p95": cuts[-1], "samples": len(samples)}


def finish(name: str, config: dict[str, Any], results: dict[str, Any], *, is_kept: bool) -> None:
    """Print the last line, one JSON object; keep it under benchmarks/results/NAME.json where asked to."""
    record = {"benchmark": name, "config": config, "results": results, "environment": _environment()}
    if is_kept:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def _environment() -> dict[str, Any]:
    import torch

    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "ray", "numpy")},
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }


def _commit() -> str:
    """Short hash, with a plus sign where the checkout has changes."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
