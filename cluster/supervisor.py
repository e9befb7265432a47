"""The Ray shell that alone creates expert actors, replaces dead ones, and tells routers who is where.

Detached and named. After its own restart it adopts the actors it finds by name; an actor that answers with
another group than the plan's is an orphan and is ended. Decides nothing itself: who owns what is
`cluster.placement`. Called by `gateway.launch` (start, stop), `cluster.ray_directory` and `sage-moe status`.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import ray

from cluster.errors import ActorsNotStarted, SupervisorMissing
from cluster.placement import split_experts
from cluster.resources import NAMESPACE, SUPERVISOR_NAME, expert_actor_options, supervisor_options
from experts.actor import ActorSpec, ExpertActor
from experts.eviction import DEFAULT_EVICTION, Eviction
from experts.group_trust import HandDown, group_scores
from experts.near_store import CacheSpec, StoreSource
from experts.roster import ResidentExperts, Roster
from experts.store import ExpertStore
from experts.transport import Endpoint
from experts.trust import TrustReport, TrustTable
from experts.trust_ledger import TrustIdentity, TrustLedger
from router.trust_session import TrustOptions, open_local_ledger

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 1.0
START_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 10.0
BACKOFF_LIMIT_S = 30.0


@dataclass(frozen=True)
class ServiceSpec:
    """What the supervisor keeps running."""

    store_root: str
    dtype: str
    width: int
    expert_width: int
    num_actors: int
    threads_per_actor: int
    eviction: Eviction = DEFAULT_EVICTION
    actor_budgets: tuple[int, ...] = ()
    """Bytes of experts that each actor keeps, in the order of their groups; without any, no bound."""
    host: str = "127.0.0.1"
    spin_s: float = 0.0
    """See `TransportLimits`; actors and routers use the same."""
    store_copies: tuple[str, ...] = ()
    """See `ActorSpec`."""
    secret: bytes = field(default=b"", repr=False)
    store_source: StoreSource | None = None
    """See `ActorSpec`; None where every machine of the service is known to have the store."""
    cache: CacheSpec | None = None


@dataclass
class _Member:
    """One expert actor as the supervisor sees it."""

    spec: ActorSpec
    handle: Any = None
    endpoint: Endpoint | None = None
    resident: ResidentExperts = field(default_factory=dict)
    told_share: tuple[int, Fraction] | None = None
    """The incarnation that was told, and what."""
    failures: int = 0
    retry_at: float = 0.0
    last_error: str = ""


class Supervisor:
    """Reconciles the plan with what is running, about once a second."""

    def __init__(self, spec: ServiceSpec) -> None:
        logging.basicConfig(level=logging.INFO)
        self._spec = spec
        self._lock = threading.Lock()
        self._version = int(time.time())
        self._members = [_Member(member) for member in self._plan()]
        self._ledger: TrustLedger | None = None
        self._trust_options: TrustOptions | None = None
        self._ledger_lock = threading.Lock()
        self._hand_down = HandDown()
        self._share = Fraction(1)
        self._closing = threading.Event()
        self._wake = threading.Event()
        threading.Thread(target=self._run, name="reconcile", daemon=True).start()

    def secret(self) -> bytes:
        """The data plane's secret, for routers of this Ray cluster."""
        return self._spec.secret

    def spin_s(self) -> float:
        """How long a router's connections look for an answer before they sleep."""
        return self._spec.spin_s

    def roster(self) -> Roster:
        """Who is where now."""
        with self._lock:
            endpoints = {m.spec.name: m.endpoint for m in self._members if m.endpoint is not None}
            owners = {key: (m.spec.name,) for m in self._members for key in m.spec.group}
            resident = {m.spec.name: m.resident for m in self._members if m.endpoint is not None}
            return Roster(self._version, endpoints, owners, resident)

    def report_lost(self, name: str) -> None:
        """A router lost its connection: look at that actor now rather than at the next check."""
        logger.info("router lost expert actor %s", name)
        self._wake.set()

    def trust_table(self, identity: TrustIdentity, options: TrustOptions) -> TrustTable:
        """What is kept. Raises LedgerBusy or LedgerUnusable."""
        return self._owned_ledger(identity, options).table()

    def add_trust(self, identity: TrustIdentity, options: TrustOptions, report: TrustReport) -> TrustTable:
        """Keep a router's report; see `TrustLedger.add`."""
        return self._owned_ledger(identity, options).add(report)

    def set_share(self, share: Fraction) -> None:
        """How much of its group each actor keeps in memory, within its budget; new actors are told too."""
        self._share = share
        self._wake.set()

    def _owned_ledger(self, identity: TrustIdentity, options: TrustOptions) -> TrustLedger:
        with self._ledger_lock:
            if self._ledger is None:
                self._ledger, self._trust_options = open_local_ledger(identity, options), options
            return self._ledger

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return when every actor has answered. Raises ActorsNotStarted."""
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                absent = [member for member in self._members if member.endpoint is None]
            if not absent:
                return
            if time.monotonic() > deadline or absent[0].failures >= 3:
                raise ActorsNotStarted(absent[0].spec.name, absent[0].last_error or "no answer in time")
            time.sleep(0.05)

    def status(self) -> list[dict[str, Any]]:
        """One entry an actor: name, state, node, and what the actor says of itself."""
        with self._lock:
            members = [(m.spec, m.handle, m.endpoint) for m in self._members]
        asked = [handle.status.remote() if endpoint and handle else None for _, handle, endpoint in members]
        entries = []
        for (spec, _, endpoint), answer in zip(members, asked, strict=True):
            entry: dict[str, Any] = {"name": spec.name, "group": len(spec.group), "state": "starting"}
            if answer is not None and endpoint is not None:
                entry |= {"node": endpoint.host, "state": "ready"}
                try:
                    entry |= ray.get(answer, timeout=ANSWER_TIMEOUT_S)
                except (ray.exceptions.RayError, TimeoutError):
                    entry["state"] = "lost"
            entries.append(entry)
        return entries

    def shut_down(self) -> None:
        """End every expert actor and let go of the trust ledger. The supervisor itself is ended by its caller."""
        self._closing.set()
        self._wake.set()
        with self._ledger_lock:
            if self._ledger is not None:
                self._ledger.close()
        with self._lock:
            for member in self._members:
                if member.handle is not None:
                    ray.kill(member.handle)

    def _plan(self) -> list[ActorSpec]:
        spec = self._spec
        if spec.num_actors == 0:
            return []
        store = ExpertStore.open(Path(spec.store_root))
        groups = split_experts(store.expert_keys(store.served.name), spec.num_actors)
        store.close()
        return [
            ActorSpec(
                f"experts-{index}",
                0,
                spec.store_root,
                spec.dtype,
                group,
                spec.width,
                spec.expert_width,
                spec.actor_budgets[index] if spec.actor_budgets else None,
                spec.eviction,
                spec.threads_per_actor,
                spec.host,
                spec.spin_s,
                spec.secret,
                spec.store_copies,
                spec.store_source,
                spec.cache,
            )
            for index, group in enumerate(groups)
        ]

    def _run(self) -> None:
        while not self._closing.is_set():
            starting = [member for member in self._members if self._is_due(member)]
            for member in starting:
                self._create(member)
            for member in starting:
                self._await_endpoint(member)
            self._tell_actors()
            self._wake.wait(CHECK_INTERVAL_S)
            self._wake.clear()

    def _tell_actors(self) -> None:
        """What actors with a bound go by: trust, and the share of their group that they may keep."""
        with self._ledger_lock:
            table = self._ledger.table() if self._ledger is not None else None
            options = self._trust_options
        now_s = time.monotonic()
        for member in self._members:
            if member.endpoint is None or member.spec.budget_bytes is None:
                continue
            name, incarnation, share = member.spec.name, member.spec.incarnation, self._share
            if member.told_share != (incarnation, share) and self._tell(member.handle.set_share, share):
                member.told_share = (incarnation, share)
            if table is None or options is None:
                continue
            if self._hand_down.is_due(name, incarnation, table.num_tokens, now_s):
                scores_G = group_scores(table, options.settings, member.spec.group)
                if self._tell(member.handle.set_trust, scores_G):
                    self._hand_down.note(name, incarnation, table.num_tokens, now_s)

    def _tell(self, method: Any, value: object) -> bool:
        """Whether an actor has taken it; one call at a time, since an actor's may overtake each other."""
        try:
            ray.get(method.remote(value), timeout=ANSWER_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            logger.warning("an expert actor was not told: %s", type(error).__name__)
            return False
        return True

    def _is_due(self, member: _Member) -> bool:
        """Whether a member has to be (re)created now."""
        if member.endpoint is not None and self._answers(member):
            return False
        if member.endpoint is not None:
            logger.warning("expert actor %s is gone", member.spec.name)
            self._set_endpoint(member, None)
        return time.monotonic() >= member.retry_at

    def _answers(self, member: _Member) -> bool:
        """Whether a member is the one that it was; notes what it holds."""
        asked = [member.handle.endpoint.remote(), member.handle.resident.remote()]
        try:
            endpoint, member.resident = ray.get(asked, timeout=ANSWER_TIMEOUT_S)
            return bool(endpoint == member.endpoint)
        except (ray.exceptions.RayError, TimeoutError):
            return False

    def _create(self, member: _Member) -> None:
        if self._closing.is_set() or self._adopt(member):
            return
        incarnation = max(member.spec.incarnation + 1, int(time.time()))
        member.spec = replace(member.spec, incarnation=incarnation)
        options = expert_actor_options(member.spec.name, member.spec.num_threads)
        try:
            member.handle = ray.remote(ExpertActor).options(**options).remote(member.spec)
        except (ray.exceptions.RayError, ValueError) as error:
            self._failed(member, error)

    def _adopt(self, member: _Member) -> bool:
        """Take over an actor of this name that answers; end one that does not, or is not ours."""
        try:
            handle: Any = ray.get_actor(member.spec.name, namespace=NAMESPACE)
        except ValueError:
            return False
        try:
            status: dict[str, Any] = ray.get(handle.status.remote(), timeout=ANSWER_TIMEOUT_S)
            if status["fingerprint"] == member.spec.fingerprint():
                member.handle = handle
                member.spec = replace(member.spec, incarnation=status["incarnation"])
                return True
        except (ray.exceptions.RayError, TimeoutError):
            logger.warning("an actor named %s exists and does not answer; ending it", member.spec.name)
        ray.kill(handle)
        _wait_name_free(member.spec.name)
        return False

    def _await_endpoint(self, member: _Member) -> None:
        if member.handle is None or self._closing.is_set():
            return
        try:
            endpoint = ray.get(member.handle.endpoint.remote(), timeout=START_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            self._failed(member, error)
            return
        member.failures = 0
        self._set_endpoint(member, endpoint)

    def _failed(self, member: _Member, error: Exception) -> None:
        member.failures += 1
        member.retry_at = time.monotonic() + min(BACKOFF_LIMIT_S, 0.5 * 2**member.failures)
        member.last_error = str(error).strip().splitlines()[-1][:300]
        logger.error("expert actor %s failed to start: %s", member.spec.name, member.last_error)
        member.handle = None

    def _set_endpoint(self, member: _Member, endpoint: Endpoint | None) -> None:
        with self._lock:
            member.endpoint, member.resident = endpoint, {}
            self._version += 1


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
        ray.get(supervisor.shut_down.remote(), timeout=ANSWER_TIMEOUT_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        logger.warning("the supervisor did not shut its actors down: %s", error)
    ray.kill(supervisor)


def _wait_name_free(name: str, timeout_s: float = 10.0) -> None:
    """Ray frees a killed actor's name a moment later."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return
        time.sleep(0.05)
