"""The router's Prometheus text, read by the official parser."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from experts.remote_directory import DirectoryOptions, RemoteDirectory
from experts.trust import ASPECTS, aspect_means
from router.loading import EngineOptions, LoadedEngine
from router.metrics import PREFIX, local_actor, render_metrics
from router.request import GenerationRequest, SamplingParams
from router.service import RouterService
from router.speech.wish import SAMPLES_OF_FRAME
from router.trust_options import TrustOptions
from tests.engines import open_engine, run_to_end, small_engine
from tests.expert_servers import PATIENT, SECRET, expert_servers
from tests.speech import GREEDY, asked, speech_request

ACTOR = {
    "name": "experts-0",
    "node": 'a "node"',
    "resident_bytes": 7,
    "budget_bytes": 11,
    "hits": 3,
    "misses": 2,
    "bytes_read": 9,
    "prefetched": 6,
    "prefetched_used": 5,
    "hit_rates": {"trust": 0.83, "lfu": 0.6},
}


@pytest.fixture(scope="module")
def loaded(tiny_store: Path) -> Iterator[LoadedEngine]:
    loaded = open_engine(tiny_store, EngineOptions(dtype="float32"))
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def families(loaded: LoadedEngine) -> dict[str, Metric]:
    """After one request of 5 prompt and 3 generated tokens."""
    engine = small_engine(loaded, 4)
    run_to_end(engine, [GenerationRequest("r", (1, 2, 3, 4, 5), SamplingParams(max_tokens=3))])

    async def render() -> str:
        service = RouterService(replace(loaded, engine=engine))
        try:
            return render_metrics(service, [ACTOR])
        finally:
            service.engine_thread.stop()

    text = asyncio.run(render())
    parsed = list(text_string_to_metric_families(text))
    assert len({family.name for family in parsed}) == len(parsed), "a family appears twice"
    return {family.name: family for family in parsed}


def _value(families: dict[str, Metric], name: str, **labels: str) -> float:
    samples = families[PREFIX + name].samples
    values = [sample.value for sample in samples if sample.labels == labels]
    assert len(values) == 1, samples
    return values[0]


def test_every_family_is_ours_explained_and_of_a_known_type(families: dict[str, Metric]) -> None:
    for name, family in families.items():
        assert name.startswith(PREFIX)
        assert family.documentation.endswith(".")
        assert family.type in ("counter", "gauge")
        assert family.samples
        for sample in family.samples:
            assert sample.name == name + ("_total" if family.type == "counter" else "")
            assert sample.value >= 0


def test_counts_are_those_of_the_work_done(families: dict[str, Metric], loaded: LoadedEngine) -> None:
    assert _value(families, "steps") == 3
    assert _value(families, "engine_prompt_tokens") == 5
    assert _value(families, "engine_generated_tokens") == 3
    assert _value(families, "requests_failed") == 0
    assert _value(families, "kv_used_bytes") == 0
    assert _value(families, "kv_total_bytes") == 5 * _block_bytes(loaded)
    assert _value(families, "backbone_bytes") == loaded.engine.backbone.nbytes
    # 5 + 2 computed positions, 2 experts each, in 2 of 3 layers.
    assert _value(families, "expert_local_rows") == 28
    assert _value(families, "expert_remote_rows") == 0


def _block_bytes(loaded: LoadedEngine) -> int:
    return loaded.engine.pool.nbytes // loaded.engine.allocator.num_blocks


def test_actors_and_the_routers_own_experts_have_one_line_each(families: dict[str, Metric]) -> None:
    where = {"actor": "experts-0", "node": 'a "node"'}
    assert _value(families, "resident_bytes", **where, tier="resident") == 7
    assert _value(families, "budget_bytes", **where, tier="resident") == 11
    assert _value(families, "expert_hits", **where) == 3
    assert _value(families, "expert_misses", **where) == 2
    assert _value(families, "expert_read_bytes", **where) == 9
    assert _value(families, "experts_prefetched", **where) == 6
    assert _value(families, "experts_prefetched_used", **where) == 5
    assert _value(families, "experts_prefetched", actor="router", node="") == 0
    assert _value(families, "expert_misses", actor="router", node="") > 0
    assert _value(families, "expert_hit_ratio", **where, eviction="trust") == 0.83
    assert _value(families, "expert_hit_ratio", **where, eviction="lfu") == 0.6


def test_evictions_are_compared_where_not_all_experts_fit(tiny_store: Path) -> None:
    record = 3 * 64 * 24 * 4
    loaded = open_engine(
        tiny_store, EngineOptions(dtype="float32", expert_budget_bytes=5 * record, eviction="lru")
    )
    run_to_end(small_engine(loaded, 4), [GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=9))])
    stats = loaded.worker.stats
    loaded.close()
    assert set(stats.hit_rates) == {"lfu", "lru", "trust"}
    assert stats.hit_rates["lru"] == stats.hits / (stats.hits + stats.misses)
    assert 0 < stats.hit_rates["lru"] < 1


def test_trust_is_told_by_aspect_where_it_is_learned(tiny_store: Path, tmp_path: Path) -> None:
    options = EngineOptions(dtype="float32", trust=TrustOptions(str(tmp_path), layers_a_look=1))
    loaded = open_engine(tiny_store, options)
    run_to_end(loaded.engine, [GenerationRequest("r", (1, 2, 3, 4, 5), SamplingParams(max_tokens=40))])
    assert loaded.trust is not None
    loaded.trust.collector.flush()

    async def render() -> str:
        service = RouterService(loaded)
        service.engine_thread.stop()
        return render_metrics(service, [])

    told = {family.name: family for family in text_string_to_metric_families(asyncio.run(render()))}
    table = loaded.trust.book.view()
    loaded.close()
    assert _value(told, "trust_experts") == table.counts_ALE.any(axis=0).sum() > 0
    assert _value(told, "trust_tokens") == table.num_tokens > 0
    means = {sample.labels["aspect"]: sample.value for sample in told[PREFIX + "trust_mean"].samples}
    assert means == pytest.approx(aspect_means(table, loaded.trust.book.settings))
    assert means.keys() <= set(ASPECTS)
    assert means


def test_speech_is_counted_where_replies_are_spoken(omni: LoadedEngine, families: dict[str, Metric]) -> None:
    sampling = replace(GREEDY, max_tokens=9)

    async def render() -> str:
        service = RouterService(replace(omni, engine=small_engine(omni, 4)))
        stream = service.events("g")
        await anext(stream)
        asked_for = speech_request(omni, asked(b"Hello?"), sampling=sampling)
        service.submit("g", asked_for)
        async for events in stream:
            if any(event.finish_reason for event in events):
                break
        await stream.aclose()
        assert not service.feedback.give(asked_for.request_id, 1.0), "a score counts once, for the text"
        try:
            return render_metrics(service, [])
        finally:
            service.engine_thread.stop()

    told = {family.name: family for family in text_string_to_metric_families(asyncio.run(render()))}
    assert _value(told, "speech_frames") == 9
    assert _value(told, "speech_samples") == 9 * SAMPLES_OF_FRAME - 555
    assert _value(told, "speech_running") == _value(told, "speech_failed") == 0
    assert _value(told, "speech_seconds", phase="sound") > 0
    assert _value(told, "speech_bytes") > 100_000
    assert not any(name.startswith(PREFIX + "speech") for name in families)


def test_trouble_with_actors_is_told_by_kind_even_before_there_was_any(families: dict[str, Metric]) -> None:
    kinds = {sample.labels["kind"]: sample.value for sample in families[PREFIX + "failovers"].samples}
    assert kinds == {"lost": 0, "late": 0, "silent": 0, "error": 0, "not finite": 0}
    assert (
        _value(families, "audits", outcome="agreed") == _value(families, "audits", outcome="disagreed") == 0
    )
    assert _value(families, "actors_quarantined") == _value(families, "expert_foreign_rows") == 0


def test_actors_latencies_and_audits_are_told(tiny_store: Path) -> None:
    with expert_servers(tiny_store, 1, "float32") as roster:
        options = DirectoryOptions(audit_share=1.0)
        loaded = open_engine(
            tiny_store,
            EngineOptions(dtype="float32"),
            lambda worker: RemoteDirectory(worker, roster, SECRET, limits=PATIENT, options=options),
        )
        run_to_end(loaded.engine, [GenerationRequest("r", (1, 2, 3), SamplingParams(max_tokens=3))])
        assert isinstance(loaded.directory, RemoteDirectory)
        loaded.directory.auditor.drain()

        async def render() -> str:
            service = RouterService(loaded)
            service.engine_thread.stop()
            return render_metrics(service, [])

        told = {family.name: family for family in text_string_to_metric_families(asyncio.run(render()))}
        loaded.close()
    median = _value(told, "actor_latency_seconds", actor="experts-0", quantile="0.5")
    assert 0 < median <= _value(told, "actor_latency_seconds", actor="experts-0", quantile="0.99")
    assert _value(told, "audits", outcome="agreed") > 0
    assert _value(told, "audits", outcome="disagreed") == 0


def test_phases_of_a_step_are_timed(families: dict[str, Metric]) -> None:
    phases = {sample.labels["phase"] for sample in families[PREFIX + "phase_seconds"].samples}
    assert phases == {"plan", "step", "attention", "experts", "head", "sampling"}


def test_local_experts_are_told_like_an_actors(loaded: LoadedEngine) -> None:
    async def status() -> dict[str, object]:
        service = RouterService(replace(loaded, engine=small_engine(loaded, 1)))
        service.engine_thread.stop()
        return local_actor(service, "router-1")

    told = asyncio.run(status())
    assert told["resident_bytes"] == loaded.worker.resident_bytes
    assert told["name"] == "router-1"


def test_prefixes_that_were_found_and_are_kept_are_told(tiny_store: Path) -> None:
    loaded = open_engine(tiny_store, EngineOptions(dtype="float32"))
    for name in ("a", "b"):
        run_to_end(loaded.engine, [GenerationRequest(name, tuple(range(100)), SamplingParams(max_tokens=2))])

    async def render() -> str:
        service = RouterService(loaded)
        try:
            return render_metrics(service, [])
        finally:
            service.engine_thread.stop()

    families = {family.name: family for family in text_string_to_metric_families(asyncio.run(render()))}
    loaded.close()
    assert _value(families, "prefix_cache_hit_tokens") == 64
    assert _value(families, "prefix_cache_bytes") == _block_bytes(loaded)
    assert _value(families, "prefix_cache_evicted_blocks") == 0
    assert _value(families, "kv_used_bytes") == 0
