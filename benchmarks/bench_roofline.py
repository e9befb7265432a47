"""How far is a decode step from what the memory allows, and where does its time go?

The engine decodes 1, 4, 16 and 64 streams of a slice. Each step's bytes are counted from what it really routed: the
backbone once, the union of its rows' experts, keys and values, the head. The bound is these bytes over the machine's
measured bandwidth; where many rows share a weight, the products' own rate is the other bound. Beside them the same
matrices as bare `F.linear` calls, step by step in turn. Per phase: its share of the time and the bandwidth it reached.

Usage: python -m benchmarks.bench_roofline [--model qwen3_moe] [--form bf16] [--streams 1 4 16 64] [--picture FILE]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.bare_linear import BareStep
from benchmarks.bench_peers import STREAM_PROMPT
from benchmarks.peer_models import BUNDLED, FORMS, PeerModel
from benchmarks.published import PUBLISHED
from benchmarks.read_bandwidth import Bandwidth, matmul_flops_per_s, read_bandwidth
from benchmarks.report import RESULTS, finish, spread
from benchmarks.roofline_picture import draw
from benchmarks.step_watch import PHASES, StepRecord, StepWatch
from experts.cores import num_cores
from experts.store import ExpertStore
from router.loading import EngineOptions, load_engine
from router.request import GenerationRequest, SamplingParams

STREAMS = (1, 4, 16, 64)
STEPS = 24
WARM_STEPS = 4
TURN_STEPS = 4
"""Steps of the engine before as many of bare products: fewer would chill the caches of both."""


def measure_streams(watch: StepWatch, model: PeerModel, count: int, seed: int) -> dict[str, Any]:
    """Decode steps of `count` streams, and the bare products of the same steps."""
    engine = watch.loaded.engine
    # While the last prompts are computed, the first streams go on.
    sampling = SamplingParams(max_tokens=STEPS + WARM_STEPS + count, temperature=0.0)
    for number, prompt in enumerate(model.prompts(count, STREAM_PROMPT, seed)):
        engine.submit(GenerationRequest(f"roofline-{count}-{number}", tuple(prompt), sampling))
    bare = BareStep(watch.loaded)
    steps: list[StepRecord] = []
    bare_s: list[float] = []
    warm = WARM_STEPS
    while engine.has_work:
        record, drawn = watch.step()
        if drawn < count or record.num_rows != count:
            continue  # prompts are still computed
        if warm:
            warm -= 1
            continue
        steps.append(record)
        if bare.is_possible and len(steps) % TURN_STEPS == 0:
            bare_s += [bare.seconds(step) for step in steps[-TURN_STEPS:]]
    return _figures(watch, steps, bare_s, count)


def _figures(
    watch: StepWatch, steps: Sequence[StepRecord], bare_s: list[float], count: int
) -> dict[str, Any]:
    seconds = {phase: median(step.seconds[phase] for step in steps) for phase in PHASES}
    bytes_by_phase = [watch.step_bytes(step) for step in steps]
    needed = {phase: median(one[phase] for one in bytes_by_phase) for phase in bytes_by_phase[0]}
    layers = len(watch.loaded.config.moe_layers)
    return {
        "step_ms": spread([1e3 * step.total_s for step in steps]),
        "tokens_per_s": count / median(step.total_s for step in steps),
        "phase_ms": {phase: 1e3 * value for phase, value in seconds.items()},
        "bytes": needed,
        "experts_per_layer": median(sum(map(len, step.experts.values())) / layers for step in steps),
        "phase_gb_per_s": {phase: needed[phase] / seconds[phase] / 1e9 for phase in needed},
        "bare_linear_ms": spread([1e3 * s for s in bare_s]) if len(bare_s) > 1 else None,
    }


def add_bounds(
    found: dict[int, dict[str, Any]], bandwidth: Bandwidth, flops_per_s: float, elements: dict[str, float]
) -> None:
    """Adds to each number of streams how far it is from the bounds. elements: of matrices that one row meets."""
    first = found.get(1)
    for count, figures in found.items():
        needed = sum(figures["bytes"].values())
        bytes_ms = 1e3 * needed / bandwidth.bytes_per_s
        flops_ms = 1e3 * 2 * count * sum(elements.values()) / flops_per_s
        step_ms = figures["step_ms"]["median"]
        figures["bound_ms"] = {"bytes": bytes_ms, "products": flops_ms}
        figures["of_bandwidth"] = bytes_ms / step_ms
        figures["of_bound"] = max(bytes_ms, flops_ms) / step_ms
        if first is not None:
            ideal = count * sum(first["bytes"].values()) / needed
            figures["of_ideal_scaling"] = figures["tokens_per_s"] / first["tokens_per_s"] / ideal


def row_elements(watch: StepWatch) -> dict[str, float]:
    """Elements of the matrices that one row is multiplied with, by phase."""
    config = watch.loaded.config
    matrices = config.backbone_matrices()
    experts = 3 * config.expert_width * config.hidden_size * config.experts_per_token
    return {
        "attention": float(sum(outputs * inputs for outputs, inputs in matrices)),
        "experts": float(experts * len(config.moe_layers)),
        "head": float(config.vocab_size * config.hidden_size),
    }


def main() -> None:
    options = _options()
    bandwidth = read_bandwidth(num_cores())
    print(f"memory: {bandwidth.bytes_per_s / 1e9:.1f} GB/s ({bandwidth.how})", flush=True)
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="roofline-")))
        folder.mkdir(parents=True, exist_ok=True)
        model = PeerModel(folder, options.model, options.layers, None, options.quick)
        loaded = load_engine(ExpertStore.open(model.store(options.form)), EngineOptions())
        stack.callback(loaded.close)
        loaded.worker.load_all()
        watch = StepWatch(loaded)
        found = {}
        for count in options.streams:
            found[count] = measure_streams(watch, model, count, seed=count)
            print(f"{count} streams: {found[count]['step_ms']['median']:.1f} ms", flush=True)
        flops_per_s = matmul_flops_per_s(torch.bfloat16)
        again = read_bandwidth(num_cores())
        best = max(bandwidth, again, key=lambda one: one.bytes_per_s)
        add_bounds(found, best, flops_per_s, row_elements(watch))
        numerics_class = loaded.numerics_class
    _show(found)
    config = {
        "model": model.name,
        "form": options.form,
        "steps": STEPS,
        "prompt": STREAM_PROMPT,
        "numerics_class": numerics_class,
        "bandwidth_gb_per_s": [bandwidth.bytes_per_s / 1e9, again.bytes_per_s / 1e9],
        "bandwidth_how": bandwidth.how,
        "matmul_gflop_per_s": flops_per_s / 1e9,
    }
    label = f"_{options.label}" if options.label else ""
    name = f"bench_roofline_{model.name}_{options.form}{label}".replace("-", "_")
    picture = options.picture or (RESULTS / f"{name}.png" if options.keep else None)
    if picture is not None:
        draw(found, best.bytes_per_s / 1e9, f"{model.name}, {options.form}", picture)
    finish(name, config, {str(count): figures for count, figures in found.items()}, is_kept=options.keep)


def _show(found: dict[int, dict[str, Any]]) -> None:
    for count, figures in found.items():
        print(
            f"{count:3} streams: {figures['step_ms']['median']:7.1f} ms, {figures['tokens_per_s']:6.1f} tokens/s, "
            f"{figures['of_bandwidth']:.2f} of bandwidth, {figures['of_bound']:.2f} of the bound, "
            f"{figures['experts_per_layer']:.0f} experts a layer"
        )
        bare = figures["bare_linear_ms"]
        if bare is not None:
            print(f"             bare F.linear {bare['median']:.1f} ms")
        for phase in PHASES:
            rate = figures["phase_gb_per_s"].get(phase)
            shown = f", {rate:.1f} GB/s" if rate is not None else ""
            print(f"             {phase:18} {figures['phase_ms'][phase]:7.2f} ms{shown}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[*sorted(PUBLISHED), BUNDLED], default="qwen3_moe")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--form", choices=sorted(FORMS), default="bf16")
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS))
    parser.add_argument("--quick", action="store_true", help="a tiny slice: does it run?")
    parser.add_argument("--folder", type=Path, help="where models stay; default: a temporary one")
    parser.add_argument("--picture", type=Path, help="needs the extra plot")
    parser.add_argument("--label", default="", help="added to the name of the kept result")
    parser.add_argument(
        "--keep", action="store_true", help="keep result and picture under benchmarks/results"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
