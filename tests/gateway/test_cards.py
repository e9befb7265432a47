"""`serve` on a machine with made-up cards: what it plans for routers and expert actors, and what Ray is asked."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from cluster.demand import uniform_demand
from cluster.memory_plan import MemoryPlan, ProcessMemory
from cluster.model_sizes import measure_model
from cluster.node_report import Arithmetic, CardReport, ExpertShape, StoreQuestion
from cluster.node_rooms import RoomRules, facts_of
from cluster.placement import place
from cluster.plan import CardShare
from cluster.service_spec import ServiceSpec, actor_spec
from cluster.topology import Gpu, NodeFacts, Topology
from experts.budget import FIT, BudgetRequest, ExpertBytes
from experts.node_memory import NodeMemory
from extraction.manifest import ExpertKey
from gateway.cli import app
from gateway.errors import OptionInvalid
from gateway.service import memory as service_memory
from gateway.service import options as service_options
from gateway.service.layout import (
    Layout,
    engine_options,
    lay_out_here,
    plan_scaling,
    plan_service_threads,
    read_model,
)
from gateway.service.memory import SERVICE_BASE, this_node
from gateway.service.memory_view import render_memory
from gateway.service.options import ServiceOptions
from gateway.service.placing import _Model, _router_memory, _rules, _whole_memory
from router.footprint import Footprint
from router.loading import EngineOptions
from tests.cluster.machines import machine, node
from tests.router.configs import TINY

MIB = 1 << 20


def _with_cards(monkeypatch: pytest.MonkeyPatch, *free_mib: int) -> None:
    monkeypatch.setattr(service_options, "resolve_device", lambda word, option="device": torch.device(word))
    cards = tuple(NodeMemory(4 << 30, mib * MIB) for mib in free_mib)
    monkeypatch.setattr(service_memory, "read_cards", lambda: cards)


def _laid_out(options: ServiceOptions) -> tuple[Layout, EngineOptions]:
    config, dtype = read_model(options)
    threads = plan_service_threads(options, config)
    engine = engine_options(options, dtype, threads.router)
    return lay_out_here(options, engine, threads, this_node()), engine


def test_dry_run_tells_both_tiers_of_every_actor_on_a_card(
    stories_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_cards(monkeypatch, 3000, 2600)
    command = ["serve", str(stories_store), "--actors", "3", "--expert-device", "cuda", "--dry-run", "--json"]
    memory = json.loads(CliRunner().invoke(app, command).stdout)["memory"]
    rows = [(row["process"], row["tier"], row["node"]) for row in memory["processes"]]
    assert rows[0] == ("router", "resident", memory["node"])
    assert rows[1:3] == [("experts-0", "device", "cuda"), ("experts-0", "host", memory["node"])]
    assert len(rows) == 7
    assert all(0 < row["budget_bytes"] <= row["expert_bytes"] for row in memory["processes"][1:])


def test_table_with_both_tiers_fits_a_terminal_of_80_columns(
    stories_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_cards(monkeypatch, 3000)
    layout, _ = _laid_out(ServiceOptions(stories_store, "stories", num_actors=2, expert_device="cuda"))
    table = io.StringIO()
    held = {"experts-0": 5 * MIB, "experts-1": 7 * MIB}
    told = layout.memory.as_json()
    for row in told["processes"]:
        row["node"] = "worker-7" if row["tier"] != "device" else row["node"]
    Console(file=table, width=80).print(render_memory(told, held, {"experts-0": 3 * MIB}))
    lines = table.getvalue().splitlines()
    assert "…" not in table.getvalue() and max(map(len, lines)) <= 80
    of_first = [line.split() for line in lines if "experts-0" in line]
    assert [(words[1], words[-1]) for words in of_first] == [("device", "5.00"), ("host", "3.00")]


def test_actors_on_cards_get_shares_of_them_from_ray(
    stories_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_cards(monkeypatch, 3000, 2600)
    options = ServiceOptions(stories_store, "stories", num_actors=3, expert_device="cuda")
    layout, _ = _laid_out(options)
    share = layout.card_share
    assert share is not None and share.num_gpus == 0.5, "two on one card at most"
    assert {(actor.num_gpus, actor.host_budget_bytes) for actor in layout.plan.actors} == {
        (0.5, share.host_budget_bytes)
    }
    spec = ServiceSpec("store", "float32", 64, 24, layout.plan, 1, expert_device="cuda")
    told = actor_spec(spec, layout.plan, layout.plan.actors[0], "experts-0", 1)
    assert (told.device, told.host_budget_bytes) == ("cuda", share.host_budget_bytes)
    assert told.fingerprint() != replace(told, device="cpu").fingerprint(), "other bits"


def test_number_of_actors_follows_the_load_on_one_card(
    stories_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ServiceOptions(stories_store, "stories", num_actors=3, expert_device="cuda", actor_range=(0, 3))
    _with_cards(monkeypatch, 3000, 2600)
    with pytest.raises(OptionInvalid, match=r"^autoscale goes with one card, not 2"):
        _laid_out(options)
    _with_cards(monkeypatch, 2600)
    layout, engine = _laid_out(options)
    scaling = plan_scaling(options, engine, layout.card_share)
    assert scaling is not None and scaling.card_share == layout.card_share
    assert isinstance(scaling.card_share, CardShare) and scaling.card_share.num_gpus == 1 / 3


def test_a_machine_s_own_budget_is_that_of_its_cards(
    stories_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_cards(monkeypatch, 3000)
    budgets = {"localhost": BudgetRequest(num_bytes=6 * MIB)}
    layout, _ = _laid_out(
        ServiceOptions(stories_store, "stories", num_actors=2, expert_device="cuda", node_budgets=budgets)
    )
    assert layout.memory.actor_budgets == (3 * MIB, 3 * MIB)


def test_a_placed_actor_on_a_card_has_a_row_there_and_one_behind_it() -> None:
    keys = tuple(ExpertKey("model", 0, expert) for expert in range(6))
    here = NodeFacts("a", "10.0.0.1", 2000, 4, 1e9, float("inf"), 0.0, has_store=True)
    card = NodeFacts(
        "g",
        "10.0.0.2",
        4000,
        4,
        9e9,
        1e9,
        1e-6,
        has_store=True,
        gpus=(Gpu("one", 5000),),
        behind_bytes=2000,
    )
    demand = uniform_demand(dict.fromkeys(keys, 1000), 2, 16)
    topology = Topology((here, card), "a")
    plan = place(topology, demand)
    router = ProcessMemory("router", 1, 1, 1, 0, 1, 2000, 6000, "a")
    memory = MemoryPlan("a", 9000, 9000, 900, 2000, (router,))
    rules = RoomRules(ExpertBytes(6000, 1000), SERVICE_BASE.expert_actor + 7, 2000)
    whole = _whole_memory(memory, plan, demand, {"g": "gpu-box"}, rules)
    on_card = [actor for actor in plan.actors if actor.node_id == "g"]
    assert on_card and {(actor.num_gpus, actor.host_budget_bytes) for actor in on_card} == {(0.25, 500)}
    for actor in on_card:
        row = next(row for row in whole.processes if row.process == actor.name)
        assert (row.tier, row.node, row.budget_bytes) == ("device", "gpu-box", actor.budget_bytes)
        assert whole.host_budget(actor.name) == 500
    spec = ServiceSpec("store", "float32", 64, 24, plan, 1, expert_device="cuda")
    devices = {actor.name: actor_spec(spec, plan, actor, "x", 1).device for actor in plan.actors}
    assert devices == {actor.name: "cuda" if actor.node_id == "g" else "cpu" for actor in plan.actors}


GIB = 1 << 30
FOOTPRINT = Footprint(GIB // 2, GIB // 4, 0, GIB // 16, GIB // 64, ExpertBytes(40 * GIB, GIB // 64), 8)
MODEL = _Model(
    measure_model(TINY, torch.bfloat16),
    FOOTPRINT,
    ExpertBytes(20 * GIB, GIB // 128),
    StoreQuestion("/store", "", ExpertShape(), ()),
)
HERE = node("192.0.2.1", is_here=True, link=None, has_store=True)


def _placed_options(expert_device: str, *budgets: tuple[BudgetRequest, ...]) -> ServiceOptions:
    """budgets: of experts, and of hosts."""
    return ServiceOptions(
        Path("/store"),
        "model",
        ray_address="auto",
        is_placed=True,
        expert_device=expert_device,
        expert_budgets=budgets[0],
        host_budgets=budgets[1],
    )


@pytest.mark.parametrize("expert_device", ["cuda", "auto"])
def test_a_placed_router_on_a_cpu_has_of_the_host_s_budget_and_machines_with_cards_of_both(
    expert_device: str,
) -> None:
    card = CardReport(NodeMemory(40 * GIB, 39 * GIB), Arithmetic("cuda/class", "", 900e9))
    far, size = node(has_store=True, card=card), BudgetRequest(num_bytes=GIB)
    for budget, room in ((BudgetRequest(num_bytes=24 * GIB), 24 * GIB), (FIT, None)):
        options = _placed_options(expert_device, (budget,), (size,))
        memory = _router_memory(options, MODEL, HERE, has_others=True)
        assert [row.budget_bytes for row in memory.routers] == [GIB]
        facts = facts_of(far, replace(_rules(options, MODEL, memory), code=""))
        assert isinstance(facts, NodeFacts) and facts.behind_bytes == GIB
        assert facts.room_bytes == (room or facts.room_bytes) > GIB
    own = replace(options, node_budgets={"192.0.2.1": BudgetRequest(num_bytes=3 * GIB)})
    assert _router_memory(own, MODEL, HERE, has_others=True).budget_bytes == 3 * GIB


def test_a_placed_router_takes_what_fits_where_only_cards_have_a_budget() -> None:
    options = _placed_options("auto", (BudgetRequest(num_bytes=24 * GIB),), ())
    auto = _router_memory(options, MODEL, HERE, has_others=True).budget_bytes
    assert (
        auto
        == _router_memory(
            replace(options, expert_device="cpu", expert_budgets=(FIT,)), MODEL, HERE, has_others=True
        ).budget_bytes
    )
    small = node("192.0.2.1", is_here=True, machine=machine(memory=NodeMemory(16 * GIB, 14 * GIB)))
    rooms = [
        _router_memory(replace(options, expert_device=kind), MODEL, small, has_others=True).budget_bytes
        for kind in ("auto", "cuda")
    ]
    replica_bytes = SERVICE_BASE.expert_actor + FOOTPRINT.actor_buffer_bytes
    assert rooms[1] - rooms[0] == replica_bytes, "no replica comes to it where all are to be on cards"
