"""From plan and actors to actions: each rule alone, then random histories of deaths and changes of the plan."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest

from cluster.members import (
    Backoff,
    Member,
    MemberState,
    Patience,
    checked,
    died,
    failed,
    heard,
    recovered,
    turned,
)
from cluster.plan import ActorPlan, CardShare
from cluster.reconcile import (
    Action,
    Create,
    End,
    Target,
    Turn,
    WantedActor,
    fits,
    is_settled,
    make_owners,
    reconcile,
    reservation,
)
from experts.roster import Endpoint
from extraction.manifest import ExpertKey

PATIENCE = Patience(wait_s=400.0)
NOW_S = 1000.0
ROOMS = {"n1": 300, "n2": 200}
GROUPS = {
    name: tuple(ExpertKey("model", layer, index) for layer in range(2)) for index, name in enumerate("abc")
}


def _wanted(name: str, group: str = "", node: str | None = "n1", budget: int | None = 100) -> WantedActor:
    group = group or name
    return WantedActor(ActorPlan(name, group, node, budget), f"print of {group}", GROUPS[group])


def _target(*wanted: WantedActor, least: int = 0, one_machine: bool = False) -> Target:
    return Target(wanted, least, ROOMS, one_machine)


def _member(name: str, state: MemberState = "ready", **changes: object) -> Member:
    actor = name.partition(".")[0]
    group = actor if actor in GROUPS else "a"
    member = Member(
        name,
        state,
        NOW_S - 100.0,
        NOW_S,
        actor,
        f"print of {group}",
        incarnation=1,
        node_id="n1",
        budget_bytes=100,
        keys=GROUPS[group],
        is_known=True,
    )
    return replace(member, **changes)  # type: ignore[arg-type]


def _actions(
    target: Target, *members: Member, backoffs: dict[str, Backoff] | None = None, taken: Iterable[str] = ()
) -> list[Action]:
    return list(reconcile(target, members, backoffs or {}, set(taken), NOW_S, PATIENCE))


def _brief(actions: Iterable[Action]) -> list[tuple[str, str]]:
    return [
        (action.state if isinstance(action, Turn) else type(action).__name__.lower(), action.name)
        for action in actions
    ]


# What is wanted


def test_actors_that_nobody_is_are_created_all_at_once_on_their_nodes() -> None:
    (first, second) = _actions(_target(_wanted("a"), _wanted("b", node="n2")))
    assert isinstance(first, Create) and isinstance(second, Create)
    assert [(create.name, create.node_id, create.is_waiting_for_node) for create in (first, second)] == [
        ("a", "n1", False),
        ("b", "n2", False),
    ]


@pytest.mark.parametrize("state", ["ready", "starting"])
def test_actor_that_is_as_planned_is_left_alone(state: MemberState) -> None:
    assert _actions(_target(_wanted("a")), _member("a", state)) == []


def test_nothing_is_created_while_an_actor_that_was_found_has_not_said_who_it_is() -> None:
    target = _target(_wanted("a"))
    assert _actions(target, _member("x", "found", actor="")) == []
    assert _brief(_actions(target, _member("x", "ready", actor="a"))) == []


def test_failed_actor_waits_before_it_is_tried_again() -> None:
    backoffs = failed({}, "a", "no memory", NOW_S)
    assert _actions(_target(_wanted("a")), backoffs=backoffs) == []
    later_s = backoffs["a"].retry_at_s
    assert _brief(reconcile(_target(_wanted("a")), (), backoffs, (), later_s, PATIENCE)) == [("create", "a")]
    twice = failed(backoffs, "a", "no memory", NOW_S)
    assert twice["a"].retry_at_s - NOW_S == 2 * (later_s - NOW_S)
    assert failed({"a": Backoff(50, 0.0)}, "a", "", 0.0)["a"].retry_at_s == 30.0


def test_failures_are_forgotten_when_the_actor_has_been_ready_for_a_while() -> None:
    backoffs = failed({}, "a", "no memory", NOW_S)
    just = replace(_member("a"), since_s=NOW_S)
    assert recovered(backoffs, [just], NOW_S, PATIENCE) == backoffs
    assert recovered(backoffs, [just], NOW_S + PATIENCE.infancy_s, PATIENCE) == {}


# What is not wanted


@pytest.mark.parametrize("state", ["orphan", "lost", "failed", "quarantined"])
def test_what_serves_nobody_is_ended_and_replaced_in_one_look(state: MemberState) -> None:
    actions = _actions(_target(_wanted("a")), _member("a", state))
    assert _brief(actions) == [("end", "a"), ("create", "a.2")]
    assert isinstance(actions[0], End) and actions[0].is_failure == (state == "failed")


def test_name_of_a_dead_actor_is_used_again_and_one_that_ray_still_has_is_not() -> None:
    gone = _member("a", "lost", is_gone=True)
    assert _brief(_actions(_target(_wanted("a")), gone))[-1] == ("create", "a")
    assert _brief(_actions(_target(_wanted("a")), taken=["a", "a.2"])) == [("create", "a.3")]


def test_unwanted_actor_that_is_still_starting_is_ended() -> None:
    assert _brief(_actions(_target(), _member("a", "starting"))) == [("end", "a")]


def test_without_any_wanted_actor_all_are_drained() -> None:
    assert _brief(_actions(_target(), _member("a"), _member("b"))) == [("draining", "a"), ("draining", "b")]


def test_unwanted_actor_serves_until_all_routers_know_of_those_that_take_its_experts_over() -> None:
    target = _target(_wanted("other", "a"))
    old, new = _member("a"), _member("other", keys=GROUPS["a"])
    assert _brief(_actions(target, old)) == [("create", "other")]
    assert _actions(target, old, replace(new, state="starting")) == []
    assert _actions(target, old, replace(new, is_known=False)) == []
    assert _brief(_actions(target, old, new)) == [("draining", "a")]


def test_actor_that_is_wanted_again_while_it_drains_is_taken_back() -> None:
    assert _brief(_actions(_target(_wanted("a")), _member("a", "draining"))) == [("ready", "a")]


def test_draining_actor_is_retired_when_it_is_idle_and_known_to_drain_or_after_long() -> None:
    member = replace(_member("a", "draining"), since_s=NOW_S)
    assert _actions(_target(), member) == []
    assert _actions(_target(), replace(member, is_known=False, is_idle=True)) == []
    assert _brief(_actions(_target(), replace(member, is_idle=True))) == [("retiring", "a")]
    stuck = replace(member, is_known=False, since_s=NOW_S - PATIENCE.drain_s)
    assert _brief(_actions(_target(), stuck)) == [("retiring", "a")]


def test_retiring_actor_is_ended_when_routers_have_let_go_or_after_long() -> None:
    member = replace(_member("a", "retiring", is_known=False), since_s=NOW_S)
    assert _actions(_target(), member) == []
    assert _brief(_actions(_target(), replace(member, is_known=True))) == [("end", "a")]
    assert _brief(_actions(_target(), replace(member, since_s=NOW_S - PATIENCE.retire_s))) == [("end", "a")]


# Changes


@pytest.mark.parametrize(
    "changed",
    [
        _target(_wanted("a"), least=2),
        _target(replace(_wanted("a"), fingerprint="another store")),
        _target(_wanted("a", node="n2")),
        _target(_wanted("a", budget=101)),
        _target(_wanted("a", budget=None)),
    ],
    ids=["rolled", "other store", "other node", "larger", "no bound"],
)
def test_actor_that_is_to_change_is_replaced_beside_itself(changed: Target) -> None:
    assert _brief(_actions(changed, _member("a"))) == [("create", "a.2")]


def test_actor_whose_experts_nobody_wants_any_more_gives_way_at_once() -> None:
    changed = _target(_wanted("a", "b"))
    assert _brief(_actions(changed, _member("a"))) == [("draining", "a"), ("create", "a.2")]


def test_actor_that_is_to_keep_less_is_told_and_not_replaced() -> None:
    assert _actions(_target(_wanted("a", budget=10)), _member("a")) == []


def test_actor_whose_group_gives_experts_away_goes_on_and_answers_for_them_until_others_do() -> None:
    first, second = GROUPS["a"]
    small = replace(_wanted("a"), keys=(first,))
    taker = WantedActor(ActorPlan("t", "t", "n2", 50), "print of a", (second,))
    target, member = _target(small, taker), _member("a")
    assert _brief(_actions(target, member)) == [("create", "t")]
    starting = _member("t", "starting", keys=(second,), node_id="n2", budget_bytes=50)
    assert make_owners(target, [member, starting]) == {first: ("a",), second: ("a",)}
    ready = replace(starting, state="ready")
    assert _actions(target, member, ready) == []
    assert make_owners(target, [member, ready]) == {first: ("a",), second: ("t",)}


def test_expert_that_is_in_no_wanted_actor_any_more_is_not_asked_of_the_one_that_had_it() -> None:
    first = GROUPS["a"][0]
    assert make_owners(_target(replace(_wanted("a"), keys=(first,))), [_member("a")]) == {first: ("a",)}


def test_actor_whose_group_gets_more_experts_is_replaced() -> None:
    more = replace(_wanted("a"), keys=(*GROUPS["a"], *GROUPS["b"]))
    assert _brief(_actions(_target(more), _member("a"))) == [("create", "a.2")]


def test_actors_are_rolled_one_after_another() -> None:
    target = _target(_wanted("a"), _wanted("b"), least=2)
    old = (_member("a"), _member("b"))
    assert _brief(_actions(target, *old)) == [("create", "a.2")]
    new = _member("a.2", "starting", incarnation=2)
    assert _actions(target, *old, new) == []
    roomy = replace(target, rooms={"n1": 400})
    assert _brief(_actions(roomy, *old, replace(new, state="ready"))) == [
        ("draining", "a"),
        ("create", "b.2"),
    ]
    assert _brief(_actions(target, *old, replace(new, state="ready"))) == [("draining", "a")], "no room yet"
    draining = replace(_member("a", "draining"), since_s=NOW_S)
    assert _actions(target, draining, old[1], replace(new, state="ready")) == []


def _on_card(wanted: WantedActor) -> WantedActor:
    return replace(wanted, plan=wanted.plan.on_card(CardShare(0.5, 10)))


def test_actor_on_a_card_gives_it_up_before_its_replacement_is_created() -> None:
    target = _target(*map(_on_card, (_wanted("a"), _wanted("b"))), least=2)
    old = (_member("a"), _member("b"))
    assert _brief(_actions(target, *old)) == [("draining", "a")], "one at a time"
    draining = replace(_member("a", "draining"), since_s=NOW_S)
    assert _actions(target, draining, old[1]) == []
    retiring = _member("a", "retiring", is_known=False, since_s=NOW_S)
    assert _actions(target, retiring, old[1]) == []
    assert _brief(_actions(target, old[1], taken=["a"])) == [("create", "a.2")]
    starting = _member("a.2", "starting", incarnation=2)
    assert _actions(target, old[1], starting) == [], "until the first one serves"
    assert _brief(_actions(target, old[1], replace(starting, state="ready"))) == [("draining", "b")]


def test_lost_actors_are_replaced_at_once_even_while_others_are_rolled() -> None:
    target = _target(_wanted("a"), _wanted("b"), _wanted("c"), least=2)
    lost = [_member(name, "lost", is_gone=True) for name in "bc"]
    actions = _actions(target, _member("a"), *lost)
    assert _brief(actions) == [
        ("end", "b"),
        ("end", "c"),
        ("create", "a.2"),
        ("create", "b"),
        ("create", "c"),
    ]


def test_of_two_that_are_the_same_the_newest_stays() -> None:
    older, newer = _member("a"), _member("a.2", incarnation=2)
    assert _brief(_actions(_target(_wanted("a")), older, newer)) == [("draining", "a")]


# Nodes


def test_actor_of_a_node_that_is_gone_goes_where_there_is_most_room() -> None:
    other = _member("b", budget_bytes=50)
    (create,) = _actions(_target(_wanted("a", node="gone"), _wanted("b", budget=50)), other)
    assert isinstance(create, Create)
    assert (create.node_id, create.is_waiting_for_node) == ("n1", False)
    assert fits(_target(_wanted("a", node="gone")), _wanted("a", node="gone"), _member("a", node_id="n2"))
    assert not fits(_target(_wanted("a", node="n1")), _wanted("a", node="n1"), _member("a", node_id="n2"))


def test_actor_of_a_node_that_is_cut_off_is_replaced_elsewhere_and_goes_back_when_the_node_answers() -> None:
    """Ray counts the node as alive for tens of seconds, and would start nothing there."""
    target = _target(_wanted("a"), _wanted("b", node=None))
    cut_off = replace(target, cut_off=frozenset({"n1"}))
    assert [action.node_id for action in _actions(cut_off) if isinstance(action, Create)] == ["n2", "n2"]
    elsewhere, other = _member("a", node_id="n2"), _member("b", node_id="n2")
    assert _actions(cut_off, elsewhere, other) == []
    assert _brief(_actions(target, elsewhere, other)) == [("create", "a.2")]
    back = _member("a.2", incarnation=2)
    assert _brief(_actions(target, elsewhere, other, back)) == [("draining", "a")]


def test_actor_that_is_ready_on_a_node_that_is_cut_off_is_left_there() -> None:
    cut_off = replace(_target(_wanted("a")), cut_off=frozenset({"n1"}))
    assert _actions(cut_off, _member("a")) == []


def test_actor_that_is_starting_on_a_node_that_is_cut_off_is_started_elsewhere() -> None:
    cut_off = replace(_target(_wanted("a")), cut_off=frozenset({"n1"}))
    ended, created = _actions(cut_off, _member("a", "starting"))
    assert _brief([ended, created]) == [("end", "a"), ("create", "a.2")]
    assert isinstance(created, Create) and created.node_id == "n2"


def test_actor_for_which_no_node_has_room_waits_for_a_machine_and_asks_ray_for_all_it_needs() -> None:
    (create,) = _actions(_target(_wanted("a", node=None, budget=301)))
    assert isinstance(create, Create)
    assert (create.node_id, create.is_waiting_for_node) == (None, True)
    assert reservation(create, {"n1": 10_000}, []) == 301
    waiting = _member("a", "starting", node_id=None, is_waiting_for_node=True, budget_bytes=301)
    assert _actions(_target(_wanted("a", node=None, budget=301)), waiting) == []


def test_actor_that_waits_for_a_machine_is_started_on_a_node_that_has_room_by_now() -> None:
    target = _target(_wanted("a", node=None, budget=250), _wanted("b", budget=100))
    waiting = _member("a", "starting", node_id=None, is_waiting_for_node=True, budget_bytes=250)
    assert _actions(target, waiting, _member("b")) == []
    ended, created = _actions(replace(target, wanted=target.wanted[:1]), waiting)
    assert _brief([ended, created]) == [("end", "a"), ("create", "a.2")]
    assert isinstance(created, Create) and (created.node_id, created.is_waiting_for_node) == ("n1", False)


def test_rooms_are_shared_by_what_is_created_in_one_look() -> None:
    wanted = [_wanted(name, node=None, budget=150) for name in "abc"]
    creates = [action for action in _actions(_target(*wanted)) if isinstance(action, Create)]
    assert [create.node_id for create in creates] == ["n1", "n2", "n1"]


@pytest.mark.parametrize("state", ["draining", "retiring"])
def test_actor_waits_for_the_room_of_one_that_leaves(state: MemberState) -> None:
    leaving = _member("b", state, budget_bytes=250, is_known=False, since_s=NOW_S)
    assert _actions(_target(_wanted("a")), leaving) == []
    assert _brief(_actions(_target(_wanted("a", budget=50)), leaving)) == [("create", "a")]
    assert _brief(_actions(_target(_wanted("a", node="n2")), leaving)) == [("create", "a")]
    nowhere = _target(_wanted("a", node="gone", budget=300))
    assert _actions(nowhere, leaving) == [], "and no machine is asked for meanwhile"
    assert _brief(_actions(nowhere)) == [("create", "a")]


def test_actor_waits_for_the_room_of_one_that_begins_to_leave_in_the_same_look() -> None:
    unwanted = _member("b", budget_bytes=250)
    assert _brief(_actions(_target(_wanted("a")), unwanted)) == [("draining", "b")]
    same = _member("a", budget_bytes=250, fingerprint="other")
    assert _brief(_actions(_target(_wanted("a")), same)) == [("create", "a.2")], "it serves until then"


def test_on_one_machine_ray_chooses_and_no_room_is_asked_for() -> None:
    (create,) = _actions(_target(_wanted("a", node=None, budget=10**9), one_machine=True))
    assert isinstance(create, Create)
    assert (create.node_id, create.is_waiting_for_node) == (None, False)


def test_ray_never_counts_more_on_a_planned_node_than_it_has_left_there() -> None:
    create = Create("a", _wanted("a"), "n1", False, "")
    others = [_member("b", budget_bytes=60), _member("c", budget_bytes=60, node_id="n2")]
    assert reservation(create, {"n1": 1000}, others) == 100
    assert reservation(create, {"n1": 130}, others) == 70
    assert reservation(create, {"n1": 50}, others) == 0


# Who owns what


def test_replicas_own_in_the_plans_order_then_what_is_to_be_replaced_and_draining_ones_not_at_all() -> None:
    target = _target(_wanted("second", "a"), _wanted("first", "a"), _wanted("b"))
    members = [
        _member("first", fingerprint="print of a"),
        _member("second"),
        _member("old"),
        _member("b", "draining"),
        _member("b.2", "starting"),
    ]
    owners = make_owners(target, members)
    assert owners == dict.fromkeys(GROUPS["a"], ("second", "first", "old"))


# Silence


def test_silent_actor_is_lost_sooner_where_a_router_lost_it_too() -> None:
    member = replace(_member("a"), heard_at_s=NOW_S)
    assert checked(member, NOW_S + PATIENCE.suspicion_s, PATIENCE).state == "ready"
    assert checked(member, NOW_S + PATIENCE.silence_s, PATIENCE).state == "lost"
    suspected = replace(member, is_suspected=True)
    assert checked(suspected, NOW_S + PATIENCE.suspicion_s, PATIENCE).state == "lost"
    assert not heard(suspected, True, NOW_S).is_suspected


def test_starting_actor_has_long_and_one_that_waits_for_a_machine_longer() -> None:
    member = replace(_member("a", "starting"), heard_at_s=NOW_S)
    assert checked(member, NOW_S + PATIENCE.start_s - 1, PATIENCE) == member
    assert checked(member, NOW_S + PATIENCE.start_s, PATIENCE).state == "failed"
    waiting = replace(member, is_waiting_for_node=True)
    assert checked(waiting, NOW_S + PATIENCE.start_s, PATIENCE) == waiting
    assert checked(waiting, NOW_S + PATIENCE.wait_s, PATIENCE).state == "failed"


def test_actor_that_dies_when_it_is_hardly_ready_counts_as_failed() -> None:
    young = replace(_member("a"), since_s=NOW_S - PATIENCE.infancy_s / 2)
    assert died(young, "killed", NOW_S, PATIENCE).state == "failed"
    assert died(_member("a"), "killed", NOW_S, PATIENCE).state == "lost"


# Random histories


@dataclass
class _World:
    """Actors that start, answer, die and hang by chance; carries actions out as the supervisor does."""

    chance: random.Random
    target: Target = field(default_factory=_target)
    members: dict[str, Member] = field(default_factory=dict)
    backoffs: dict[str, Backoff] = field(default_factory=dict)
    alive: dict[str, bool] = field(default_factory=dict)
    """Names in Ray -> whether the process answers. Names of ended actors stay for a moment."""
    ending: set[str] = field(default_factory=set)
    incarnation: int = 0
    now_s: float = 0.0
    is_on_cards: bool = False

    def look(self) -> list[Action]:
        self.now_s += self.chance.choice((0.1, 1.0, 3.0))
        for name in [name for name in self.ending if self.chance.random() < 0.5]:
            self.ending.discard(name)
            del self.alive[name]
        for name, member in list(self.members.items()):
            self.members[name] = checked(self._heard(member), self.now_s, PATIENCE)
        self.backoffs = recovered(self.backoffs, self.members.values(), self.now_s, PATIENCE)
        members = tuple(self.members.values())
        actions = list(reconcile(self.target, members, self.backoffs, self.ending, self.now_s, PATIENCE))
        for action in actions:
            self._check(action)
            self._carry_out(action)
        return actions

    def _heard(self, member: Member) -> Member:
        if member.name not in self.alive:
            return member if member.is_gone else died(member, "died", self.now_s, PATIENCE)
        if not self.alive[member.name] or member.node_id in self.target.cut_off:
            return member
        if member.state == "starting" and self.chance.random() < 0.5:
            member = replace(turned(member, "ready", self.now_s), node_id=member.node_id or "n1")
        if member.state == "found":
            member = turned(member, "ready", self.now_s)
        knows = member.is_known or self.chance.random() < 0.5
        return replace(heard(member, self.chance.random() < 0.7, self.now_s), is_known=knows)

    def _check(self, action: Action) -> None:
        if isinstance(action, Create):
            assert action.name not in self.alive, "two actors of one name"
            if self.is_on_cards:
                same = (m for m in self.members.values() if m.actor == action.wanted.name)
                assert all(m.is_gone for m in same), "two of them on a card"
            here = [m for m in self.members.values() if m.node_id == action.node_id and not m.is_gone]
            if action.node_id and any(member.state in ("draining", "retiring") for member in here):
                taken = sum(member.budget_bytes or 0 for member in (*here, action.wanted.plan))
                assert taken <= self.target.rooms[action.node_id], "it could have waited"
            return
        member = self.members[action.name]
        is_wanted = any(fits(self.target, wanted, member) for wanted in self.target.wanted)
        if isinstance(action, End):
            assert member.state != "ready", "a ready actor is ended"
        elif action.state == "draining" and is_wanted:
            assert not self.is_on_cards
            others = [m for m in self.members.values() if m is not member and m.actor == member.actor]
            assert any(
                m.state == "ready" and fits(self.target, w, m) for m in others for w in self.target.wanted
            )

    def _carry_out(self, action: Action) -> None:
        match action:
            case Create():
                self.incarnation += 1
                wanted = action.wanted
                self.alive[action.name] = True
                self.members[action.name] = Member(
                    action.name,
                    "starting",
                    self.now_s,
                    self.now_s,
                    wanted.name,
                    wanted.fingerprint,
                    self.incarnation,
                    action.node_id,
                    wanted.plan.budget_bytes,
                    wanted.keys,
                    Endpoint(action.name, "127.0.0.1", 1, self.incarnation),
                    is_waiting_for_node=action.is_waiting_for_node,
                )
            case Turn():
                self.members[action.name] = turned(self.members[action.name], action.state, self.now_s)
            case End():
                member = self.members.pop(action.name)
                if action.name in self.alive:
                    self.ending.add(action.name)
                    self.alive[action.name] = False
                if action.is_failure:
                    self.backoffs = failed(self.backoffs, member.actor, member.error, self.now_s)

    def disturb(self) -> None:
        kind = self.chance.choice(("plan", "roll", "kill", "hang", "restart", "bad", "node", "cut"))
        names = [name for name in self.members if name in self.alive and name not in self.ending]
        victim = self.chance.choice(names) if names else None
        if kind == "plan":
            self.target = replace(self.target, wanted=self._plan())
        elif kind == "roll":
            self.target = replace(self.target, least_incarnation=self.incarnation + 1)
        elif kind == "node":
            rooms = self.chance.choice(({"n1": 300}, {"n2": 300}, dict(ROOMS)))
            self.target = replace(self.target, rooms=rooms)
        elif kind == "cut":
            cut_off = self.chance.choice(((), ("n1",), ("n2",)))
            self.target = replace(self.target, cut_off=frozenset(cut_off))
        elif kind == "restart":  # of the supervisor: it finds what runs, and remembers nothing of it
            self.backoffs = {}
            self.members = {
                name: turned(replace(member, heard_at_s=self.now_s), "found", self.now_s)
                for name, member in self.members.items()
                if name in self.alive
            }
        elif victim is not None and kind == "kill":
            del self.alive[victim]
        elif victim is not None and kind == "hang":
            self.alive[victim] = False
        elif victim is not None and self.members[victim].state == "ready":
            self.members[victim] = turned(self.members[victim], "quarantined", self.now_s)

    def _plan(self) -> tuple[WantedActor, ...]:
        names = self.chance.sample(("a", "b", "c", "d", "e"), self.chance.randint(0, 5))
        made = (
            _wanted(
                name,
                self.chance.choice("abc"),
                self.chance.choice(("n1", "n2")),
                self.chance.choice((50, 100)),
            )
            for name in names
        )
        return tuple(map(_on_card, made) if self.is_on_cards else made)


@pytest.mark.parametrize("is_on_cards", [False, True])
@pytest.mark.parametrize("seed", range(150))
def test_any_history_converges_to_the_plan_and_ends_nothing_that_is_wanted(
    seed: int, is_on_cards: bool
) -> None:
    chance = random.Random(seed)
    world = _World(chance, is_on_cards=is_on_cards)
    for _ in range(chance.randint(1, 25)):
        world.disturb()
        for _ in range(chance.randint(0, 8)):
            world.look()
    world.target = replace(world.target, cut_off=frozenset())
    for _ in range(800):
        world.look()
        is_well = all(world.alive.values()) and not world.ending
        if is_well and is_settled(world.target, list(world.members.values())):
            break
    assert is_settled(world.target, list(world.members.values()))
    assert world.look() == []
    assert sorted(world.alive) == sorted(world.members), "an actor is left that nobody knows"
    assert len(world.members) == len(world.target.wanted)
