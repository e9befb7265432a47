"""What does a decode step take outside its arithmetic?

One engine in process, streams that decode, all experts in memory. Arithmetic is what a step cannot do without:
products with weights (projections, gates, experts, head), attention over the cache, norms and rotation; each is timed
where it is called, or by the call that computes a layer's half, and the timers' own time is measured and taken off. All
the rest of `Engine.step` is overhead:
planning, building the batch, choosing experts, dispatch and combine, the books of caches, writing and gathering keys
and values, sampling, events.

Usage: python -m benchmarks.bench_overhead [--store NAME] [--streams N ...] [--steps N] [--temperature T] [--keep]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any
from unittest import mock

import numpy as np

import experts.ffn
import router.backbone
import router.decoder_layer
from benchmarks.report import finish, spread
from experts.numerics import RowKernel
from experts.store import ExpertStore
from gateway.stores.source import resolve_store
from router.decoder_layer import LayerArithmetic
from router.loading import EngineOptions, LoadedEngine, load_engine
from router.native_head import NativeHead
from router.native_step import NativeStep
from router.request import GenerationRequest, SamplingParams

PROMPT_TOKENS = 64
GOAL_MS = 1.0
TIMED: tuple[tuple[Any, str], ...] = (
    (router.decoder_layer, "linear"),
    (router.decoder_layer, "attend"),
    (router.decoder_layer, "rotate"),
    (router.decoder_layer, "compute_segments"),
    (router.backbone, "linear"),
    (experts.ffn, "compute_segments"),
    (LayerArithmetic, "norm"),
    (RowKernel, "linear"),
    (NativeHead, "logits"),
)


OVERHEAD_PHASES = ("route", "sort", "combine")
"""Of a layer's half that is computed in one call."""


class Clock:
    """Time inside the outermost timed call, and in the arithmetic of layers that are computed in two calls."""

    def __init__(self) -> None:
        self.seconds, self.calls, self._depth = 0.0, 0, 0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            if self._depth:
                return call(*arguments, **named)
            self._depth = 1
            began = perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds += perf_counter() - began
                self.calls += 1
                self._depth = 0

        return timed

    def attended(self, step: NativeStep) -> None:
        """See `router.decoder_layer.LayerClock`. What tells of the phases takes time that is not taken off."""
        self.seconds += sum(step.attention_s.values())

    def mixed(self, layer: int, step: NativeStep) -> None:
        """See `router.decoder_layer.LayerClock`."""
        self.seconds += sum(s for phase, s in step.experts_s.items() if phase not in OVERHEAD_PHASES)


@contextmanager
def timed_arithmetic(arithmetic: LayerArithmetic) -> Iterator[Clock]:
    clock = Clock()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(arithmetic, "clock", clock))
        for owner, name in TIMED:
            stack.enter_context(mock.patch.object(owner, name, clock.around(getattr(owner, name))))
        yield clock


def timer_s() -> float:
    """What one timer adds to the time outside of what it times."""
    clock = Clock()
    call = clock.around(lambda: None)
    began = perf_counter()
    for _ in range(20_000):
        call()
    return (perf_counter() - began - clock.seconds) / 20_000


def measure(loaded: LoadedEngine, streams: int, steps: int, temperature: float) -> dict[str, Any]:
    engine = loaded.engine
    random = np.random.default_rng(5)
    for number in range(streams):
        prompt = tuple(random.integers(3, loaded.config.vocab_size, PROMPT_TOKENS).tolist())
        sampling = SamplingParams(max_tokens=steps + 64, temperature=temperature, seed=number)
        engine.submit(GenerationRequest(f"s{number}", prompt, sampling))
    while engine.stats.generated_tokens < streams or engine.num_running < streams:
        engine.step()
    for _ in range(16):
        engine.step()
    plain = [_step_s(engine.step) for _ in range(steps // 2)]
    own_s = timer_s()
    whole, outside = [], []
    with timed_arithmetic(engine.backbone.arithmetic) as clock:
        for _ in range(steps // 2):
            before_s, before = clock.seconds, clock.calls
            step_s = _step_s(engine.step)
            whole.append(step_s)
            outside.append(step_s - (clock.seconds - before_s) - (clock.calls - before) * own_s)
    for name in engine.open_requests():
        engine.cancel(name)
    return {
        "step_ms": spread([seconds * 1e3 for seconds in plain]),
        "outside_ms": spread([seconds * 1e3 for seconds in outside]),
        "outside_share": statistics.median(outside) / statistics.median(whole),
    }


def _step_s(step: Callable[[], Any]) -> float:
    began = perf_counter()
    step()
    return perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", default="stories", help="a store, a checkpoint, or a bundled model's name")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=400, help="of each number of streams")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--suffix", default="", help="of the kept result's name")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    store = ExpertStore.open(resolve_store(options.store, announce=print))
    loaded = load_engine(store, EngineOptions(kv_budget_bytes=256 << 20))
    loaded.worker.load_all()
    results = {}
    for streams in options.streams:
        found = measure(loaded, streams, options.steps, options.temperature)
        results[f"{streams} streams"] = found
        print(
            f"{streams:2} streams: step {found['step_ms']['median']:.2f} ms, outside arithmetic "
            f"{found['outside_ms']['median']:.2f} ms ({found['outside_ms']['p5']:.2f} to "
            f"{found['outside_ms']['p95']:.2f}; goal {GOAL_MS}), {found['outside_share']:.0%}"
        )
    config = {key: value for key, value in vars(options).items() if key not in ("keep", "suffix")}
    finish("bench_overhead" + options.suffix, config | {"goal_ms": GOAL_MS}, results, is_kept=options.keep)
    loaded.close()


if __name__ == "__main__":
    main()
