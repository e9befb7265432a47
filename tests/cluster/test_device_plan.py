"""Cards' memory and the host's behind them, divided between the processes of a machine."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.device_plan import PASSING_EXPERTS, Cards, Process, _even_part, plan_devices
from cluster.errors import NodeBudgetTooSmall, NodeTooSmall
from cluster.memory_plan import SPARE_PERCENT, BaseMemory, MemoryPlan, Node, ProcessMemory
from experts.budget import FIT, BudgetRequest, ExpertBytes
from experts.errors import BudgetTooSmall
from experts.node_memory import NodeMemory
from router.footprint import LIBRARY_BYTES, Footprint

MIB = 1 << 20
EXPERTS = ExpertBytes(total=4000 * MIB, largest=10 * MIB)
STORED = ExpertBytes(total=2000 * MIB, largest=5 * MIB)
FOOTPRINT = Footprint(
    backbone_bytes=500 * MIB,
    kv_bytes=300 * MIB,
    swap_bytes=200 * MIB,
    buffer_bytes=100 * MIB,
    actor_buffer_bytes=50 * MIB,
    experts=EXPERTS,
    experts_per_token=8,
)
BASE = BaseMemory(router=1000 * MIB, expert_actor=256 * MIB, others=400 * MIB, card=64 * MIB)


def _part(experts: ExpertBytes, number: int) -> ExpertBytes:
    return ExpertBytes(experts.total // number, experts.largest)


def _plan(
    *host: BudgetRequest,
    experts: BudgetRequest = FIT,
    device_mib: int = 2564,
    host_mib: int = 3000,
    num_actors: int = 0,
    num_cards: int = 1,
    is_router_on_card: bool = True,
    are_actors_on_cards: bool = True,
    num_routers: int = 1,
) -> MemoryPlan:
    card = Node("cuda:0", (), NodeMemory(10_000 * MIB, device_mib * MIB))
    node = Node("n1", (), NodeMemory(10_000 * MIB, host_mib * MIB))
    processes = [
        *(Process(f"router-{n}", True, is_router_on_card, EXPERTS, STORED) for n in range(num_routers)),
        *(
            Process(
                f"experts-{n}",
                False,
                are_actors_on_cards,
                _part(EXPERTS, num_actors),
                _part(STORED, num_actors),
            )
            for n in range(num_actors)
        ),
    ]
    return plan_devices(processes, (experts,), host, FOOTPRINT, Cards(card, num_cards), node, BASE)


def _held(row: ProcessMemory) -> int:
    return (
        row.base_bytes
        + row.backbone_bytes
        + row.kv_bytes
        + row.swap_bytes
        + row.buffer_bytes
        + row.budget_bytes
        + row.stand_in_bytes
        + row.media_bytes
        + row.speech_bytes
    )


def test_device_has_backbone_cache_and_buffers_and_the_host_what_is_swapped_out() -> None:
    plan = _plan()
    (behind,) = plan.behind
    assert plan.budget_bytes == plan.router.budget_bytes == (2500 - 500 - 300 - 100 - 1000) * MIB
    assert (plan.router.tier, plan.router.node, plan.router.swap_bytes) == ("device", "cuda:0", 0)
    assert behind.budget_bytes == (3000 - 1400 - 200 - 1000) * MIB - LIBRARY_BYTES
    assert (behind.tier, behind.node, behind.backbone_bytes) == ("host", "n1", 0)
    assert [row["tier"] for row in plan.as_json()["processes"]] == ["device", "host"]


def test_host_takes_no_more_than_the_store_has_and_little_where_the_device_holds_all() -> None:
    assert _plan(host_mib=9000).behind[0].budget_bytes == STORED.total
    plan = _plan(device_mib=9000, host_mib=9000)
    assert plan.budget_bytes == EXPERTS.total
    assert plan.behind[0].budget_bytes == PASSING_EXPERTS * STORED.largest


def test_what_is_asked_for_is_taken_at_its_word() -> None:
    half, size = BudgetRequest(share=Fraction(1, 2)), BudgetRequest(num_bytes=77 * MIB)
    plan = _plan(half, experts=size)
    assert (plan.budget_bytes, plan.behind[0].budget_bytes) == (77 * MIB, STORED.total // 2)


def test_no_room_is_refused_with_the_side_that_lacks_it() -> None:
    with pytest.raises(NodeTooSmall, match="on cuda:0"):
        _plan(device_mib=1000)
    with pytest.raises(NodeTooSmall, match="on n1"):
        _plan(host_mib=1000)
    with pytest.raises(BudgetTooSmall):
        _plan(BudgetRequest(num_bytes=7))
    with pytest.raises(NodeBudgetTooSmall, match="cuda:0"):
        _plan(experts=BudgetRequest(num_bytes=20 * MIB), num_actors=2, host_mib=9000)


def test_actors_on_a_card_share_it_and_routers_on_the_cpu_share_the_host_with_what_is_behind() -> None:
    plan = _plan(num_actors=2, is_router_on_card=False, host_mib=9000)
    assert plan.actor_budgets == ((2564 - 2 * 64 - 2 * 50 - 1000) * MIB // 2,) * 2
    assert [row.node for row in plan.processes] == ["n1", "cuda:0", "cuda:0"]
    assert [row.process for row in plan.behind] == ["experts-0", "experts-1"]
    assert plan.actor_host_budgets == (STORED.total // 2,) * 2, "all that they lack on the card"
    assert plan.host_budget("router-0") is None and plan.host_budget("experts-1") == STORED.total // 2
    assert plan.router.budget_bytes > EXPERTS.largest
    told = [(row["process"], row["tier"]) for row in plan.as_json()["processes"]]
    assert told == [
        ("router-0", "resident"),
        ("experts-0", "device"),
        ("experts-0", "host"),
        ("experts-1", "device"),
        ("experts-1", "host"),
    ]


def test_router_on_the_actors_card_keeps_a_token_s_experts_there() -> None:
    plan = _plan(num_actors=2, device_mib=4000, host_mib=9000)
    room = (4000 - 3 * 64 - 500 - 300 - 100 - 2 * 50 - 1000) * MIB
    assert plan.router.budget_bytes == 8 * EXPERTS.largest
    assert plan.budget_bytes == room
    assert [row.process for row in plan.behind] == ["router-0", "experts-0", "experts-1"]


def test_each_of_several_cards_counts_as_the_one_with_the_router() -> None:
    plan = _plan(num_actors=4, num_cards=2, device_mib=4000, host_mib=9000)
    room = (4000 - 3 * 64 - 500 - 300 - 100 - 2 * 50 - 1000) * MIB
    assert plan.router.budget_bytes + 2 * plan.actor_budgets[0] <= room
    half = _plan(experts=BudgetRequest(share=Fraction(1, 2)), num_actors=4, num_cards=2, host_mib=9000)
    assert half.router.budget_bytes + sum(half.actor_budgets[:2]) == EXPERTS.total // 4


@pytest.mark.parametrize(("num_actors", "num_cards"), [(3, 2), (5, 4), (2, 1), (4, 2)])
def test_all_that_is_asked_for_is_held_however_many_actors_a_card_gets(
    num_actors: int, num_cards: int
) -> None:
    asked = {"experts": BudgetRequest(share=Fraction(1)), "is_router_on_card": False, "host_mib": 9000}
    plan = _plan(num_actors=num_actors, num_cards=num_cards, device_mib=9000, **asked)  # type: ignore[arg-type]
    assert plan.actor_budgets == (EXPERTS.total // num_actors,) * num_actors


def test_card_with_more_actors_than_others_has_more_of_what_is_asked_for_as_far_as_there_is_room() -> None:
    asked = BudgetRequest(share=Fraction(1))
    plan = _plan(
        experts=asked, num_actors=3, num_cards=2, is_router_on_card=False, device_mib=3500, host_mib=9000
    )
    room = (3500 - 2 * 64 - 2 * 50 - 1000) * MIB
    assert EXPERTS.total // 4 < room // 2 < EXPERTS.total // 3
    assert plan.actor_budgets == (room // 2,) * 3


def test_actors_of_unequal_groups_have_all_that_is_asked_for() -> None:
    assert _even_part(100, (10, 20, 70)) == 70
    assert _even_part(60, (10, 20, 70)) == 30, "what small ones cannot use is the others'"
    assert _even_part(99, (0, 50, 50)) == 49


@pytest.mark.parametrize("num_actors", [1, 15, 16, 20])
@pytest.mark.parametrize("more", [1, 2, 5])
def test_actor_has_an_expert_on_its_card_beside_a_router_with_a_token_s(num_actors: int, more: int) -> None:
    asked = BudgetRequest(num_bytes=(num_actors + more) * EXPERTS.largest)
    plan = _plan(experts=asked, device_mib=9000, host_mib=9000, num_actors=num_actors)
    assert all(row.budget_bytes >= EXPERTS.largest for row in plan.processes)
    assert sum(row.budget_bytes for row in plan.processes) <= (num_actors + more) * EXPERTS.largest


def test_router_on_a_card_leaves_host_memory_to_actors_that_compute_there() -> None:
    asked = BudgetRequest(share=Fraction(1, 4))
    plan = _plan(experts=asked, num_actors=2, are_actors_on_cards=False, host_mib=9000)
    assert plan.router.budget_bytes == (2500 - 500 - 300 - 100 - 1000) * MIB, "what fits on the card"
    (behind,) = plan.behind
    assert behind.process == "router-0"
    assert behind.budget_bytes + sum(plan.actor_budgets) == EXPERTS.total // 4
    assert {row.node for row in plan.processes[1:]} == {"n1"} and plan.actor_host_budgets == ()


@given(
    st.integers(0, 6),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.integers(1, 20_000),
    st.integers(1, 20_000),
)
def test_nobody_gets_more_than_there_is(
    num_actors: int,
    num_cards: int,
    is_router_on_card: bool,
    are_actors_on_cards: bool,
    device_mib: int,
    host_mib: int,
) -> None:
    if not is_router_on_card and not (num_actors and are_actors_on_cards):
        return
    cards = num_cards if are_actors_on_cards else 1
    try:
        plan = _plan(
            device_mib=device_mib,
            host_mib=host_mib,
            num_actors=num_actors,
            num_cards=cards,
            is_router_on_card=is_router_on_card,
            are_actors_on_cards=are_actors_on_cards,
        )
    except (NodeTooSmall, NodeBudgetTooSmall, BudgetTooSmall):
        return
    spare = 10_000 * MIB * SPARE_PERCENT // 100
    on_card = [row for row in plan.processes if row.node == "cuda:0"]
    routers = [row for row in on_card if row.process.startswith("router")]
    actors = sorted((row for row in on_card if row not in routers), key=_held)
    fullest = [*routers, *actors[-(-len(actors) // cards) * -1 :]] if actors else routers
    assert sum(map(_held, fullest)) + spare <= device_mib * MIB
    on_host = [row for row in (*plan.processes, *plan.behind) if row.node == "n1"]
    assert sum(map(_held, on_host)) + BASE.others + spare <= host_mib * MIB
    assert all(row.budget_bytes >= 5 * MIB for row in (*plan.processes, *plan.behind))
