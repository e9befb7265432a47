"""The Ray shell of an expert worker: opens the store, computes calls that arrive on its socket, tells its state.

Contains no decision. Created by `cluster.supervisor` only, each time with a new incarnation. Importing this brings no
PyTorch in.
"""

from __future__ import annotations

import hmac
import logging
import os
import threading
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from experts.actor_report import ActorIdentity, ActorPulse, DiskReport
from experts.budget import share_of
from experts.cores import num_cores, useful_threads
from experts.errors import ExpertError
from experts.eviction import Eviction
from experts.group_trust import GroupTrust, Scores
from experts.polite_import import import_politely
from experts.roster import Endpoint
from experts.store_source import CacheSpec, StoreSource
from extraction.manifest import ExpertKey

if TYPE_CHECKING:
    from torch import Tensor

    from experts.call import ExpertCall
    from experts.near_store import NearStore

logger = logging.getLogger(__name__)

WARM_UP_LOOK_S = 1.0


@dataclass(frozen=True)
class ActorSpec:
    """Everything an expert actor needs to start."""

    name: str
    """In Ray and in rosters."""
    incarnation: int
    store_root: str
    dtype: str
    group: tuple[ExpertKey, ...]
    width: int
    expert_width: int
    budget_bytes: int | None
    eviction: Eviction
    num_threads: int
    host: str
    """Where its data plane listens; empty means the address of its node in Ray."""
    spin_s: float
    secret: bytes = field(repr=False)
    store_copies: tuple[str, ...] = ()
    """Further folders of the same store, read where it fails."""
    actor: str = ""
    """The plan's actor that it stands for."""
    store_source: StoreSource | None = None
    """Where an actor looks whose machine may not have the store; None means that `store_root` is there."""
    cache: CacheSpec | None = None
    """What it keeps of what came from elsewhere."""
    beside: int = 0
    """Expert actors that share the cores of its machine, this one included, where its number of threads is to follow
    from these; 0 means `num_threads`."""
    device: str = "cpu"
    """What computes; `cuda` is the card that Ray has given to the process. The budget is then of its memory."""
    host_budget_bytes: int | None = None
    """Of experts in host memory behind another device than the CPU; None means no bound."""
    is_first: bool = False
    """Whether its service is starting: the router, which has more to import, then goes first."""

    def fingerprint(self) -> str:
        """Equal for specs that compute the same rows for an expert of both groups, whenever, wherever and within
        whatever budget."""
        return self._sign((self.store_root, self.dtype, self.eviction, self.device))

    def service(self) -> str:
        """Equal for all actors that know the same secret."""
        return self._sign("service")

    def _sign(self, facts: object) -> str:
        return hmac.new(self.secret, repr(facts).encode(), "sha256").hexdigest()


class ExpertActor:
    """One expert group behind a data-plane server."""

    def __init__(self, spec: ActorSpec) -> None:
        if spec.is_first:
            import_politely(
                "experts.worker", "experts.server", "experts.weight_server", "experts.device_proof"
            )
        # Not above: the supervisor imports this class to create actors, and starts a second sooner without PyTorch.
        import torch

        from experts.channel import TransportLimits
        from experts.desk import BusyClock
        from experts.device_proof import prove_experts
        from experts.device_tier import open_tiers
        from experts.devices import resolve_device, settle_arithmetic
        from experts.handshake import ServiceInfo
        from experts.server import ExpertServer
        from experts.weight_server import WeightServer
        from experts.worker import DTYPES, ExpertWorker

        logging.basicConfig(level=logging.INFO)
        torch.set_num_threads(_num_threads(spec))
        dtype = DTYPES[spec.dtype]
        device = resolve_device(spec.device, "expert-device")
        settle_arithmetic(device)
        kernel = prove_experts(spec.width, spec.expert_width, dtype, device)
        self._spec = spec
        self._near = _open_store(spec)
        self._store = self._near.store
        components = tuple(sorted({key.component for key in spec.group}))
        self._trust = GroupTrust(spec.group)
        self._worker = ExpertWorker(
            self._store,
            kernel,
            dtype,
            widths=dict.fromkeys(components, spec.width),
            group=spec.group,
            budget_bytes=spec.budget_bytes,
            eviction=spec.eviction,
            trust=self._trust.score,
            copies=self._near.copies,
            has_guests=True,
            tiers=open_tiers(device, spec.host_budget_bytes),
            is_served=True,
        )
        self._busy = self._worker.desk or BusyClock()
        info = ServiceInfo(spec.width, dtype, self._worker.numerics_class, components)
        self._host = spec.host or str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._server = ExpertServer(
            self._compute,
            info,
            secret=spec.secret,
            incarnation=spec.incarnation,
            host=self._host,
            limits=TransportLimits(spin_s=spec.spin_s),
            desk=self._worker.desk,
        )
        self._server.start()
        self._weights = None
        if spec.store_source is not None:
            self._weights = WeightServer(self._store, secret=spec.secret, host=self._host)
            self._weights.start()
        self._closing = threading.Event()
        # Requests do not wait for this: an expert that is not there yet is read when it is first asked for.
        threading.Thread(target=self._warm_up, name="expert-warm-up", daemon=True).start()

    def identity(self) -> ActorIdentity:
        """Who this is; answered as soon as its data plane listens."""
        spec = self._spec
        return ActorIdentity(
            spec.service(),
            spec.actor,
            spec.incarnation,
            spec.fingerprint(),
            spec.budget_bytes,
            ray.get_runtime_context().get_node_id(),
            self.endpoint(),
            spec.group,
        )

    def pulse(self) -> ActorPulse:
        """How it does; the answer also says that the actor is alive."""
        stats = self._worker.stats
        counts = (stats.rows, stats.hits, stats.misses)
        return ActorPulse(self._busy.num_active, self._busy.busy_s, *counts, self.resident())

    def endpoint(self) -> Endpoint:
        """Where the data plane listens."""
        return Endpoint(self._spec.name, self._host, self._server.port, self._spec.incarnation)

    def weights_address(self) -> tuple[str, int] | None:
        """Host and port where other machines get the records that are on this one's disk."""
        return None if self._weights is None else (self._host, self._weights.port)

    def held(self) -> frozenset[ExpertKey]:
        """Experts, of any group, whose records are on this machine's disk."""
        return self._store.held_experts()

    def disk(self) -> DiskReport:
        """What is on this machine's disk, and how much more may come."""
        free_bytes = self._near.free_bytes()
        held = frozenset[ExpertKey]() if free_bytes is None else self._store.held_experts()
        return DiskReport(self.weights_address(), free_bytes is None, held, free_bytes or 0)

    def hold(self, keys: tuple[ExpertKey, ...]) -> None:
        """Keep these on the disk too; see `NearStore.hold`."""
        self._near.hold(keys)

    def set_source(self, source: StoreSource) -> None:
        """Where records come from that are not here yet; see `NearStore.use`."""
        self._near.use(source, self._spec.secret)

    def resident(self) -> dict[tuple[str, int], frozenset[int]]:
        """Numbers of the experts that are in memory, by component and layer."""
        layers = {(key.component, key.layer) for key in self._spec.group}
        return {layer: self._worker.resident(*layer) for layer in layers}

    def set_trust(self, scores_G: Scores) -> None:
        """Trust from now on, in the order of the spec's group. Raises TrustMismatch."""
        self._trust.tell(scores_G)

    def set_limits(self, budget_bytes: int, share: Fraction) -> None:
        """Keep at most so many bytes and at most this share of the group in memory, and never more than the spec's
        budget. Raises ValueError where that has no bound."""
        self._worker.set_budget(min(budget_bytes, share_of(share, self._worker.group_bytes)))

    def status(self) -> dict[str, Any]:
        """Plain values for `sage-moe status` and metrics."""
        worker, stats = self._worker, self._worker.stats
        return {
            "name": self._spec.name,
            "pid": os.getpid(),
            "incarnation": self._spec.incarnation,
            "group": len(self._spec.group),
            "resident_experts": worker.num_resident,
            "resident_bytes": worker.resident_bytes,
            "budget_bytes": worker.budget_bytes,
            "experts_used": len(stats.experts_used),
            "hits": stats.hits,
            "misses": stats.misses,
            "hit_rates": stats.hit_rates,
            "experts_trusted": self._trust.num_known,
            "bytes_read": stats.bytes_read,
            "rows": stats.rows,
            "behind": None if stats.behind is None else asdict(stats.behind),
            "numerics_class": worker.numerics_class,
            "fingerprint": self._spec.fingerprint(),
            "store": self._near.status(),
        }

    def _compute(self, call: ExpertCall) -> Tensor:
        """On the thread of a router's connection."""
        self._busy.begin_work()
        try:
            return self._worker.compute(call)
        finally:
            self._busy.end_work()

    def stop(self) -> None:
        self._closing.set()
        self._server.stop()
        if self._weights is not None:
            self._weights.stop()
        self._worker.close()
        self._near.close()

    def _warm_up(self) -> None:
        """Read the group into memory once it is on the disk: until then calls fetch first what they need."""
        try:
            # What is kept for others comes after the group, and is not waited for.
            while not (self._near.wait(WARM_UP_LOOK_S) or self._near.has(self._spec.group)):
                if self._closing.is_set():
                    return
            self._worker.load_all()
        except ExpertError as error:
            logger.warning("%s has not read its whole group ahead: %s", self._spec.name, error)


def _num_threads(spec: ActorSpec) -> int:
    if not spec.beside:
        return spec.num_threads
    return useful_threads(max(1, num_cores() // spec.beside), 2 * spec.expert_width * spec.width)


def _open_store(spec: ActorSpec) -> NearStore:
    from experts.near_store import NearStore, open_near  # as in ExpertActor.__init__
    from experts.store import ExpertStore

    if spec.store_source is None:
        return NearStore(ExpertStore.open(Path(spec.store_root)), tuple(map(Path, spec.store_copies)))
    cache = spec.cache.here() if spec.cache is not None else None
    return open_near(spec.store_source, spec.group, cache, spec.secret)
