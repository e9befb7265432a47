"""The router's Prometheus metrics, collected from its own counters when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from experts.directory import DirectoryStats
from router.service import RouterService

PREFIX = "sage_moe_"


def render_metrics(service: RouterService, actors: Iterable[Mapping[str, Any]], name: str = "router") -> str:
    """Prometheus text. actors: one mapping an expert actor, as its `status` gives it. name: of the router."""
    registry = CollectorRegistry()
    registry.register(_Collector(service, [local_actor(service, name), *actors]))
    return generate_latest(registry).decode()


class _Collector:
    """Turns counters into metric families once; prometheus_client calls `collect`."""

    def __init__(self, service: RouterService, actors: list[Mapping[str, Any]]) -> None:
        """actors: the router's own experts first."""
        self._service, self._actors = service, actors

    def collect(self) -> Iterable[Metric]:
        yield from self._engine()
        yield from self._experts()
        yield from self._trust()
        yield from self._media()
        yield from self._speech()

    def _engine(self) -> Iterable[Metric]:
        engine = self._service.loaded.engine
        stats = engine.stats
        block_bytes = engine.kv.block_bytes
        yield _gauge("requests_running", "Sequences in the batch.", engine.num_running)
        yield _gauge("requests_waiting", "Sequences in the queue.", engine.num_waiting)
        yield _gauge("kv_used_bytes", "KV cache in use.", engine.allocator.num_used * block_bytes)
        yield _gauge("kv_total_bytes", "KV cache.", engine.pool.nbytes)
        yield _gauge("prefix_cache_bytes", "KV cache kept for prefixes, unused.", engine.kv.prefix_bytes)
        yield _counter("prefix_cache_hit_tokens", "Tokens found computed.", engine.kv.num_hit_positions)
        yield _counter(
            "prefix_cache_evicted_blocks",
            "KV blocks of prefixes that were taken for others.",
            engine.allocator.prefixes.num_evicted,
        )
        yield _gauge("backbone_bytes", "Weights of the backbone.", engine.backbone.nbytes)
        yield _counter("steps", "Steps of the engine.", stats.steps)
        yield _counter("engine_prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens)
        yield _counter("engine_generated_tokens", "Tokens generated.", stats.generated_tokens)
        yield _counter("preemptions", "Sequences whose KV blocks were taken.", stats.preemptions)
        yield _counter("requests_failed", "Requests ended by an error in the engine.", stats.failed)
        phases = CounterMetricFamily(
            PREFIX + "phase_seconds", "Time of the engine's steps by phase.", labels=["phase"]
        )
        for phase, seconds in stats.phase_seconds.items():
            phases.add_metric([phase], seconds)
        yield phases

    def _experts(self) -> Iterable[Metric]:
        way = self._service.loaded.directory.stats()
        yield _counter("expert_local_rows", "Expert rows computed in the router.", way.local_rows)
        yield _counter("expert_remote_rows", "Expert rows computed by actors.", way.remote_rows)
        yield _counter("hop_seconds", "Time spent waiting for actors.", way.hop_seconds)
        yield from _trouble(way)
        labels = ["actor", "node", "tier"]
        resident = GaugeMetricFamily(PREFIX + "resident_bytes", "Expert bytes held.", labels=labels)
        rates = GaugeMetricFamily(
            PREFIX + "expert_hit_ratio",
            "Share of expert uses that are hits with the eviction in use, and would be with others.",
            labels=["actor", "node", "eviction"],
        )
        budget = GaugeMetricFamily(
            PREFIX + "budget_bytes", "Expert bytes that may be held; absent without bound.", labels=labels
        )
        counters = {
            key: CounterMetricFamily(PREFIX + name, text, labels=labels[:2])
            for key, name, text in (
                ("hits", "expert_hits", "Experts that were resident when needed."),
                ("misses", "expert_misses", "Experts that had to be read."),
                ("bytes_read", "expert_read_bytes", "Bytes of experts read."),
                ("prefetched", "experts_prefetched", "Experts read by a guess, before they were needed."),
                ("prefetched_used", "experts_prefetched_used", "Of these, those that were then needed."),
            )
        }
        for actor in self._actors:
            name, node = str(actor["name"]), str(actor.get("node", ""))
            resident.add_metric([name, node, "resident"], actor.get("resident_bytes", 0))
            behind = actor.get("behind") or {}
            for gauge, key in ((resident, "resident_bytes"), (budget, "budget_bytes")):
                if behind.get(key) is not None:
                    gauge.add_metric([name, node, "host"], behind[key])
            for eviction, rate in actor.get("hit_rates", {}).items():
                rates.add_metric([name, node, eviction], rate)
            if actor.get("budget_bytes") is not None:
                budget.add_metric([name, node, "resident"], actor["budget_bytes"])
            for key, family in counters.items():
                family.add_metric([name, node], actor.get(key, 0))
        yield resident
        yield from (gauge for gauge in (budget, rates) if gauge.samples)
        yield from counters.values()

    def _trust(self) -> Iterable[Metric]:
        """As the router knows it; nothing where nobody learns it."""
        trust = self._service.loaded.trust
        if trust is None:
            return
        status = trust.status()
        yield _gauge("trust_experts", "Experts that trust has observed.", status["experts_observed"])
        yield _counter("trust_tokens", "Tokens that trust has seen.", status["tokens"])
        means = GaugeMetricFamily(
            PREFIX + "trust_mean", "Mean score of the experts observed, by aspect.", labels=["aspect"]
        )
        for aspect, mean in status["means"].items():
            means.add_metric([aspect], mean)
        if means.samples:
            yield means

    def _media(self) -> Iterable[Metric]:
        """Nothing where no images and no sound are taken."""
        encoder = self._service.loaded.media
        if encoder is None:
            return
        stats = encoder.stats
        yield _gauge(
            "media_bytes", "What sees and hears, and what it made last.", stats.tower_bytes + stats.kept_bytes
        )
        yield _counter("media_encoded", "Images and sounds encoded.", stats.encoded)
        yield _counter("media_found", "Images and sounds found encoded.", stats.found)
        yield _counter("media_encoding_seconds", "Time spent encoding them.", stats.seconds)

    def _speech(self) -> Iterable[Metric]:
        """Nothing where replies are not spoken."""
        status = self._service.engine_thread.speech
        if status is None:
            return
        yield _gauge("speech_bytes", "What speaks, once it was asked for.", status.resident_bytes)
        yield _gauge("speech_running", "Speeches that get frames.", status.running)
        yield _gauge("speech_waiting", "Speeches that wait for that.", status.waiting)
        yield _counter("speech_frames", "Frames of codes drawn.", status.frames)
        yield _counter("speech_samples", "Samples made of them.", status.samples)
        yield _counter("speech_failed", "Speeches ended by an error.", status.failed)
        phases = CounterMetricFamily(
            PREFIX + "speech_seconds", "Time of speaking by phase.", labels=["phase"]
        )
        for phase, seconds in status.seconds.items():
            phases.add_metric([phase], seconds)
        yield phases


def _trouble(way: DirectoryStats) -> Iterable[Metric]:
    """What went wrong on the way to the experts, and what is done to find out."""
    failovers = CounterMetricFamily(
        PREFIX + "failovers", "Calls that an actor did not answer, computed elsewhere.", labels=["kind"]
    )
    for kind, count in way.failovers_by_kind.items():
        failovers.add_metric([kind], count)
    yield failovers
    yield _counter("expert_foreign_rows", "Expert rows of another numerics class.", way.foreign_rows)
    audits = CounterMetricFamily(
        PREFIX + "audits", "Answers computed again elsewhere, by what came out.", labels=["outcome"]
    )
    audits.add_metric(["agreed"], way.audits.done - way.audits.disagreed)
    audits.add_metric(["disagreed"], way.audits.disagreed)
    yield audits
    yield _gauge("audits_owed", "Audits that are due but not done for want of time.", way.audits.owed)
    yield _counter("actors_quarantined", "Lives of actors that gave wrong rows.", way.num_quarantined)
    latencies = GaugeMetricFamily(
        PREFIX + "actor_latency_seconds",
        "Of an actor's latest answers, from the call to the last row.",
        labels=["actor", "quantile"],
    )
    for name, latency in way.latencies.items():
        latencies.add_metric([name, "0.5"], latency.p50_s)
        latencies.add_metric([name, "0.99"], latency.p99_s)
    if latencies.samples:
        yield latencies


def local_actor(service: RouterService, name: str) -> dict[str, Any]:
    """The router's own experts, in the form of an expert actor's status."""
    worker = service.loaded.worker
    stats = worker.stats
    return {
        "name": name,
        "budget_bytes": worker.budget_bytes,
        "resident_bytes": worker.resident_bytes,
        "resident_experts": worker.num_resident,
        "experts_used": len(stats.experts_used),
        "hits": stats.hits,
        "misses": stats.misses,
        "hit_rates": stats.hit_rates,
        "bytes_read": stats.bytes_read,
        "prefetched": stats.prefetched,
        "prefetched_used": stats.prefetched_used,
        "behind": None if stats.behind is None else asdict(stats.behind),
    }


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, text, value=value)
