"""The Ray shell that alone creates expert actors, and keeps what runs as it is planned.

Detached and named; Ray restarts it. It looks at all actors at once, about once a second, and waits for none; what to
do is decided by `cluster.reconcile`, and where the plan follows the load, by `cluster.autoscaler`. After its own
restart it finds the actors in Ray and the plan in `cluster.service_record`. Called by `gateway.launch` (start, stop),
`cluster.ray_directory` and `sage-moe status`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import ray

from cluster.actor_notices import ActorNotices
from cluster.actor_pool import ActorPool, Answer, Death, short_reason
from cluster.errors import ActorsNotStarted, SupervisorMissing
from cluster.members import (
    Backoff,
    Member,
    Patience,
    checked,
    died,
    failed,
    heard,
    identified,
    recovered,
    turned,
)
from cluster.plan import ServicePlan
from cluster.reconcile import (
    Action,
    Create,
    End,
    Target,
    Turn,
    fits,
    is_settled,
    make_owners,
    reconcile,
    reservation,
)
from cluster.resources import NAMESPACE, SUPERVISOR_NAME, supervisor_options
from cluster.router_book import RouterBook, RouterLoad
from cluster.scaling import PlanScaler
from cluster.service_record import ServiceRecord, forget_record, load_record, save_record
from cluster.service_spec import ServiceSpec, actor_spec, service_of, wanted_actors
from cluster.supervisor_status import actor_entries, decision_entries, pending_entries, plan_entry
from cluster.trust_desk import TrustDesk
from experts.actor_report import ActorIdentity, ActorPulse
from experts.roster import Roster
from experts.trust import TrustReport, TrustTable
from experts.trust_ledger import TrustIdentity
from router.trust_session import TrustOptions

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
MAX_DECISIONS = 200
"""That are remembered for people."""


class Supervisor:
    """Reconciles the plan with what is running."""

    def __init__(self, spec: ServiceSpec) -> None:
        logging.basicConfig(level=logging.INFO)
        self._spec = spec
        self._service = service_of(spec)
        self._patience = Patience()
        self._lock = threading.RLock()
        self._record = load_record(self._service) or ServiceRecord(self._service, spec.plan)
        self._wanted = wanted_actors(spec, self._record.plan)
        self._members: dict[str, Member] = {}
        self._pulses: dict[str, ActorPulse] = {}
        self._backoffs: dict[str, Backoff] = {}
        self._incarnation = 0
        self._roster = Roster(int(time.time() * 1000), {}, {})
        self._told_of: tuple[object, ...] = ()
        self._routers = RouterBook()
        self._rooms: dict[str, int] = {}
        self._decisions: deque[tuple[float, str, str, str]] = deque(maxlen=MAX_DECISIONS)
        self._trust = TrustDesk()
        self._pool = ActorPool()
        self._notices = ActorNotices()
        self._scaler = PlanScaler(spec.scaling) if spec.scaling is not None else None
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconcile", daemon=True)
        self._thread.start()

    # What routers ask and tell

    def secret(self) -> bytes:
        """The data plane's secret, for routers of this Ray cluster."""
        return self._spec.secret

    def spin_s(self) -> float:
        """How long a router's connections look for an answer before they sleep."""
        return self._spec.spin_s

    def roster(self, router: str = "", version: int = -1) -> Roster:
        """Who is where now. version: what the router that asks has carried out."""
        with self._lock:
            if router:
                self._routers.follows(router, version, time.monotonic())
                if self._is_busy():
                    self._wake.set()
            resident = {
                name: self._pulses[name].resident for name in self._roster.endpoints if name in self._pulses
            }
            return replace(self._roster, resident=resident)

    def report_load(self, router: str, report: RouterLoad) -> None:
        """What a router has to do, and what its requests ask of experts."""
        with self._lock:
            self._routers.report(router, report, time.monotonic())

    def report_lost(self, name: str) -> None:
        """A router lost its connection: look at that actor now rather than at the next check."""
        logger.info("a router lost expert actor %s", name)
        with self._lock:
            if name in self._members:
                self._members[name] = replace(self._members[name], is_suspected=True)
        self._wake.set()

    def report_bad(self, name: str, incarnation: int, reason: str) -> None:
        """A router was sent wrong rows: end that actor, and in the end leave its node alone."""
        with self._lock:
            member = self._members.get(name)
            if member is None or member.incarnation != incarnation or member.state == "quarantined":
                return
            now_s = time.monotonic()
            self._members[name] = replace(turned(member, "quarantined", now_s), error=reason[:300])
            node_id = member.node_id or ""
            counts = dict(self._record.quarantines)
            counts[node_id] = counts.get(node_id, 0) + 1
            self._keep(replace(self._record, quarantines=counts))
            self._note("quarantine", name, reason[:300])
        self._wake.set()

    def trust_table(self, identity: TrustIdentity, options: TrustOptions) -> TrustTable:
        """What is kept. Raises LedgerBusy or LedgerUnusable."""
        return self._trust.table(identity, options)

    def add_trust(self, identity: TrustIdentity, options: TrustOptions, report: TrustReport) -> TrustTable:
        """Keep a router's report; see `TrustLedger.add`."""
        return self._trust.add(identity, options, report)

    def set_share(self, share: Fraction) -> None:
        """How much of its group each actor keeps in memory, within its budget; new actors are told too."""
        with self._lock:
            if share != self._record.share:
                self._keep(replace(self._record, share=share))
        self._wake.set()

    # What is to run

    def apply(self, plan: ServicePlan, reason: str = "asked for") -> None:
        """Bring another plan about, without failing a request. Returns at once; see `wait_settled`."""
        wanted = wanted_actors(self._spec, plan)
        with self._lock:
            self._wanted = wanted
            self._keep(replace(self._record, plan=plan))
            self._note("apply", f"{len(plan.actors)} actors", reason)
        self._wake.set()

    def roll(self, reason: str = "asked for") -> None:
        """Replace every actor by a new one, one after another. Returns at once; see `wait_settled`."""
        with self._lock:
            self._incarnation = max(self._incarnation + 1, int(time.time()))
            self._keep(replace(self._record, least_incarnation=self._incarnation))
            self._note("roll", f"{len(self._record.plan.actors)} actors", reason)
        self._wake.set()

    def plan(self) -> ServicePlan:
        """What is to run, as of now."""
        return self._record.plan

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return when every actor of the plan has answered. Raises ActorsNotStarted."""

        def absent() -> str | None:
            target, members = self._target(), self._members.values()
            ready = [member for member in members if member.state == "ready"]
            return next(
                (w.name for w in target.wanted if not any(fits(target, w, m) for m in ready)),
                None,
            )

        self._wait(absent, timeout_s)

    def wait_settled(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return when what runs is what is planned, and nothing else. Raises ActorsNotStarted."""
        self._wait(
            lambda: None if is_settled(self._target(), list(self._members.values())) else "one of the plan's",
            timeout_s,
        )

    def _wait(self, unmet: Callable[[], str | None], timeout_s: float) -> None:
        """Until `unmet` names no actor any more."""
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                name = unmet()
                backoff = self._backoffs.get(name or "")
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
            members, backoffs, record = tuple(self._members.values()), self._backoffs, self._record
            decisions, now_s = tuple(self._decisions), time.monotonic()
        told = self._pool.ask_all([m.name for m in members if m.state == "ready"], STATUS_TIMEOUT_S)
        return {
            "actors": actor_entries(record.plan, members, backoffs, told, now_s),
            "plan": plan_entry(record.plan),
            "pending": pending_entries(members),
            "quarantines": dict(record.quarantines),
            "capacity": self._scaler.state if self._scaler is not None else None,
            "decisions": decision_entries(decisions),
        }

    def shut_down(self) -> None:
        """End every expert actor and let go of the trust ledger. The supervisor itself is ended by its caller."""
        self._closing.set()
        self._wake.set()
        self._thread.join(ANSWER_TIMEOUT_S)
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
            self._wake.wait(BUSY_INTERVAL_S if self._is_busy() else CALM_INTERVAL_S)
            self._wake.clear()

    def _is_busy(self) -> bool:
        return any(member.state != "ready" or not member.is_known for member in list(self._members.values()))

    def _look(self) -> None:
        found, answers, nodes = self._pool.find(), self._pool.hear(HEAR_TIMEOUT_S), _living_nodes()
        now_s = time.monotonic()
        with self._lock:
            if self._closing.is_set():
                return
            for name in found:
                self._members[name] = Member(name, "found", now_s, now_s)
            self._rooms = self._usable(nodes)
            self._observe(answers, now_s)
            target, members = self._target(), tuple(self._members.values())
            taken = self._pool.names_in_use()
            for action in reconcile(target, members, self._backoffs, taken, now_s, self._patience):
                self._carry_out(action, nodes, now_s)
            self._publish(now_s)
            self._tell(now_s)
            self._scale(now_s)

    def _usable(self, nodes: dict[str, int]) -> dict[str, int]:
        """Node id -> room; without nodes that were quarantined too often, unless that leaves none."""
        rooms = {node_id: self._spec.rooms.get(node_id, memory) for node_id, memory in nodes.items()}
        trusted = {
            node_id: room
            for node_id, room in rooms.items()
            if self._record.quarantines.get(node_id, 0) < MAX_QUARANTINES
        }
        return trusted or rooms

    def _target(self) -> Target:
        return Target(self._wanted, self._record.least_incarnation, self._rooms, self._spec.is_local_only)

    def _observe(self, answers: dict[str, Answer], now_s: float) -> None:
        for name, answer in answers.items():
            member = self._members.get(name)
            if member is None:
                continue
            if isinstance(answer, Death):
                member = died(member, answer.error, now_s, self._patience)
            elif isinstance(answer, ActorIdentity):
                member = identified(member, answer, self._service, now_s)
                self._incarnation = max(self._incarnation, member.incarnation)
                self._note(member.state, name, f"incarnation {member.incarnation}")
            else:
                before = self._pulses.get(name)
                is_idle = before is not None and before.rows == answer.rows and not answer.num_active
                member = heard(member, is_idle, now_s)
                self._pulses[name] = answer
            self._members[name] = member
        for name, member in self._members.items():
            follows = self._routers.all_follow(member.told_in, now_s) if member.told_in is not None else False
            if follows is None:
                follows = now_s - member.since_s >= self._patience.settle_s
            self._members[name] = replace(checked(member, now_s, self._patience), is_known=follows)
        self._backoffs = recovered(self._backoffs, self._members.values(), now_s, self._patience)

    def _carry_out(self, action: Action, nodes: dict[str, int], now_s: float) -> None:
        match action:
            case Create():
                self._create(action, nodes, now_s)
            case Turn():
                self._members[action.name] = turned(self._members[action.name], action.state, now_s)
                self._note(action.state, action.name, action.reason)
            case End():
                member = self._members.pop(action.name)
                self._pulses.pop(action.name, None)
                self._pool.end(action.name, member.is_gone)
                if action.is_failure:
                    self._backoffs = failed(self._backoffs, member.actor, member.error, now_s)
                self._note("end", action.name, action.reason)

    def _create(self, action: Create, nodes: dict[str, int], now_s: float) -> None:
        plan, wanted = action.wanted.plan, action.wanted
        self._incarnation = max(self._incarnation + 1, int(time.time()))
        spec = actor_spec(self._spec, self._record.plan, plan, action.name, self._incarnation)
        memory_bytes = 0 if self._spec.is_local_only else reservation(action, nodes, self._members.values())
        self._note("create", action.name, action.reason)
        try:
            self._pool.create(spec, plan, action.node_id, memory_bytes)
        except (ray.exceptions.RayError, ValueError) as error:
            self._backoffs = failed(self._backoffs, plan.name, short_reason(error), now_s)
            return
        self._members[action.name] = Member(
            action.name,
            "starting",
            now_s,
            now_s,
            plan.name,
            wanted.fingerprint,
            self._incarnation,
            action.node_id,
            plan.budget_bytes,
            wanted.keys,
            is_waiting_for_node=action.is_waiting_for_node,
        )

    def _publish(self, now_s: float) -> None:
        """Make a new roster where it differs from the last one."""
        members = tuple(self._members.values())
        told_of = (self._wanted, *((m.name, m.state, m.incarnation) for m in members))
        if told_of != self._told_of:
            self._told_of = told_of
            endpoints = {
                m.name: m.endpoint for m in members if m.endpoint and m.state in ("ready", "draining")
            }
            owners = make_owners(self._target(), members)
            if (endpoints, owners) != (self._roster.endpoints, self._roster.owners):
                version = max(self._roster.version, self._routers.highest_version()) + 1
                self._roster = Roster(version, endpoints, owners)
        for member in members:
            if member.told_in is None:
                self._members[member.name] = replace(member, told_in=self._roster.version)

    def _tell(self, now_s: float) -> None:
        budgets = {actor.name: actor.budget_bytes for actor in self._record.plan.actors}
        bounded = {
            name: member
            for name, member in self._members.items()
            if member.state == "ready" and member.budget_bytes is not None
        }
        limits = {}
        for name, member in bounded.items():
            budget_bytes = budgets.get(member.actor) or member.budget_bytes or 0
            limits[name] = (budget_bytes, self._record.share)
        told = {name: (member, self._pool.handle(name)) for name, member in bounded.items()}
        self._notices.tell(told, limits, self._trust.known(), now_s)

    def _scale(self, now_s: float) -> None:
        if self._scaler is None:
            return
        members = tuple(self._members.values())
        plan, decisions = self._scaler.look(
            self._record.plan, members, self._pulses, self._routers, self._rooms, self._trust.known(), now_s
        )
        for decision in decisions:
            self._note(decision.kind, decision.actor, decision.reason)
        if decisions:
            self.apply(plan, f"{len(decisions)} decisions of the autoscaler")

    def _keep(self, record: ServiceRecord) -> None:
        self._record = record
        save_record(record)

    def _note(self, kind: str, name: str, reason: str) -> None:
        """For people."""
        logger.info("%s %s: %s", kind, name, reason)
        self._decisions.append((time.time(), kind, name, reason))


def _living_nodes() -> dict[str, int]:
    """Node id -> bytes of memory that Ray counts there."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"]: int(node["Resources"].get("memory", 0)) for node in nodes if node["Alive"]}


def start_supervisor(spec: ServiceSpec) -> Any:
    """Create the supervisor, or raise ValueError when one of this name runs already. Returns its handle."""
    return ray.remote(Supervisor).options(**supervisor_options()).remote(spec)


def find_supervisor() -> Any:
    """The running supervisor's handle. Raises SupervisorMissing."""
    try:
        return ray.get_actor(SUPERVISOR_NAME, namespace=NAMESPACE)
    except ValueError as error:
        raise SupervisorMissing(str(error).splitlines()[0]) from error


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
