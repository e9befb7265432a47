"""The fleet over a pool that only remembers: what routers are told while actors come, are replaced, and go; and how the
plan follows the load."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from cluster.autoscaler import ScalerSettings
from cluster.capacity import REST_AFTER_S, Load
from cluster.fleet import Fleet
from cluster.members import Patience
from cluster.placement import plan_local
from cluster.plan import ActorPlan, ServicePlan
from cluster.reconcile import Target, is_settled
from cluster.router_book import RouterLoad
from cluster.scaling import PlanScaler
from cluster.service_spec import Scaling, ServiceSpec, wanted_actors
from experts.actor import ActorSpec
from experts.actor_report import ActorIdentity, ActorPulse, Answer, Death
from experts.roster import Endpoint
from extraction.manifest import ExpertKey

KEYS = [ExpertKey("model", layer, expert) for layer in range(2) for expert in range(4)]
PLAN = plan_local(KEYS, 2, (40, 40))
SPEC = ServiceSpec("/store", "float32", 8, 4, PLAN, 1, secret=b"s" * 32)
ROOMS = {"node": 80}


@dataclass
class _Pool:
    specs: dict[str, ActorSpec] = field(default_factory=dict)
    error: str = ""

    def names_in_use(self) -> frozenset[str]:
        return frozenset()

    def create(self, spec: ActorSpec, plan: ActorPlan, node_id: str | None, memory_bytes: int) -> str:
        if not self.error:
            self.specs[spec.name] = spec
        return self.error

    def end(self, name: str, is_dead: bool) -> None:
        del self.specs[name]


class _Service:
    """A fleet, and a router that follows its roster at once; actors answer in every look."""

    def __init__(self) -> None:
        self.pool = _Pool()
        self.fleet = Fleet(SPEC, self.pool, Patience())
        self.plan = PLAN
        self.least = 0
        self.now_s = 100.0
        self.busy_s = 0.0
        self.dead: set[str] = set()

    def target(self) -> Target:
        return Target(wanted_actors(SPEC, self.plan), self.least, ROOMS)

    def look(self, found: tuple[str, ...] = ()) -> None:
        self.now_s += 1.0
        self.fleet.routers.follows("router", self.fleet.roster.version, None, self.now_s)
        answers = {name: self._answer(spec) for name, spec in self.pool.specs.items()}
        self.fleet.observe(found, answers, self.now_s)
        self.fleet.act(self.target(), self.plan, {}, self.now_s)

    def settle(self) -> None:
        for _ in range(40):
            self.look()
            if is_settled(self.target(), tuple(self.fleet.members.values())):
                return
        raise AssertionError(f"not settled: {self.fleet.members}")

    def _answer(self, spec: ActorSpec) -> Answer:
        if spec.name in self.dead:
            return Death("killed")
        member = self.fleet.members.get(spec.name)
        if member is not None and member.state in ("found", "starting"):
            return _identity(spec)
        return ActorPulse(0, self.busy_s, 0, 0, 0, {})

    def apply(self, *actors: ActorPlan) -> None:
        self.plan = replace(PLAN, actors=actors)


def _identity(spec: ActorSpec) -> ActorIdentity:
    endpoint = Endpoint(spec.name, "127.0.0.1", 1, spec.incarnation)
    return ActorIdentity(
        spec.service(),
        spec.actor,
        spec.incarnation,
        spec.fingerprint(),
        spec.budget_bytes,
        "node",
        endpoint,
        spec.group,
    )


def _running() -> _Service:
    service = _Service()
    service.settle()
    return service


def test_roster_grows_with_what_is_ready_and_lists_every_expert() -> None:
    service = _Service()
    first = service.fleet.roster.version
    service.look()
    assert service.fleet.roster.owners == {}
    service.settle()
    roster = service.fleet.roster
    assert roster.version > first
    assert sorted(roster.owners) == KEYS
    assert roster.endpoints.keys() == {"experts-0", "experts-1"}


def test_node_is_doubtful_when_one_of_its_actors_dies_or_is_silent() -> None:
    service = _running()
    answers = {name: service._answer(spec) for name, spec in service.pool.specs.items()}
    assert service.fleet.doubtful_nodes(answers, service.now_s + 0.5) == frozenset()
    assert service.fleet.doubtful_nodes({}, service.now_s + Patience().doubt_s + 0.1) == {"node"}
    service.dead.add("experts-1")
    answers = {name: service._answer(spec) for name, spec in service.pool.specs.items()}
    assert service.fleet.doubtful_nodes(answers, service.now_s + 0.5) == {"node"}


def test_nobody_was_silent_while_the_supervisor_itself_was_held_up() -> None:
    service = _running()
    last_s = service.now_s
    service.fleet.observe((), {}, last_s + 100.0)
    assert {member.state for member in service.fleet.members.values()} == {"ready"}
    assert service.fleet.routers.all_follow(0, last_s + 100.0), "nor were routers"
    for later_s in (101.0, 102.0, 103.0, 104.0, 105.0, 106.0, 107.0):
        service.fleet.observe((), {}, last_s + later_s)
    assert {member.state for member in service.fleet.members.values()} == {"lost"}, "who stays silent is lost"


def test_every_expert_has_an_owner_at_every_moment_of_a_rolling_restart() -> None:
    service = _running()
    before = {name: spec.incarnation for name, spec in service.pool.specs.items()}
    service.least = service.fleet.next_incarnation()
    versions = [service.fleet.roster.version]
    for _ in range(40):
        service.look()
        roster = service.fleet.roster
        assert sorted(roster.owners) == KEYS
        assert all(name in roster.endpoints for names in roster.owners.values() for name in names)
        versions.append(roster.version)
        if is_settled(service.target(), tuple(service.fleet.members.values())):
            break
    assert is_settled(service.target(), tuple(service.fleet.members.values()))
    assert versions == sorted(versions)
    assert min(spec.incarnation for spec in service.pool.specs.values()) > max(before.values())


def test_draining_actor_keeps_its_connection_and_gets_no_rows() -> None:
    service = _running()
    service.apply()
    service.look()
    assert service.fleet.roster.owners == {}
    assert service.fleet.roster.endpoints.keys() == {"experts-0", "experts-1"}
    service.settle()
    assert service.fleet.roster.endpoints == {}
    assert service.pool.specs == {}


def test_dead_actor_is_replaced_with_a_higher_incarnation_under_its_name() -> None:
    service = _running()
    before = service.pool.specs["experts-0"].incarnation
    for _ in range(10):
        service.look()
    service.dead = {"experts-0"}
    service.look()
    service.dead = set()
    service.settle()
    assert service.pool.specs["experts-0"].incarnation > before


def test_quarantined_actor_is_replaced_and_an_accusation_of_an_earlier_one_is_nothing() -> None:
    service = _running()
    incarnation = service.pool.specs["experts-0"].incarnation
    assert service.fleet.quarantine("experts-0", incarnation - 1, "NaN", service.now_s) is None
    assert service.fleet.quarantine("experts-0", incarnation, "NaN", service.now_s) is not None
    assert service.fleet.quarantine("experts-0", incarnation, "NaN", service.now_s) is None
    service.settle()
    (after,) = (spec for spec in service.pool.specs.values() if spec.actor == "experts-0")
    assert after.incarnation > incarnation


def test_restarted_fleet_is_acquainted_once_everybody_has_said_who_it_is() -> None:
    earlier = _running()
    service = _Service()
    assert not service.fleet.is_acquainted, "nobody was looked for"
    service.pool.specs = dict(earlier.pool.specs)
    service.fleet.observe(tuple(service.pool.specs), {}, service.now_s)
    assert not service.fleet.is_acquainted
    service.settle()
    assert service.fleet.is_acquainted


def test_restarted_fleet_adopts_its_actors_and_ends_those_of_another_service() -> None:
    earlier = _running()
    service = _Service()
    foreign = replace(earlier.pool.specs["experts-0"], name="stray", secret=b"t" * 32)
    service.pool.specs = {**earlier.pool.specs, "stray": foreign}
    service.look(found=tuple(service.pool.specs))
    service.settle()
    assert service.pool.specs == earlier.pool.specs
    assert service.fleet.next_incarnation() > max(s.incarnation for s in earlier.pool.specs.values())


def test_actor_that_cannot_be_created_is_tried_again_later_and_says_why() -> None:
    service = _Service()
    service.pool.error = "no such node"
    service.look()
    assert service.fleet.backoffs["experts-0"].error == "no such node"
    assert service.fleet.members == {}
    service.pool.error = ""
    service.settle()


def test_remembered_decisions_are_bounded() -> None:
    fleet = _running().fleet
    for _ in range(1000):
        fleet.note("kind", "name", "r" * 1000)
    assert len(fleet.notes) == 200
    assert {len(reason) for *_, reason in fleet.notes} == {300}


# The plan follows the load


def _scale(service: _Service, scaler: PlanScaler, load: Load, rows: int, seconds: int) -> None:
    for _ in range(seconds):
        service.busy_s += 0.1
        service.look()
        use = {("model", layer): np.full(4, rows) for layer in range(2)}
        service.fleet.routers.report("router", RouterLoad(load, use), service.now_s)
        service.plan, _ = scaler.look(service.plan, service.fleet, ROOMS, None, service.now_s)


def test_idle_service_goes_down_to_no_actor_and_comes_back_with_the_first_requests() -> None:
    service, scaler = _running(), PlanScaler(Scaling(ScalerSettings(max_actors=2), expert_bytes=10))
    _scale(service, scaler, Load(4, 0, 8), 10, 5)
    assert len(service.plan.actors) == 2
    _scale(service, scaler, Load(0, 0, 8), 0, int(REST_AFTER_S) + 5)
    assert scaler.state == "rest"
    assert service.plan.actors == ()
    service.settle()
    assert service.pool.specs == {}
    _scale(service, scaler, Load(4, 0, 8), 10, 3)
    service.settle()
    assert sorted(spec.group for spec in service.pool.specs.values()) == sorted(g.keys for g in PLAN.groups)


def test_requests_that_are_over_when_their_router_reports_wake_an_idle_service() -> None:
    service, scaler = _running(), PlanScaler(Scaling(ScalerSettings(max_actors=2), expert_bytes=10))
    _scale(service, scaler, Load(0, 0, 8), 0, int(REST_AFTER_S) + 5)
    assert (scaler.state, service.plan.actors) == ("rest", ())
    _scale(service, scaler, Load(0, 0, 8), 10, 1)
    assert (scaler.state, len(service.plan.actors)) == ("wake", 2)


def test_nothing_changes_before_a_router_has_told_its_load() -> None:
    service, scaler = _running(), PlanScaler(Scaling(ScalerSettings(max_actors=2), expert_bytes=10))
    for _ in range(3):
        service.now_s += 100.0
        plan, decisions = scaler.look(service.plan, service.fleet, ROOMS, None, service.now_s)
        assert (plan, decisions) == (PLAN, ())


def test_plan_without_groups_is_a_plan() -> None:
    assert wanted_actors(SPEC, ServicePlan((), ())) == ()


@pytest.mark.parametrize(("read_bytes_s", "num_actors"), [(10.0, 4), (1e9, 2), (0.0, 4)])
def test_slow_disk_of_the_routers_keeps_a_spare_of_every_group(read_bytes_s: float, num_actors: int) -> None:
    service = _running()
    scaling = Scaling(ScalerSettings(max_actors=4), 10, experts_per_token=2, read_bytes_s=read_bytes_s)
    scaler = PlanScaler(scaling)
    for _ in range(5):
        service.look()
        use = {("model", layer): np.full(4, 10) for layer in range(2)}
        service.fleet.routers.report("router", RouterLoad(Load(4, 0, 8), use), service.now_s)
        rooms = {**ROOMS, "other": 80}
        service.plan, _ = scaler.look(service.plan, service.fleet, rooms, None, service.now_s)
    assert len(service.plan.actors) == num_actors
    assert all(len(owners) == num_actors // 2 for owners in service.plan.owners().values())


def test_lost_group_belongs_to_who_has_it_on_disk_until_it_is_replaced() -> None:
    service = _running()
    service.fleet.fallbacks = dict.fromkeys(KEYS, ("experts-1", "gone"))
    service.look()
    assert service.fleet.roster.fallbacks[KEYS[0]] == ("experts-1", "gone")
    lost = [key for key in KEYS if service.fleet.roster.owners[key] == ("experts-0",)]
    service.dead = {"experts-0"}
    service.look()
    assert {service.fleet.roster.owners[key] for key in lost} == {("experts-1",)}
    service.dead = set()
    service.settle()
    assert all(service.fleet.roster.owners[key][0].startswith("experts-0") for key in lost)


def test_group_that_is_to_have_no_actor_stays_with_the_routers() -> None:
    service = _running()
    service.fleet.fallbacks = dict.fromkeys(KEYS, ("experts-1",))
    service.apply(PLAN.actors[1])
    service.settle()
    left = {key for group in PLAN.groups if group.name == "experts-0" for key in group.keys}
    assert not left & service.fleet.roster.owners.keys()
