"""What follows from what machines say of their disks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.disk_desk import MOST_FALLBACKS, MOST_PEERS, DiskDecision, Keeper, decide_disks, peers_for
from experts.actor_report import DiskReport
from extraction.manifest import ExpertKey

KEYS = tuple(ExpertKey("model", layer, expert) for layer in range(2) for expert in range(4))
SIZES = dict.fromkeys(KEYS, 10)
HEAD = "head"


def _keeper(
    name: str,
    node: str,
    group: tuple[ExpertKey, ...],
    held: tuple[ExpertKey, ...] = (),
    *,
    free: int = 1000,
    is_whole: bool = False,
    ordered: tuple[ExpertKey, ...] = (),
    takes_orders: bool = True,
) -> Keeper:
    report = DiskReport((f"host-{node}", 7), is_whole, frozenset(held), free)
    return Keeper(name, node, frozenset(group), report, frozenset(ordered), takes_orders)


def test_machine_without_the_store_is_to_keep_what_only_the_head_has() -> None:
    decision = decide_disks(SIZES, [_keeper("x", "b", KEYS[:4], KEYS[:2])], HEAD)
    assert decision.holds == {"x": KEYS[4:]}
    assert not decision.single and not decision.absent
    again = decide_disks(SIZES, [_keeper("x", "b", KEYS[:4], KEYS[:2], ordered=KEYS[4:])], HEAD)
    assert not again.holds and not again.single


def test_nobody_keeps_what_an_actor_that_has_said_nothing_yet_will_fetch() -> None:
    first = _keeper("x", "b", KEYS[:4])
    decision = decide_disks(SIZES, [first], HEAD, {"c": frozenset(KEYS[4:7])})
    assert decision.holds == {"x": KEYS[7:]}
    assert not decision.single
    same_machine = decide_disks(SIZES, [first], HEAD, {"b": frozenset(KEYS[4:])})
    assert not same_machine.holds and not same_machine.single


def test_what_finds_no_room_is_listed() -> None:
    decision = decide_disks(SIZES, [_keeper("x", "b", KEYS[:4], KEYS[:2], free=45)], HEAD)
    assert decision.holds == {"x": KEYS[4:6]}, "two of the group are still to come"
    assert decision.single == KEYS[6:]
    refusing = decide_disks(SIZES, [_keeper("x", "b", KEYS[:4], takes_orders=False)], HEAD)
    assert not refusing.holds
    assert refusing.single == KEYS[4:]


def test_one_process_of_a_machine_keeps_what_the_machine_is_to_keep() -> None:
    both = [_keeper("y", "b", KEYS[:2]), _keeper("x", "b", KEYS[2:4])]
    assert decide_disks(SIZES, both, HEAD).holds == {"x": KEYS[4:]}
    refused = [both[0], _keeper("x", "b", KEYS[2:4], takes_orders=False)]
    assert decide_disks(SIZES, refused, HEAD).holds == {"y": KEYS[4:]}


def test_peers_are_machines_that_have_what_is_missing_those_with_most_first() -> None:
    keepers = [
        _keeper("x", "b", KEYS, KEYS[:1]),
        _keeper("y", "c", (), KEYS[:4]),
        _keeper("z", "d", (), KEYS[1:]),
        _keeper("w", "e", (), KEYS[:1]),
        _keeper("v", "b", (), KEYS[:1]),
    ]
    peers = decide_disks(SIZES, keepers, HEAD).peers
    assert peers["x"] == (("host-d", 7), ("host-c", 7))
    assert "w" not in peers, "it misses nothing"
    assert peers_for(frozenset(KEYS[1:]), "b", keepers) == (("host-d", 7), ("host-c", 7))
    many = [_keeper("x", "b", KEYS), *(_keeper(f"p{n}", f"n{n}", (), KEYS) for n in range(9))]
    assert len(decide_disks(SIZES, many, HEAD).peers["x"]) == MOST_PEERS


def test_experts_of_a_group_fall_back_to_those_who_have_them_on_disk() -> None:
    keepers = [
        _keeper("x", "b", KEYS[:4], KEYS[:4]),
        _keeper("y", "c", KEYS[4:], KEYS[3:]),
        _keeper("z", HEAD, (), is_whole=True),
    ]
    fallbacks = decide_disks(SIZES, keepers, HEAD).fallbacks
    assert fallbacks[KEYS[0]] == ("z",)
    assert set(fallbacks[KEYS[3]]) == {"y", "z"}
    assert fallbacks[KEYS[5]] == ("z",)
    after_a_loss = decide_disks(SIZES, keepers[1:], HEAD).fallbacks
    assert after_a_loss[KEYS[0]] == ("z",), "also of a group whose actors are all gone"


def test_rows_of_a_lost_group_are_spread_over_all_who_can() -> None:
    keepers = [_keeper(f"k{n}", f"n{n}", KEYS if n == 0 else (), is_whole=True) for n in range(4)]
    fallbacks = decide_disks(SIZES, keepers, None).fallbacks
    assert all(len(names) == MOST_FALLBACKS and "k0" not in names for names in fallbacks.values())
    assert {names[0] for names in fallbacks.values()} == {"k1", "k2", "k3"}


def test_nothing_follows_from_nobody() -> None:
    decision = decide_disks(SIZES, [], HEAD)
    assert decision == DiskDecision(single=KEYS)
    assert decide_disks(SIZES, [], None) == DiskDecision(absent=KEYS)


@st.composite
def disks(draw: st.DrawFn) -> list[Keeper]:
    some = st.lists(st.sampled_from(KEYS), unique=True).map(tuple)
    return [
        _keeper(
            f"k{number}",
            draw(st.sampled_from(["b", "c", "d"])),
            draw(some),
            draw(some),
            free=draw(st.integers(0, 100)),
            is_whole=draw(st.booleans()),
            takes_orders=draw(st.booleans()),
        )
        for number in range(draw(st.integers(1, 5)))
    ]


@given(disks())
def test_orders_that_were_carried_out_lead_to_no_further_ones(keepers: list[Keeper]) -> None:
    first = decide_disks(SIZES, keepers, HEAD)
    told = [
        _keeper(
            keeper.name,
            keeper.node,
            tuple(keeper.group),
            tuple(keeper.report.held),
            free=keeper.report.free_bytes,
            is_whole=keeper.report.is_whole,
            ordered=first.holds.get(keeper.name, ()),
            takes_orders=keeper.takes_orders,
        )
        for keeper in keepers
    ]
    second = decide_disks(SIZES, told, HEAD)
    assert not second.holds
    assert second.single == first.single
    for keeper in keepers:
        assert not keeper.group & {key for key, names in first.fallbacks.items() if keeper.name in names}
        assert not set(first.holds.get(keeper.name, ())) & (keeper.group | keeper.report.held)
