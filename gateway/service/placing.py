"""Places a service on the machines of a Ray cluster: asks them, plans, and says what was decided.

Called by `gateway.service.launch` once it is connected; the decision is `cluster.placement`'s. Starts nothing but the
short-lived actors that ask.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.demand import Demand
from cluster.device_plan import DEVICE_TIER, HOST_TIER, Process, plan_devices
from cluster.disk_copies import DiskCopyPlan, disk_nodes, plan_disk_copies
from cluster.errors import ClusterRefused
from cluster.machine_facts import code_digest
from cluster.memory_plan import TIER, MemoryPlan, ProcessMemory, choose_requests, plan_memory
from cluster.model_sizes import ModelSizes, measure_model
from cluster.node_report import ExpertShape, NodeReport, StoreQuestion
from cluster.node_rooms import RoomRules, make_topology, node_names
from cluster.placement import PlacementOptions, place
from cluster.plan import ServicePlan
from cluster.service_spec import Placing
from cluster.topology import Topology
from experts.budget import FIT, BudgetRequest, ExpertBytes
from experts.errors import BudgetTooSmall, ExpertError
from experts.store import ExpertStore
from experts.trust_ledger import ledger_path
from gateway.errors import OptionInvalid
from gateway.planning.demand import learned_demand, traced_demand
from gateway.service.memory import CARD_BYTES, SERVICE_BASE, card_of, measure_stored
from gateway.service.options import ServiceOptions
from gateway.service.state_folder import resolve_state_folder
from router.footprint import Footprint, measure_footprint
from router.loading import EngineOptions, chosen_dtype
from router.trust_session import trust_identity

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placed:
    """What was decided, and from what."""

    plan: ServicePlan
    placing: Placing
    memory: MemoryPlan
    """The routers on their machine, and every actor on its own."""
    names: dict[str, str]
    """What nodes are called, by id."""
    refused: dict[str, str]
    """Why nodes hold nothing, by id."""
    copies: DiskCopyPlan
    """On how many disks experts will be, as far as is known before anything runs."""
    demand_source: str
    unknown_budgets: tuple[str, ...] = ()
    """Names in `node-budgets` that mean none of the nodes."""

    @property
    def topology(self) -> Topology:
        return self.placing.topology


@dataclass(frozen=True)
class _Model:
    """What the store says."""

    sizes: ModelSizes
    footprint: Footprint
    stored: ExpertBytes
    question: StoreQuestion


def place_service(options: ServiceOptions, engine: EngineOptions) -> Placed:
    """Raises ClusterRefused, NoRoomForExperts, TraceInvalid, BudgetTooSmall, NodeTooSmall or OptionInvalid."""
    from cluster.ray_topology import gather

    store = ExpertStore.open(options.store_root)
    try:
        model = _read_model(store, options, engine)
        demand, demand_source = _demand(store, options, model.sizes)
    finally:
        store.close()
    reports = gather(model.question)
    here = next((report for report in reports if report.is_here), None)
    if here is None or here.machine is None:
        reason = here.problem if here else "it is none of them"
        raise ClusterRefused(f"this machine's own node tells nothing: {reason}", "see sage-moe doctor")
    memory = _router_memory(options, model, here, has_others=len(reports) > 1)
    rules = _rules(options, model, memory)
    try:
        topology, refused = make_topology(reports, rules)
    except ValueError as error:
        raise ClusterRefused(str(error), "see sage-moe doctor") from error
    placing = Placing(topology, demand, _placement(options), rules, model.question)
    plan = place(topology, demand, None, placing.options)
    names = {report.node_id: report.name for report in reports}
    return Placed(
        plan,
        placing,
        _whole_memory(memory, plan, demand, names, rules),
        names,
        refused,
        plan_disk_copies(demand.sizes, disk_nodes(plan, topology, {})),
        demand_source,
        _unknown(options, reports),
    )


def _read_model(store: ExpertStore, options: ServiceOptions, engine: EngineOptions) -> _Model:
    sizes = measure_model(store.manifest.config, chosen_dtype(store, engine), store.quantised)
    config = sizes.config
    records = [store.record(key) for key in store.expert_keys(store.served.name)]
    question = StoreQuestion(
        str(options.store_root.resolve()),
        store.hash,
        ExpertShape(config.hidden_size, config.expert_width, str(sizes.dtype).removeprefix("torch.")),
        tuple(dict.fromkeys(part.file for record in records for part in record.parts)),
        options.store_cache.folder if options.store_cache else None,
        options.has_cards,
    )
    return _Model(sizes, measure_footprint(store, engine), measure_stored(store), question)


def _demand(store: ExpertStore, options: ServiceOptions, sizes: ModelSizes) -> tuple[Demand, str]:
    """How often experts are used, and how that is known."""
    if options.demand_trace is not None:
        return traced_demand(options.demand_trace, sizes), f"as in the trace {options.demand_trace}"
    try:
        identity = trust_identity(store)
        folder: Path = resolve_state_folder(options.state_dir)
        learned = learned_demand(ledger_path(folder, identity.store_hash), identity, sizes)
    except ExpertError as error:
        logger.warning("what was learned about experts is not used: %s", error)
        learned = None
    if learned is not None:
        return learned, "as learned (sage-moe store trust)"
    return sizes.uniform_demand(), "even: nothing is known of it yet"


def _placement(options: ServiceOptions) -> PlacementOptions:
    return PlacementOptions(options.grouping, options.max_num_seqs, options.replicas)


def _router_memory(
    options: ServiceOptions, model: _Model, here: NodeReport, *, has_others: bool
) -> MemoryPlan:
    """Of the routers' machine, without expert actors; has_others: whether there are machines whose replicas may come to
    it, which none does where the router or all actors are on cards."""
    node, footprint = node_names(here), model.footprint
    takes_replicas = has_others and options.expert_device != "cuda"
    base = replace(
        SERVICE_BASE,
        others=SERVICE_BASE.others + (_actor_bytes(options, footprint) if takes_replicas else 0),
    )
    for_all = _router_requests(options)
    requests = choose_requests(for_all, options.node_budgets, node)
    if options.device.type != "cpu":
        router = Process("router", True, True, footprint.experts, model.stored)
        card = card_of(options.device)
        return plan_devices((router,), requests, options.host_budgets, footprint, card, node, SERVICE_BASE)
    try:
        return plan_memory(requests, footprint, (), node, base, options.num_routers)
    except BudgetTooSmall as error:
        if requests == for_all:
            raise
        raise OptionInvalid(f"node-budgets: {node.name}", str(error)) from error


def _router_requests(options: ServiceOptions) -> tuple[BudgetRequest, ...]:
    """On a CPU it has host memory, of which `expert_budgets` are not where actors are on cards."""
    are_cards_others = options.device.type == "cpu" and options.expert_device != "cpu"
    return options.host_budgets or (FIT,) if are_cards_others else options.expert_budgets


def _actor_bytes(options: ServiceOptions, footprint: Footprint) -> int:
    return SERVICE_BASE.expert_actor + options.num_routers * footprint.actor_buffer_bytes


def _rules(options: ServiceOptions, model: _Model, memory: MemoryPlan) -> RoomRules:
    cache, footprint = options.store_cache, model.footprint
    # Every router keeps its experts in a process of its own.
    room = memory.budget_bytes // options.num_routers
    return RoomRules(
        footprint.experts,
        _actor_bytes(options, footprint),
        room,
        options.expert_budgets,
        options.node_budgets,
        cache is not None,
        cache.limit_bytes if cache else None,
        code_digest(),
        options.expert_device,
        options.device.type != "cpu",
        CARD_BYTES + options.num_routers * footprint.actor_buffer_bytes,
        options.host_budgets,
        model.stored,
    )


def _whole_memory(
    memory: MemoryPlan, plan: ServicePlan, demand: Demand, names: dict[str, str], rules: RoomRules
) -> MemoryPlan:
    """The routers with what the plan leaves them, and every actor."""
    own_bytes = sum(demand.sizes[key] for key in plan.router_keys)
    routers = tuple(
        replace(process, budget_bytes=plan.router_budget_bytes or 0, expert_bytes=own_bytes)
        for process in memory.routers
    )
    sizes = {group.name: sum(demand.sizes[key] for key in group.keys) for group in plan.groups}
    base = SERVICE_BASE.expert_actor
    on_host = [
        ProcessMemory(
            process=actor.name,
            base_bytes=base,
            backbone_bytes=0,
            kv_bytes=0,
            swap_bytes=0,
            buffer_bytes=rules.actor_bytes - base,
            budget_bytes=(actor.budget_bytes if actor.host_budget_bytes is None else actor.host_budget_bytes)
            or 0,
            expert_bytes=sizes[actor.group],
            node=names.get(actor.node_id or "", ""),
            tier=TIER if actor.host_budget_bytes is None else HOST_TIER,
        )
        for actor in plan.actors
    ]
    actors = tuple(
        row
        if row.tier == TIER
        else replace(row, base_bytes=CARD_BYTES, budget_bytes=actor.budget_bytes or 0, tier=DEVICE_TIER)
        for actor, row in zip(plan.actors, on_host, strict=True)
    )
    behind = tuple(row for row in on_host if row.tier == HOST_TIER)
    return replace(memory, processes=(*routers, *actors), behind=(*memory.behind, *behind))


def _unknown(options: ServiceOptions, reports: Sequence[NodeReport]) -> tuple[str, ...]:
    nodes = [node_names(report) for report in reports if report.machine is not None]
    known = {name for node in nodes for name in (node.name, *node.aliases)}
    return tuple(sorted(set(options.node_budgets) - known))
