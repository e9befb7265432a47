"""Budgets as commands take them: the same answer down to one expert, and refusals with both numbers."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.memory_plan import BaseMemory, MemoryPlan, Node
from experts.budget import FIT, BudgetRequest
from experts.errors import BudgetTooSmall
from experts.node_memory import NodeMemory
from experts.store import ExpertStore
from gateway.batch.job import BatchOptions, run_batch
from gateway.cli import app
from gateway.errors import OptionInvalid
from gateway.local.generate import generate
from gateway.service.memory import SERVICE_BASE, plan_engine, plan_service, this_node
from gateway.service.memory_view import render_memory
from router.loading import EngineOptions
from router.means_keeper import StandInOptions
from tests.simulated_device import DEVICE, simulated

EXPERT_BYTES = 73728
"""One expert of the bundled model in bfloat16."""
NUM_EXPERTS = 384
GENERATE = ("--prompt", "Once upon a time", "--max-tokens", "8", "--temperature", "0")


def _run(store: Path, *arguments: str) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["generate", str(store), *GENERATE, *arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout, result.stderr


def test_one_expert_s_memory_gives_the_tokens_of_all_and_fit_is_the_default(stories_store: Path) -> None:
    everything = json.loads(_run(stories_store, "--json")[0])
    shown, table = _run(stories_store, "--json", "--expert-budget", f"{EXPERT_BYTES}B")
    one = json.loads(shown)
    assert one["token_ids"] == everything["token_ids"]
    assert (one["expert_budget_bytes"], one["resident_bytes"]["experts"]) == (EXPERT_BYTES, EXPERT_BYTES)
    assert everything["expert_budget_bytes"] == NUM_EXPERTS * EXPERT_BYTES
    assert "Memory (MiB)" in table and "0.3%" in table


def test_budget_of_one_byte_less_is_refused_with_both_numbers(stories_store: Path) -> None:
    with pytest.raises(BudgetTooSmall) as caught:
        _run(stories_store, "--expert-budget", f"{EXPERT_BYTES - 1}B")
    assert str(caught.value) == "budget of 73727 bytes is below one expert (73728 bytes)"


def test_host_budget_is_the_same_memory_and_the_command_says_so(stories_store: Path) -> None:
    shown, notes = _run(stories_store, "--json", "--host-budget", "25%", "--expert-budget", "25%")
    assert json.loads(shown)["expert_budget_bytes"] == NUM_EXPERTS * EXPERT_BYTES // 2
    assert "--host-budget and --expert-budget are one budget" in notes


@pytest.mark.parametrize("command", [("chat",), ("batch",), ("generate",)])
def test_hostile_budget_is_refused_by_every_command(
    stories_store: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    more = {
        "chat": (),
        "batch": (str(tmp_path / "in.jsonl"), str(tmp_path / "out")),
        "generate": GENERATE,
    }[command[0]]
    result = CliRunner().invoke(app, [*command, str(stories_store), *more, "--expert-budget", "1e9GiB"])
    assert isinstance(result.exception, OptionInvalid)
    assert str(result.exception).startswith("--expert-budget must be a size")


def test_batch_below_one_expert_is_refused_before_anything_starts(
    stories_store: Path, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    options = BatchOptions(
        stories_store,
        "stories",
        tmp_path / "in.jsonl",
        tmp_path / "out",
        budgets=(BudgetRequest(num_bytes=1),),
    )
    with pytest.raises(BudgetTooSmall):
        run_batch(options, lambda spec, parts: pytest.fail("computed"))
    assert not (tmp_path / "out").exists()


def test_service_s_budget_is_divided_among_router_and_actors(stories_store: Path) -> None:
    store = ExpertStore.open(stories_store)
    node = Node("n1", ("10.0.0.8",), NodeMemory(1 << 34, 1 << 34))
    quarter = BudgetRequest(share=Fraction(1, 4))
    plan = plan_service(store, EngineOptions(), 3, (FIT,), {"10.0.0.8": quarter}, node)
    store.close()
    assert plan.budget_bytes == NUM_EXPERTS * EXPERT_BYTES // 4
    assert plan.router.budget_bytes + sum(plan.actor_budgets) == plan.budget_bytes
    assert len(plan.actor_budgets) == 3 and max(plan.actor_budgets) - min(plan.actor_budgets) <= 1
    assert plan.router.base_bytes == SERVICE_BASE.router


def test_node_s_own_budget_below_one_expert_names_the_node(stories_store: Path) -> None:
    store = ExpertStore.open(stories_store)
    node = Node("n1", ("10.0.0.8",), NodeMemory(1 << 34, 1 << 34))
    tiny = BudgetRequest(num_bytes=7)
    with pytest.raises(
        OptionInvalid, match=r"^node-budgets: 10\.0\.0\.8 budget of 7 bytes is below one expert"
    ):
        plan_service(store, EngineOptions(), 0, (FIT,), {"10.0.0.8": tiny}, node)
    with pytest.raises(BudgetTooSmall):
        plan_service(store, EngineOptions(), 0, (tiny,), {"n2": FIT}, node)
    store.close()


def test_fit_in_this_process_does_not_count_it_twice(stories_store: Path) -> None:
    store = ExpertStore.open(stories_store)
    options, plan = plan_engine(store, EngineOptions(), (FIT,))
    store.close()
    assert options.expert_budget_bytes == plan.budget_bytes <= NUM_EXPERTS * EXPERT_BYTES
    assert plan.router.base_bytes == BaseMemory(router=0).router
    assert "127.0.0.1" in this_node().aliases


def test_generation_on_a_device_divides_its_memory_and_the_host_s_behind_it(stories_store: Path) -> None:
    plans: list[MemoryPlan] = []
    sampling = {"max_tokens": 2, "temperature": 0.0}
    options = EngineOptions(dtype="float32", kv_budget_bytes=1 << 24)
    with simulated():
        found = generate(
            stories_store,
            "Once upon a time",
            sampling,
            replace(options, device=DEVICE),
            budgets=(BudgetRequest(share=Fraction(1, 4)),),
            host_budgets=(BudgetRequest(num_bytes=50 * EXPERT_BYTES),),
            on_plan=plans.append,
        )
    assert found.text == generate(stories_store, "Once upon a time", sampling, options).text
    held = found.resident_bytes
    assert 0 < held["experts"] <= NUM_EXPERTS * EXPERT_BYTES // 2 == found.expert_budget_bytes
    assert 0 < held["experts_behind"] <= 50 * EXPERT_BYTES
    assert [row["tier"] for row in plans[0].as_json()["processes"]] == ["device", "host"]
    table = io.StringIO()
    Console(file=table, width=80).print(render_memory(plans[0].as_json()))
    assert "host" in table.getvalue() and max(map(len, table.getvalue().splitlines())) <= 80


@pytest.mark.parametrize("has_stand_ins", [False, True])
def test_table_of_a_service_fits_a_terminal_of_80_columns(stories_store: Path, has_stand_ins: bool) -> None:
    store = ExpertStore.open(stories_store)
    node = Node("worker-7", (), NodeMemory(1 << 34, 1 << 34))
    options = EngineOptions(stand_ins=StandInOptions() if has_stand_ins else None)
    plan = plan_service(store, options, 2, (FIT,), {}, node).as_json()
    store.close()
    console = Console(width=80, highlight=False)
    with console.capture() as captured:
        console.print(render_memory(plan, {"experts-0": EXPERT_BYTES}))
    text = captured.get()
    assert "…" not in text
    assert ("stand-ins" in text) == has_stand_ins
    assert "worker-7 resident experts-0" in text and "0.07" in text
