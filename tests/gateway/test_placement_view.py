"""What `serve` prints of a placement."""

from __future__ import annotations

from rich.console import Console

from cluster.disk_copies import disk_nodes, plan_disk_copies
from cluster.memory_plan import MemoryPlan
from cluster.node_report import ExpertShape, StoreQuestion
from cluster.node_rooms import RoomRules
from cluster.placement import PlacementOptions, place
from cluster.service_spec import Placing
from cluster.topology import Topology
from experts.budget import ExpertBytes
from gateway.service.placement_view import placement_json, placement_lines, render_placement
from gateway.service.placing import Placed
from tests.cluster.clusters import cluster, even_demand, node


def _placed(topology: Topology, **refused: str) -> Placed:
    demand = even_demand(2, 8, 2)
    options = PlacementOptions()
    plan = place(topology, demand, None, options)
    question = StoreQuestion("/store", "hash", ExpertShape(), ())
    rules = RoomRules(ExpertBytes(16_000, 1000), 0, 0)
    return Placed(
        plan,
        Placing(topology, demand, options, rules, question),
        MemoryPlan("a", 1, 1, 0, 1, ()),
        {each.node_id: f"host-{each.node_id}" for each in topology.nodes} | {"z": "host-z\x1b"},
        refused,
        plan_disk_copies(demand.sizes, disk_nodes(plan, topology, {})),
        "nothing",
    )


def test_every_machine_and_actor_is_in_the_table() -> None:
    placed = _placed(cluster(node("a", 0, has_store=True), node("b", 16, disk=20), node("c", 16, disk=20)))
    console = Console(width=120, highlight=False)
    with console.capture() as captured:
        console.print(render_placement(placed))
    text = captured.get()
    assert all(f"host-{name}" in text for name in "abc")
    assert text.count("(replica)") == 2
    assert "fetches" in text
    assert "failover" not in text


def test_machine_that_holds_nothing_is_named_with_the_reason_and_made_safe() -> None:
    placed = _placed(cluster(node("a", 16, has_store=True)), z="it does not have the store")
    assert any(
        line.startswith("note: host-z") and "holds nothing: it does not have the store" in line
        for line in placement_lines(placed)
    )
    assert "\x1b" not in "".join(placement_lines(placed))


def test_experts_with_one_copy_are_counted_and_named() -> None:
    placed = _placed(cluster(node("a", 16, has_store=True)))
    (line,) = (line for line in placement_lines(placed) if "failover" in line)
    assert line == "not failover-safe: 16 experts on one disk only: model/0: 0-7; model/1: 0-7"
    told = placement_json(placed)
    assert told["single_copies"] == {"model/0": list(range(8)), "model/1": list(range(8))}
    assert not told["is_failover_safe"]
    assert told["router_experts"] == told["single_copies"]
