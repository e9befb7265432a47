"""A replayed run routes as its trace says: a native one gives the native run's bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from router.batcher import BatchLimits
from router.errors import RoutingMissing, TraceInvalid
from router.loading import EngineOptions, LoadedEngine
from router.mask import MaskPolicy
from router.replay import ReplayPolicy
from router.request import GenerationRequest, SamplingParams
from router.step_routing import RoutingPolicy
from router.trace import RoutingTrace
from router.trace_file import TraceFacts
from router.trace_reader import RoutingTable, read_trace
from tests.engines import Outcome, assert_same_bits, open_engine, run_to_end, small_engine

REQUESTS = [
    GenerationRequest(
        name, tuple(prompt), SamplingParams(max_tokens=6, temperature=0.0), num_prompt_logprobs=0
    )
    for name, prompt in (("a", b"There was a miller"), ("b", b"Once"), ("c", b"In the wood there stood"))
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replay_of_a_native_run_has_its_bits(stories_store: Path, tmp_path: Path, dtype: str) -> None:
    loaded = open_engine(stories_store, EngineOptions(dtype=dtype))
    native, table = _traced(loaded, tmp_path, REQUESTS)
    policy = ReplayPolicy(table, loaded.config, "trace")
    assert_same_bits(_run(loaded, policy, REQUESTS), native)
    loaded.close()


def test_replay_matches_requests_by_order_and_needs_no_names(stories_store: Path, tmp_path: Path) -> None:
    loaded = open_engine(stories_store, EngineOptions())
    native, table = _traced(loaded, tmp_path, REQUESTS)
    renamed = [replace(request, request_id=f"other-{request.request_id}") for request in REQUESTS]
    outcome = _run(loaded, ReplayPolicy(table, loaded.config, "trace"), renamed)
    assert {f"other-{name}": tokens for name, tokens in native.tokens.items()} == outcome.tokens
    loaded.close()


def test_replay_in_other_chunks_and_with_preemptions_has_the_same_bits(
    stories_store: Path, tmp_path: Path
) -> None:
    loaded = open_engine(stories_store, EngineOptions())
    native, table = _traced(loaded, tmp_path, REQUESTS)
    engine = small_engine(loaded, 3, BatchLimits(max_batch_tokens=5, admission_reserve=0))
    engine.policy = ReplayPolicy(table, loaded.config, "trace")
    assert_same_bits(run_to_end(engine, REQUESTS), native)
    loaded.close()


def test_replayed_routing_is_the_trace_s_and_not_the_gate_s(stories_store: Path, tmp_path: Path) -> None:
    loaded = open_engine(stories_store, EngineOptions())
    native = run_to_end(loaded.engine, REQUESTS)
    masked, table = _traced(loaded, tmp_path, REQUESTS, MaskPolicy({0: frozenset(range(40))}, loaded.config))
    assert masked.tokens != native.tokens
    assert_same_bits(_run(loaded, ReplayPolicy(table, loaded.config, "trace"), REQUESTS), masked)
    loaded.close()


def test_token_that_the_trace_has_not_ends_the_run(stories_store: Path, tmp_path: Path) -> None:
    loaded = open_engine(stories_store, EngineOptions())
    _, table = _traced(loaded, tmp_path, REQUESTS[:1])
    longer = replace(REQUESTS[0], sampling=SamplingParams(max_tokens=7, temperature=0.0))
    with pytest.raises(RoutingMissing, match="position 23 of request 0 in layer 0"):
        _run(loaded, ReplayPolicy(table, loaded.config, "trace"), [longer])
    loaded.close()


def test_request_that_the_trace_has_not_ends_the_run(stories_store: Path, tmp_path: Path) -> None:
    loaded = open_engine(stories_store, EngineOptions())
    _, table = _traced(loaded, tmp_path, REQUESTS[:1])
    with pytest.raises(RoutingMissing, match="of request 1"):
        _run(loaded, ReplayPolicy(table, loaded.config, "trace"), REQUESTS)
    loaded.close()


def test_trace_of_another_model_is_refused(stories_store: Path, tiny_store: Path, tmp_path: Path) -> None:
    loaded = open_engine(stories_store, EngineOptions())
    _, table = _traced(loaded, tmp_path, REQUESTS[:1])
    loaded.close()
    other = open_engine(tiny_store, EngineOptions())
    with pytest.raises(TraceInvalid, match="6 layers of 64 experts"):
        ReplayPolicy(table, other.config, "trace")
    other.close()


def _traced(
    loaded: LoadedEngine,
    folder: Path,
    requests: Sequence[GenerationRequest],
    policy: RoutingPolicy | None = None,
) -> tuple[Outcome, RoutingTable]:
    config = loaded.config
    sizes = (config.num_layers, config.num_experts, config.experts_per_token)
    facts = TraceFacts("0" * 64, "model", "native", *sizes, "cpu/test", "1.0")
    trace = RoutingTrace.to_file(folder / "trace.parquet", facts)
    loaded.engine.watchers = (trace,)
    outcome = run_to_end(loaded.engine, requests) if policy is None else _run(loaded, policy, requests)
    loaded.engine.watchers = ()
    trace.close()
    return outcome, read_trace(folder / "trace.parquet")


def _run(loaded: LoadedEngine, policy: RoutingPolicy, requests: Sequence[GenerationRequest]) -> Outcome:
    before, loaded.engine.policy = loaded.engine.policy, policy
    try:
        return run_to_end(loaded.engine, requests)
    finally:
        loaded.engine.policy = before
