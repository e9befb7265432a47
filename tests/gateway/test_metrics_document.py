"""docs/metrics.md names every metric that the code has, with its type, labels and meaning, and no other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from experts.call_times import LatencySummary
from experts.device_tier import TierStats
from experts.directory import DirectoryStats
from experts.trust import ASPECTS
from gateway.http.metrics import GatewayMetrics
from gateway.routers.metrics import PoolCounts, render_pool
from gateway.service.capacity_metrics import render_capacity
from gateway.service.cluster_metrics import render_cluster
from router.media.encoder import EncoderStats
from router.metrics import render_metrics
from router.speech.speech_thread import SpeechStatus

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "metrics.md"
ALWAYS = {"le"}
"""Labels of Prometheus's own making."""


def _router_text() -> str:
    """Of a router that has everything there is to tell: a budget, trust, actors that answered."""
    worker = SimpleNamespace(
        budget_bytes=1,
        resident_bytes=1,
        num_resident=1,
        stats=SimpleNamespace(
            experts_used=set(),
            hits=1,
            misses=1,
            hit_rates={"lfu": 0.5},
            bytes_read=1,
            prefetched=0,
            prefetched_used=0,
            behind=TierStats(1, 1, 1, 1, 1),
        ),
    )
    stats = SimpleNamespace(
        steps=1, prompt_tokens=1, generated_tokens=1, preemptions=0, failed=0, phase_seconds={"plan": 0.1}
    )
    engine = SimpleNamespace(
        stats=stats,
        pool=SimpleNamespace(nbytes=2),
        allocator=SimpleNamespace(num_blocks=1, num_used=0, prefixes=SimpleNamespace(num_evicted=0)),
        kv=SimpleNamespace(block_bytes=2, prefix_bytes=0, num_hit_positions=0),
        num_running=0,
        num_waiting=0,
        backbone=SimpleNamespace(nbytes=1),
    )
    told = DirectoryStats(0, 0, 0.0, 0, latencies={"experts-0": LatencySummary(1, 0.1, 0.2)})
    trust = {"experts_observed": 1, "tokens": 1, "means": dict.fromkeys(ASPECTS, 0.5)}
    loaded = SimpleNamespace(
        engine=engine,
        worker=worker,
        directory=SimpleNamespace(stats=lambda: told),
        trust=SimpleNamespace(status=lambda: trust),
        media=SimpleNamespace(stats=EncoderStats()),
    )
    speech = SpeechStatus(True, 1, 1, 0, 1, 1, 0, {"talker": 0.1})
    service: Any = SimpleNamespace(loaded=loaded, engine_thread=SimpleNamespace(speech=speech))
    return render_metrics(service, [])


def _registered() -> dict[str, Metric]:
    gateway = GatewayMetrics()
    gateway.requests.labels("/v1/models", "200").inc()
    cluster = render_cluster({"actors": [{"state": "ready"}], "pending": []})
    pool = render_pool(PoolCounts([0], [True], 0, 0))
    router = _router_text() + cluster + render_capacity("rest", 0, 0) + pool
    return {family.name: family for family in text_string_to_metric_families(gateway.render(router))}


def _row(family: Metric) -> str:
    """As the document has it, with the name that a query uses."""
    suffix = "_total" if family.type == "counter" else ""
    labels = sorted({label for sample in family.samples for label in sample.labels} - ALWAYS)
    shown = ", ".join(f"`{label}`" for label in labels)
    return f"| `{family.name}{suffix}` | {family.type} | {shown} | {family.documentation} |"


def _is_created(name: str) -> bool:
    """When a counter began: prometheus_client adds it to its own counters."""
    return name.endswith("_created")


def test_table_has_every_metric_of_the_code_and_no_other() -> None:
    expected = [_row(family) for name, family in sorted(_registered().items()) if not _is_created(name)]
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("| `sage_moe_")] == expected


def test_every_label_is_said_to_be_bounded() -> None:
    samples = [sample for family in _registered().values() for sample in family.samples]
    labels = {label for sample in samples for label in sample.labels} - ALWAYS | {"router"}
    lines = DOCUMENT.read_text(encoding="utf-8").split("## Labels")[1].splitlines()
    explained = {line.split("`")[1] for line in lines if line.startswith("| `")}
    assert explained == labels
