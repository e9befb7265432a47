"""Prometheus text of several routers as one, and what their gateway counts. Pure but for the library's registry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from gateway.http.metrics import PREFIX


@dataclass(frozen=True)
class PoolCounts:
    """Of one gateway, its routers in order."""

    num_open: Sequence[int]
    is_up: Sequence[bool]
    num_resumed: int
    num_given_up: int


class _Families:
    """What `generate_latest` asks a registry's collector for."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def join_metrics(texts: Sequence[str | None]) -> str:
    """One text of all: every family once, every sample with its router's number as label `router`.

    texts: in the routers' order, None of those that do not answer. A sample with the label `actor` names its process
    already, and every router tells those of the expert actors that all share: the first is kept.
    """
    families: dict[str, Metric] = {}
    seen: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
    for index, text in enumerate(texts):
        for family in text_string_to_metric_families(text or ""):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                own = {} if "actor" in sample.labels else {"router": str(index)}
                labels = own | sample.labels
                key = (sample.name, tuple(sorted(labels.items())))
                if key not in seen:
                    seen.add(key)
                    whole.add_sample(sample.name, labels, sample.value)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(families.values()))
    return generate_latest(registry).decode()


def render_pool(counts: PoolCounts) -> str:
    """The gateway's view of its routers."""
    registry = CollectorRegistry()
    up = Gauge(PREFIX + "router_up", "1 where the router answers.", ["router"], registry=registry)
    num_open = Gauge(
        PREFIX + "router_open_requests",
        "Requests of this gateway that the router has.",
        ["router"],
        registry=registry,
    )
    for index, is_up in enumerate(counts.is_up):
        up.labels(str(index)).set(float(is_up))
        num_open.labels(str(index)).set(counts.num_open[index])
    for name, text, value in (
        ("requests_resumed", "Losses of a router that a request outlived.", counts.num_resumed),
        ("requests_not_resumed", "Requests that ended with the loss of a router.", counts.num_given_up),
    ):
        Counter(PREFIX + name, text, registry=registry).inc(value)
    return generate_latest(registry).decode()
