"""The Ray shell that alone creates expert actors, and keeps what runs as it is planned.

Detached and named; Ray restarts it. It looks at all actors at once, about once a second, and waits for none; what to do
is decided by `cluster.reconcile`, and where the plan follows the load, by `cluster.autoscaler`. After its own restart
it finds the actors in Ray and the plan in `cluster.service_record`. Called by `gateway.service.launch` (start, stop),
`cluster.ray_directory` and `sage-moe status`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import ray

from cluster.actor_notices import ActorNotices
from cluster.actor_pool import ActorPool
from cluster.disk_keeper import DiskKeeper
from cluster.errors import ActorsNotStarted, SupervisorMissing
from cluster.fleet import SHOWN_ID_CHARS, Fleet
from cluster.living_nodes import living_nodes, unreached
from cluster.node_watch import NodeWatch
from cluster.plan import ServicePlan
from cluster.reconcile import Target, is_settled, missing_actor
from cluster.resources import supervisor_options
from cluster.router_book import RouterLoad
from cluster.scaling import PlanScaler, where_it_runs
from cluster.service_record import ServiceRecord, forget_record, load_record, save_record
from cluster.service_spec import ServiceSpec, service_of, wanted_actors
from cluster.supervisor_handle import find_supervisor
from cluster.supervisor_status import actor_entries, disks_entry, note_entries, pending_entries, plan_entry
from cluster.trust_desk import TrustDesk
from experts.roster import ResidentExperts, Roster
from experts.trust import TrustReport, TrustTable
from experts.trust_ledger import TrustIdentity
from router.trust_options import TrustOptions

logger = logging.getLogger(__name__)

CALM_INTERVAL_S, BUSY_INTERVAL_S = 1.0, 0.1
"""Between two looks: while nothing changes, and while something does."""
HEAR_TIMEOUT_S = 0.3
STATUS_TIMEOUT_S = 3.0
START_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 10.0
MAX_FAILURES_AT_START = 3
MAX_QUARANTINES = 3
"""Of actors of one node, after which nothing is placed there."""


class Supervisor:
    """Reconciles the plan with what is running."""

    def __init__(self, spec: ServiceSpec) -> None:
        logging.basicConfig(level=logging.INFO)
        self._spec = spec
        self._lock = threading.RLock()
        service = service_of(spec)
        self._record = load_record(service) or ServiceRecord(service, spec.plan)
        self._wanted = wanted_actors(spec, self._record.plan)
        self._pool = ActorPool()
        self._fleet = Fleet(spec, self._pool)
        self._rooms: Mapping[str, int] = {}
        self._cut_off: frozenset[str] = frozenset()
        self._trust = TrustDesk()
        self._notices = ActorNotices()
        can_add_machines = not spec.is_one_machine
        self._scaler = PlanScaler(spec.scaling, can_add_machines) if spec.scaling is not None else None
        self._disks = None
        if spec.record_bytes:
            self._disks = DiskKeeper(spec.record_bytes, spec.store_source, _own_node())
            self._fleet.source_for = self._disks.source_for
        self._nodes = None
        if spec.placing is not None:
            topology = self._record.topology or spec.placing.topology
            self._nodes = NodeWatch(spec.placing, topology, is_scaled=spec.scaling is not None)
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconcile", daemon=True)
        self._thread.start()

    # What routers ask and tell

    def is_begun(self) -> bool:
        """Whether all actors of the plan have been there once, so that a router may begin to ask them."""
        return self._record.is_begun

    def secret(self) -> bytes:
        """The data plane's secret, for routers of this Ray cluster."""
        return self._spec.secret

    def spin_s(self) -> float:
        """How long a router's connections look for an answer before they sleep."""
        return self._spec.spin_s

    def roster(
        self, router: str = "", version: int = -1, share: Fraction | None = None
    ) -> Roster | Mapping[str, ResidentExperts]:
        """Who is where now; where the router that asks has that already, only what actors hold in memory, as in
        `Roster.resident`. version: what the router has carried out. share: of its group, that it wishes every actor to
        keep in memory within its budget."""
        with self._lock:
            fleet = self._fleet
            if router:
                fleet.routers.follows(router, version, share, time.monotonic())
                if fleet.is_changing:
                    self._wake.set()
            there = fleet.roster.endpoints.keys() & fleet.pulses.keys()
            resident = {name: fleet.pulses[name].resident for name in there}
            return resident if version == fleet.roster.version else replace(fleet.roster, resident=resident)

    def report_load(self, router: str, report: RouterLoad) -> None:
        """What a router has to do, and what its requests ask of experts."""
        with self._lock:
            self._fleet.routers.report(router, report, time.monotonic())

    def report_lost(self, name: str) -> None:
        """A router lost its connection: look at that actor now rather than at the next check."""
        logger.info("a router lost expert actor %s", name)
        with self._lock:
            self._fleet.suspect(name)
        self._wake.set()

    def report_bad(self, name: str, incarnation: int, reason: str) -> bool:
        """A router was sent wrong rows: end that actor, and in the end leave its node alone. False where that is to be
        said again, since not all actors have said who they are."""
        with self._lock:
            if not self._fleet.is_acquainted:
                return False
            member = self._fleet.quarantine(name, incarnation, reason, time.monotonic())
            if member is not None and member.node_id is not None:
                counts = dict(self._record.quarantines)
                counts[member.node_id] = counts.get(member.node_id, 0) + 1
                self._keep(replace(self._record, quarantines=counts))
        self._wake.set()
        return True

    def trust_table(self, identity: TrustIdentity, options: TrustOptions) -> TrustTable:
        """What is kept. Raises LedgerBusy or LedgerUnusable."""
        return self._trust.table(identity, options)

    def add_trust(self, identity: TrustIdentity, options: TrustOptions, report: TrustReport) -> TrustTable:
        """Keep a router's report; see `TrustLedger.add`."""
        return self._trust.add(identity, options, report)

    # What is to run

    def apply(self, plan: ServicePlan, reason: str = "asked for") -> None:
        """Bring another plan about, without failing a request. Returns at once; see `wait_settled`."""
        wanted = wanted_actors(self._spec, plan)
        with self._lock:
            self._wanted = wanted
            self._keep(replace(self._record, plan=plan))
            self._fleet.note("apply", _actors(plan), reason)
        self._wake.set()

    def roll(self, reason: str = "asked for") -> None:
        """Replace every actor by a new one, one after another. Returns at once; see `wait_settled`."""
        with self._lock:
            self._keep(replace(self._record, least_incarnation=self._fleet.next_incarnation()))
            self._fleet.note("roll", _actors(self._record.plan), reason)
        self._wake.set()

    def plan(self) -> ServicePlan:
        """What is to run, as of now."""
        return self._record.plan

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return when every actor of the plan has answered. Raises ActorsNotStarted."""
        self._wait(self._missing, timeout_s)

    def _missing(self) -> str | None:
        return missing_actor(self._target(), self._fleet.members.values())

    def wait_settled(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return when what runs is what is planned, and nothing else. Raises ActorsNotStarted."""

        def unmet() -> str | None:
            target, members = self._target(), tuple(self._fleet.members.values())
            name = missing_actor(target, members)
            return name or (None if is_settled(target, members) else "of an earlier plan")

        self._wait(unmet, timeout_s)

    def _wait(self, unmet: Callable[[], str | None], timeout_s: float) -> None:
        """Until `unmet` names no actor any more."""
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                name = unmet()
                backoff = self._fleet.backoffs.get(name or "")
            if name is None:
                return
            is_hopeless = backoff is not None and backoff.failures >= MAX_FAILURES_AT_START
            if is_hopeless or time.monotonic() > deadline:
                raise ActorsNotStarted(name, backoff.error if backoff else "no answer in time")
            time.sleep(0.05)

    def pid(self) -> int:
        """Of the supervisor's process."""
        return os.getpid()

    def status(self) -> dict[str, Any]:
        """Plain values: actors with their states and what they say of themselves, the plan, what waits for a machine,
        and the last decisions with their reasons."""
        with self._lock:
            fleet, record, now_s = self._fleet, self._record, time.monotonic()
            members, notes, backoffs = tuple(fleet.members.values()), tuple(fleet.notes), fleet.backoffs
        told = self._pool.ask_all([m.name for m in members if m.state == "ready"], STATUS_TIMEOUT_S)
        return {
            "actors": actor_entries(record.plan, members, backoffs, told, now_s),
            "plan": plan_entry(record.plan),
            "pending": pending_entries(members),
            "quarantines": dict(record.quarantines),
            "capacity": self._scaler.state if self._scaler is not None else None,
            "decisions": note_entries(notes),
            "disks": disks_entry(self._disks.decision) if self._disks is not None else None,
        }

    def shut_down(self) -> None:
        """End every expert actor and let go of the trust ledger. The supervisor itself is ended by its caller."""
        self._closing.set()
        self._wake.set()
        self._thread.join(ANSWER_TIMEOUT_S)
        if self._nodes is not None:
            self._nodes.close()
        self._trust.close()
        with self._lock:
            forget_record()
            self._pool.end_all()

    # The loop

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._look()
            except Exception:  # nobody else would ever look again
                logger.exception("a look at the actors failed")
            self._wake.wait(BUSY_INTERVAL_S if self._fleet.is_changing else CALM_INTERVAL_S)
            self._wake.clear()

    def _look(self) -> None:
        found, answers, nodes = self._pool.find(), self._pool.hear(HEAR_TIMEOUT_S), living_nodes()
        now_s, memory = time.monotonic(), {node_id: node.memory_bytes for node_id, node in nodes.items()}
        with self._lock:
            doubtful = self._cut_off | self._fleet.doubtful_nodes(answers, now_s)
        cut_off = unreached({node: nodes[node] for node in doubtful if node in nodes})
        with self._lock:
            if self._closing.is_set():
                return
            self._fleet.observe(found, answers, now_s)
            # After that: a machine counts from when an actor that waited for it runs there.
            self._rooms, self._cut_off = self._usable(memory), cut_off
            self._follow_nodes(memory, now_s)
            self._look_after_disks(now_s)
            self._fleet.is_starting = not self._record.is_begun
            self._fleet.act(self._target(), self._record.plan, memory, now_s)
            if not self._record.is_begun and self._missing() is None:
                self._keep(replace(self._record, is_begun=True))
            self._tell(now_s)
            self._scale(now_s)

    def _usable(self, memory: Mapping[str, int]) -> dict[str, int]:
        """Node id -> room; without nodes that were quarantined too often, unless that leaves none."""
        rooms = {node_id: self._spec.rooms.get(node_id, num_bytes) for node_id, num_bytes in memory.items()}
        if self._nodes is not None:
            rooms = self._nodes.rooms(memory, where_it_runs(self._record.plan, self._fleet))
        counts = self._record.quarantines
        trusted = {
            node_id: room for node_id, room in rooms.items() if counts.get(node_id, 0) < MAX_QUARANTINES
        }
        return trusted or rooms

    def _target(self) -> Target:
        least = self._record.least_incarnation
        return Target(self._wanted, least, self._rooms, self._spec.is_one_machine, self._cut_off)

    def _follow_nodes(self, alive: Collection[str], now_s: float) -> None:
        """Plan anew where machines have come or gone."""
        if self._nodes is None:
            return
        self._nodes.find(alive, now_s)
        self._pool.full_nodes = frozenset(alive)  # the plan has used what room there is
        change = self._nodes.look(self._rooms, where_it_runs(self._record.plan, self._fleet), now_s)
        for name, reason in self._nodes.take_refusals().items():
            self._fleet.note("leave out", f"node {name[:SHOWN_ID_CHARS]}", reason)
        if change is not None:
            self._record = replace(self._record, topology=change.topology)
            self.apply(change.plan, change.reason)

    def _look_after_disks(self, now_s: float) -> None:
        if self._disks is None:
            return
        ready = {
            name: (member, self._pool.handle(name))
            for name, member in self._fleet.members.items()
            if member.state == "ready"
        }
        starting = [member for member in self._fleet.members.values() if member.state == "starting"]
        self._disks.look(ready, starting, now_s)
        self._fleet.fallbacks = self._disks.decision.fallbacks

    def _tell(self, now_s: float) -> None:
        """What actors with a bound go by."""
        budgets = {actor.name: actor.budget_bytes for actor in self._record.plan.actors}
        bounded = {
            name: (member, self._pool.handle(name))
            for name, member in self._fleet.members.items()
            if member.state == "ready" and member.budget_bytes is not None
        }
        share = self._fleet.routers.share()
        limits = {
            name: (budgets.get(member.actor) or member.budget_bytes or 0, share)
            for name, (member, _) in bounded.items()
        }
        self._notices.tell(bounded, limits, self._trust.known(), now_s)

    def _scale(self, now_s: float) -> None:
        if self._scaler is None:
            return
        topology = self._nodes.topology if self._nodes is not None else None
        plan, decisions = self._scaler.look(
            self._record.plan, self._fleet, self._rooms, self._trust.known(), now_s, topology
        )
        for decision in decisions:
            self._fleet.note(decision.kind, decision.actor, decision.reason)
        if decisions:
            self.apply(plan, "the autoscaler")

    def _keep(self, record: ServiceRecord) -> None:
        self._record = record
        save_record(record)


def _actors(plan: ServicePlan) -> str:
    number = len(plan.actors)
    return "1 actor" if number == 1 else f"{number} actors"


def _own_node() -> str:
    """Of this process, which runs where the store is."""
    return str(ray.get_runtime_context().get_node_id())


def start_supervisor(spec: ServiceSpec, node_id: str | None = None) -> Any:
    """Create the supervisor, on a node that has the store, or raise ValueError when one of this name runs already.
    Returns its handle."""
    return ray.remote(Supervisor).options(**supervisor_options(node_id)).remote(spec)


def stop_supervisor() -> None:
    """End the expert actors and the supervisor. Does nothing when none runs."""
    try:
        supervisor = find_supervisor()
    except SupervisorMissing:
        return
    try:
        ray.get(supervisor.shut_down.remote(), timeout=2 * ANSWER_TIMEOUT_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        logger.warning("the supervisor did not shut its actors down: %s", error)
    ray.kill(supervisor)
