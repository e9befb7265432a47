"""What the supervisor tells, as metrics."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from gateway.service.cluster_metrics import STATES, render_cluster


def test_actors_are_counted_by_state_and_what_waits_apart() -> None:
    actors = [{"state": state} for state in ("ready", "ready", "starting", "waiting")]
    text = render_cluster({"actors": actors, "pending": [{"name": "experts-1"}]})
    families = {family.name: family for family in text_string_to_metric_families(text)}
    counts = {s.labels["state"]: s.value for s in families["sage_moe_expert_actors"].samples}
    assert {state: count for state, count in counts.items() if count} == {
        "ready": 2,
        "starting": 1,
        "waiting": 1,
    }
    assert counts.keys() == set(STATES)
    assert families["sage_moe_expert_actors_pending"].samples[0].value == 1


def test_service_without_a_supervisor_has_none() -> None:
    assert render_cluster({}) == ""
