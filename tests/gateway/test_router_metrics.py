"""Metrics of several routers in one text."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from gateway.routers.metrics import PoolCounts, join_metrics, render_pool

TEXT = """# HELP sage_moe_steps_total Steps.
# TYPE sage_moe_steps_total counter
sage_moe_steps_total {steps}
# HELP sage_moe_resident_bytes Bytes.
# TYPE sage_moe_resident_bytes gauge
sage_moe_resident_bytes{{actor="{name}",node="",tier="resident"}} 5.0
sage_moe_resident_bytes{{actor="experts-0",node="n",tier="resident"}} 7.0
"""


def _samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples), "a sample comes twice"
    return found


def test_samples_say_of_which_router_they_are_and_shared_actors_are_counted_once() -> None:
    texts = [TEXT.format(steps=float(10 + i), name=f"router-{i}") for i in range(2)]
    joined = join_metrics([texts[0], None, texts[1]])
    assert joined.count("# TYPE sage_moe_steps_total counter") == 1
    samples = _samples(joined)
    assert samples["sage_moe_steps_total", frozenset({("router", "0")})] == 10.0
    assert samples["sage_moe_steps_total", frozenset({("router", "2")})] == 11.0
    resident = {
        dict(labels)["actor"]: value for (name, labels), value in samples.items() if name.endswith("_bytes")
    }
    assert resident == {"router-0": 5.0, "router-1": 5.0, "experts-0": 7.0}


def test_gateway_counts_its_routers_and_what_outlived_them() -> None:
    samples = _samples(render_pool(PoolCounts([2, 0], [True, False], 3, 1)))
    assert samples["sage_moe_router_open_requests", frozenset({("router", "0")})] == 2.0
    assert samples["sage_moe_router_up", frozenset({("router", "1")})] == 0.0
    assert samples["sage_moe_requests_resumed_total", frozenset()] == 3.0
    assert samples["sage_moe_requests_not_resumed_total", frozenset()] == 1.0
