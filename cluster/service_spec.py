"""What a service is told to keep running, and what follows for each of its expert actors. Plain values.

Made by `gateway.service.launch`; read by `cluster.supervisor`, from whose plan it may depart later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.addresses import LOOPBACK
from cluster.autoscaler import ScalerSettings
from cluster.demand import Demand
from cluster.node_report import StoreQuestion
from cluster.node_rooms import RoomRules
from cluster.placement import PlacementOptions
from cluster.plan import ActorPlan, CardShare, ExpertGroup, ServicePlan
from cluster.reconcile import WantedActor
from cluster.topology import Topology
from experts.actor import ActorSpec
from experts.eviction import DEFAULT_EVICTION, Eviction
from experts.store_source import CacheSpec, StoreSource
from extraction.manifest import ExpertKey


@dataclass(frozen=True)
class Scaling:
    """How the plan follows the load."""

    settings: ScalerSettings
    expert_bytes: int
    """Of one expert in memory."""
    experts_per_token: int = 0
    """Of a layer."""
    read_bytes_s: float = float("inf")
    """How fast routers read experts from their own copy of the store. 0 where they have none."""
    interval_s: float = 1.0
    """Between two looks."""
    card_share: CardShare | None = None
    """Of every new actor, where actors compute on the cards of one machine."""


@dataclass(frozen=True)
class Placing:
    """How the plan follows the machines."""

    topology: Topology
    """As of the start."""
    demand: Demand
    options: PlacementOptions
    rules: RoomRules
    question: StoreQuestion
    """What machines that join are asked."""


@dataclass(frozen=True)
class ServiceSpec:
    """What the supervisor keeps running."""

    store_root: str
    dtype: str
    width: int
    expert_width: int
    plan: ServicePlan
    threads_per_actor: int
    eviction: Eviction = DEFAULT_EVICTION
    is_local_only: bool = True
    """Whether the data plane listens on loopback alone, since all of Ray is on this machine."""
    spin_s: float = 0.0
    """See `TransportLimits`; actors and routers use the same."""
    store_copies: tuple[str, ...] = ()
    """See `ActorSpec`."""
    secret: bytes = field(default=b"", repr=False)
    rooms: Mapping[str, int] = field(default_factory=dict)
    """Node id -> bytes that experts may take there. Of nodes that are not named, what Ray counts as their memory."""
    scaling: Scaling | None = None
    """None leaves the plan as it is."""
    store_source: StoreSource | None = None
    """See `ActorSpec`; None where every machine of the service is known to have the store."""
    cache: CacheSpec | None = None
    record_bytes: Mapping[ExpertKey, int] = field(default_factory=dict)
    """Of every expert's record, where disks are looked after: on one machine there is nothing to gain."""
    placing: Placing | None = None
    """None leaves nodes that the plan does not name to Ray."""
    expert_device: str = "cpu"
    """On which actors compute; `cuda`: on the card of which Ray gives them a share."""

    @property
    def is_one_machine(self) -> bool:
        """Whether an actor without a node may run anywhere, without asking for room."""
        return self.is_local_only and self.placing is None


def actor_spec(
    spec: ServiceSpec, plan: ServicePlan, actor: ActorPlan, name: str, incarnation: int
) -> ActorSpec:
    """Of one of the plan's actors, under the name that it has in Ray."""
    beside = 0
    if spec.placing is not None:
        beside = max(1, sum(other.node_id == actor.node_id for other in plan.actors))
    return ActorSpec(
        name,
        incarnation,
        spec.store_root,
        spec.dtype,
        plan.group(actor.group).keys,
        spec.width,
        spec.expert_width,
        actor.budget_bytes,
        spec.eviction,
        spec.threads_per_actor,
        LOOPBACK if spec.is_local_only else "",
        spec.spin_s,
        spec.secret,
        spec.store_copies,
        actor.name,
        spec.store_source,
        spec.cache,
        beside,
        spec.expert_device if actor.num_gpus else "cpu",
        actor.host_budget_bytes,
    )


def service_of(spec: ServiceSpec) -> str:
    """See `ActorSpec.service`."""
    nobody = ActorPlan("", "")
    return actor_spec(spec, ServicePlan((ExpertGroup("", ()),), ()), nobody, "", 0).service()


def wanted_actors(spec: ServiceSpec, plan: ServicePlan) -> tuple[WantedActor, ...]:
    """Takes a while for many experts; holds until the plan changes."""
    specs = [(actor, actor_spec(spec, plan, actor, "", 0)) for actor in plan.actors]
    return tuple(WantedActor(actor, told.fingerprint(), told.group) for actor, told in specs)
