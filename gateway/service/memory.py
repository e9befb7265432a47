"""Reads this machine's memory and a store's needs, and resolves budgets with them before anything is loaded.

`plan_engine` is for one process (`generate`, `chat`, `batch`), `plan_service` for a service with expert actors. The
decisions are `cluster.memory_plan`'s.
"""

from __future__ import annotations

import platform
import socket
from collections.abc import Mapping
from dataclasses import replace

import psutil
import torch

from cluster.device_plan import Cards, Process, plan_devices
from cluster.memory_plan import (
    BaseMemory,
    MemoryPlan,
    Node,
    choose_requests,
    override_name,
    plan_memory,
    router_names,
)
from cluster.placement import split_experts
from experts.budget import FIT, BudgetRequest, ExpertBytes, measure_experts, resolve_budget
from experts.device_tier import RecordsAsStored
from experts.devices import CPU, CUDA, read_cards, read_device_memory
from experts.errors import BudgetTooSmall
from experts.node_memory import read_node_memory
from experts.quantised import planned_form
from experts.store import ExpertStore
from gateway.errors import OptionInvalid
from router.footprint import measure_footprint
from router.loading import EngineOptions, chosen_dtype
from router.model_config import read_model_config
from router.speech.facts import TALKER

MIB = 1 << 20
THIS_PROCESS = BaseMemory(router=0)
"""What this process is already is no longer available, so it is not counted a second time."""
CARD_BYTES = 512 * MIB
"""What CUDA is taken to keep on a card for each process that computes there; not measured yet."""
SERVICE_BASE = BaseMemory(router=320 * MIB, expert_actor=256 * MIB, others=1536 * MIB, card=CARD_BYTES)
"""Memory of processes that hold nothing yet, shared pages counted once; the others are the command, Ray, Serve, the
gateway and the supervisor. Measured on Linux with Ray 2.60 (docs/memory.md)."""

BATCH_BASE = BaseMemory(router=320 * MIB, others=1024 * MIB)
"""The same of a batch."""


def this_node() -> Node:
    name = platform.node() or "localhost"
    addresses = {
        entry.address.partition("%")[0]
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }
    names = {"localhost", name.partition(".")[0], *addresses} - {name}
    return Node(name, tuple(sorted(names)), read_node_memory())


def plan_engine(
    store: ExpertStore,
    options: EngineOptions,
    requests: tuple[BudgetRequest, ...],
    base: BaseMemory = THIS_PROCESS,
    host_requests: tuple[BudgetRequest, ...] = (),
) -> tuple[EngineOptions, MemoryPlan]:
    """Options with the budgets resolved, for one engine on this machine. base: what is still to be started for it.
    host_requests: of host memory, where the engine computes on another device than the CPU.

    Raises BudgetTooSmall or NodeTooSmall.
    """
    footprint = measure_footprint(store, options)
    if options.device.type != "cpu":
        plan = plan_on_device(store, options, requests, host_requests, this_node(), base)
        budgets = plan.budget_bytes, plan.behind[0].budget_bytes
        return replace(options, expert_budget_bytes=budgets[0], host_budget_bytes=budgets[1]), plan
    plan = plan_memory(requests, footprint, (), this_node(), base)
    return replace(options, expert_budget_bytes=plan.budget_bytes), plan


def with_speech_budget(
    store: ExpertStore, options: EngineOptions, request: BudgetRequest | None
) -> EngineOptions:
    """Options with the budget of the experts that speak; `fit` and None mean all of them. Raises OptionInvalid below
    one expert, and for a budget of a store that has none."""
    keys = store.expert_keys(TALKER)
    if request is None:
        return options
    if not keys:
        raise OptionInvalid("speech-budget", "goes with a store that has a talker; this one has none")
    width = read_model_config(store.component(TALKER).config).hidden_size
    experts = measure_experts(store, keys, planned_form(store, chosen_dtype(store, options), {TALKER: width}))
    try:
        budget_bytes = resolve_budget((request,), experts, experts.total)
    except BudgetTooSmall as error:
        raise OptionInvalid("speech-budget", str(error)) from error
    return replace(options, speech_budget_bytes=budget_bytes)


def plan_on_device(
    store: ExpertStore,
    options: EngineOptions,
    requests: tuple[BudgetRequest, ...],
    host_requests: tuple[BudgetRequest, ...],
    node: Node,
    base: BaseMemory,
) -> MemoryPlan:
    """Of one engine, on the options' device as it is now; see `plan_devices`."""
    footprint = measure_footprint(store, options)
    router = Process("router", True, True, footprint.experts, measure_stored(store))
    return plan_devices(
        (router,), requests or (FIT,), host_requests, footprint, card_of(options.device), node, base
    )


def plan_service_on_cards(
    store: ExpertStore,
    options: EngineOptions,
    num_actors: int,
    expert_device: str,
    requests: tuple[BudgetRequest, ...],
    host_requests: tuple[BudgetRequest, ...],
    node: Node,
    num_routers: int = 1,
) -> MemoryPlan:
    """The same of a service whose router or whose expert actors compute on this machine's cards, as they are now."""
    footprint = measure_footprint(store, options)
    is_router_on_card, are_on_cards = options.device.type != "cpu", expert_device != "cpu"
    width = read_model_config(store.served.config).hidden_size
    form = planned_form(
        store, chosen_dtype(store, options), {store.served.name: width}, CUDA if are_on_cards else CPU
    )
    groups = split_experts(store.expert_keys(store.served.name), num_actors) if num_actors else []
    stored = measure_stored(store)
    processes = [
        *(
            Process(name, True, is_router_on_card, footprint.experts, stored)
            for name in router_names(num_routers)
        ),
        *(
            Process(
                f"experts-{index}",
                False,
                are_on_cards,
                measure_experts(store, group, form),
                measure_experts(store, group, RecordsAsStored()),
            )
            for index, group in enumerate(groups)
        ),
    ]
    if are_on_cards:
        cards = cards_here()
    else:
        cards = card_of(options.device)
    return plan_devices(processes, requests, host_requests, footprint, cards, node, SERVICE_BASE)


def cards_here() -> Cards:
    """This machine's, by the one with the least room."""
    found = read_cards()
    least = min(found, key=lambda memory: memory.available_bytes)
    return Cards(Node("cuda:0" if len(found) == 1 else "cuda", (), least), len(found))


def card_of(device: torch.device) -> Cards:
    """A router's."""
    return Cards(Node(str(device), (), read_device_memory(device)))


def measure_stored(store: ExpertStore) -> ExpertBytes:
    """All experts as the store has them."""
    return measure_experts(store, store.expert_keys(store.served.name), RecordsAsStored())


def plan_service(
    store: ExpertStore,
    options: EngineOptions,
    num_actors: int,
    requests: tuple[BudgetRequest, ...],
    overrides: Mapping[str, BudgetRequest],
    node: Node,
    num_routers: int = 1,
) -> MemoryPlan:
    """Budgets of a service on one node, and what is left of its memory.

    Raises BudgetTooSmall (OptionInvalid where it is a node's own), NodeTooSmall or NodeBudgetTooSmall.
    """
    groups = split_experts(store.expert_keys(store.served.name), num_actors) if num_actors else []
    width = read_model_config(store.served.config).hidden_size
    form = planned_form(store, chosen_dtype(store, options), {store.served.name: width})
    sizes = [measure_experts(store, group, form).total for group in groups]
    chosen = choose_requests(requests, overrides, node)
    try:
        return plan_memory(chosen, measure_footprint(store, options), sizes, node, SERVICE_BASE, num_routers)
    except BudgetTooSmall as error:
        name = override_name(overrides, node)
        if name is None:
            raise
        raise OptionInvalid(f"node-budgets: {name}", str(error)) from error
