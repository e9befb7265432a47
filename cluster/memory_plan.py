"""How a node's memory is divided: backbone, cache, buffers, processes, and of the rest the experts. Pure.

Made once by whoever starts processes (`gateway.service.memory`), shown to the user, and passed to those processes: the
expert actors of a node and the router's own worker share the node's budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import NodeBudgetTooSmall, NodeTooSmall
from experts.budget import BudgetRequest, ExpertBytes, resolve_budget
from experts.node_memory import NodeMemory

if TYPE_CHECKING:
    from router.footprint import Footprint

SPARE_PERCENT = 10
"""Of a node's memory, left to others by `fit`."""
ROUTER_SHARE = 16
"""With expert actors, the routers' own workers get at most one part in so many together, and at least one expert each:
they compute only what a lost actor would have."""
TIER = "resident"


@dataclass(frozen=True)
class Node:
    """One machine: the names by which a user may mean it, and its memory when nothing was started yet."""

    name: str
    aliases: tuple[str, ...]
    memory: NodeMemory


@dataclass(frozen=True)
class ProcessMemory:
    """What one process holds, in bytes."""

    process: str
    base_bytes: int
    """An idle process: interpreter, libraries, Ray's worker."""
    backbone_bytes: int
    kv_bytes: int
    swap_bytes: int
    buffer_bytes: int
    budget_bytes: int
    """Most bytes of experts that it keeps."""
    expert_bytes: int
    """Of all experts that it answers for."""
    node: str = ""
    tier: str = TIER
    stand_in_bytes: int = 0
    """Mean outputs of experts, which are in nobody's budget."""
    media_bytes: int = 0
    """What sees and hears, which is in nobody's budget either."""
    speech_bytes: int = 0
    """What speaks, which has a budget of its own."""


@dataclass(frozen=True)
class MemoryPlan:
    """A node's memory, resolved."""

    node: str
    total_bytes: int
    available_bytes: int
    spare_bytes: int
    """Left alone by `fit`."""
    budget_bytes: int
    """What the node's processes may hold of experts together."""
    processes: tuple[ProcessMemory, ...]
    """The routers, then the expert actors."""
    num_routers: int = 1
    behind: tuple[ProcessMemory, ...] = ()
    """Host memory of processes that compute on a device, whose own memory their rows then are."""

    @property
    def router(self) -> ProcessMemory:
        """The first, or the only one."""
        return self.processes[0]

    @property
    def routers(self) -> tuple[ProcessMemory, ...]:
        return self.processes[: self.num_routers]

    @property
    def actor_budgets(self) -> tuple[int, ...]:
        return tuple(process.budget_bytes for process in self.processes[self.num_routers :])

    @property
    def actor_host_budgets(self) -> tuple[int, ...]:
        """Behind devices; none where actors compute in host memory."""
        actors = {process.process for process in self.processes[self.num_routers :]}
        return tuple(row.budget_bytes for row in self.behind if row.process in actors)

    def host_budget(self, process: str) -> int | None:
        """Of one process behind its device; None where it computes in host memory."""
        return next((row.budget_bytes for row in self.behind if row.process == process), None)

    def as_json(self) -> dict[str, Any]:
        """With a process's host row below that of its device."""
        behind = {row.process: row for row in self.behind}
        rows = [row for each in self.processes for row in (each, behind.get(each.process)) if row is not None]
        told = asdict(self) | {"processes": [asdict(process) for process in rows]}
        del told["behind"]  # among the rows
        return told


def router_names(num_routers: int) -> tuple[str, ...]:
    """What routers are called, as processes and as deployments."""
    return ("router",) if num_routers == 1 else tuple(f"router-{index}" for index in range(num_routers))


@dataclass(frozen=True)
class BaseMemory:
    """Bytes of processes that hold nothing yet. For `fit` they come on top of what is in use already."""

    router: int
    expert_actor: int = 0
    others: int = 0
    card: int = 0
    """On a card, of every process that computes there: what CUDA keeps for it."""


def plan_memory(
    requests: Iterable[BudgetRequest],
    footprint: Footprint,
    group_bytes: Sequence[int],
    node: Node,
    base: BaseMemory,
    num_routers: int = 1,
) -> MemoryPlan:
    """group_bytes: of each expert actor's group; none where the routers' processes compute everything.

    Every router has a backbone, a cache, buffers and a worker of its own; an actor has buffers for each of them.

    Raises BudgetTooSmall, NodeTooSmall or NodeBudgetTooSmall.
    """
    requests = tuple(requests)
    spare = node.memory.total_bytes * SPARE_PERCENT // 100
    actor_buffers = num_routers * footprint.actor_buffer_bytes
    needs = {
        "processes": num_routers * base.router + base.others + len(group_bytes) * base.expert_actor,
        "backbone": num_routers * footprint.backbone_bytes,
        "KV cache": num_routers * footprint.kv_bytes,
        "swap": num_routers * footprint.swap_bytes,
        "buffers": num_routers * footprint.buffer_bytes + len(group_bytes) * actor_buffers,
        f"{SPARE_PERCENT}% left": spare,
    }
    if footprint.stand_in_bytes:
        needs["stand-ins"] = num_routers * footprint.stand_in_bytes
    if footprint.media_bytes:
        needs["images and sound"] = num_routers * footprint.media_bytes
    if footprint.speech_bytes:
        needs["speech"] = num_routers * footprint.speech_bytes
    experts = footprint.experts
    room = node.memory.available_bytes - sum(needs.values())
    if any(request.is_fit for request in requests) and room < experts.largest:
        raise NodeTooSmall(node.name, max(0, room), experts.largest, node.memory.available_bytes, needs)
    # A router whose actors are all lost can use as much again.
    useful = experts.total * (num_routers + bool(group_bytes))
    budget = resolve_budget(requests, experts, min(room, useful))
    shares = divide_budget(budget, group_bytes, experts, footprint.experts_per_token, node.name, num_routers)
    routers = (
        ProcessMemory(
            name,
            base.router,
            footprint.backbone_bytes,
            footprint.kv_bytes,
            footprint.swap_bytes,
            footprint.buffer_bytes,
            share,
            experts.total,
            node.name,
            stand_in_bytes=footprint.stand_in_bytes,
            media_bytes=footprint.media_bytes,
            speech_bytes=footprint.speech_bytes,
        )
        for name, share in zip(router_names(num_routers), shares, strict=False)
    )
    actors = (
        ProcessMemory(f"experts-{index}", base.expert_actor, 0, 0, 0, actor_buffers, share, nbytes, node.name)
        for index, (share, nbytes) in enumerate(zip(shares[num_routers:], group_bytes, strict=True))
    )
    memory = node.memory
    processes = (*routers, *actors)
    return MemoryPlan(
        node.name, memory.total_bytes, memory.available_bytes, spare, budget, processes, num_routers
    )


def divide_budget(
    budget_bytes: int,
    group_bytes: Sequence[int],
    experts: ExpertBytes,
    experts_per_token: int,
    node: str,
    num_routers: int = 1,
) -> list[int]:
    """Divide a node's budget between the routers' workers (first) and expert actors, by the bytes of their groups.

    Without actors the routers get all, in equal parts. With them each gets the experts of one token, at most its
    part of a ROUTER_SHARE-th, at least one expert, and of whatever the actors have no use for. An actor gets at least
    one expert and at most its group; one without experts gets nothing. The parts add up to the budget.
    Raises NodeBudgetTooSmall where it is not one expert for each.
    """
    if not group_bytes and num_routers == 1:
        return [budget_bytes]
    largest = experts.largest
    num_workers = num_routers + sum(nbytes > 0 for nbytes in group_bytes)
    if budget_bytes < num_workers * largest:
        raise NodeBudgetTooSmall(node, budget_bytes, num_workers, largest)
    reserve = num_routers * reserve_bytes(budget_bytes, largest, experts_per_token, num_routers)
    shares = _in_proportion(budget_bytes - reserve, group_bytes, largest)
    left = budget_bytes - sum(shares)
    parts = [left // num_routers + (index < left % num_routers) for index in range(num_routers)]
    return [*parts, *shares]


def reserve_bytes(budget_bytes: int, largest: int, experts_per_token: int, num_routers: int = 1) -> int:
    """What each router's worker keeps of a budget beside expert actors, for what these may lose."""
    return max(largest, min(experts_per_token * largest, budget_bytes // (ROUTER_SHARE * num_routers)))


def _in_proportion(num_bytes: int, group_bytes: Sequence[int], least: int) -> list[int]:
    """Parts of `num_bytes` as the groups' sizes are, each from `least` up to its group."""
    shares = [0] * len(group_bytes)
    open_groups = {index for index, nbytes in enumerate(group_bytes) if nbytes}
    left = num_bytes
    while open_groups:
        total = sum(group_bytes[index] for index in open_groups)
        parts = {index: left * group_bytes[index] // total for index in open_groups}
        low = {index for index in open_groups if parts[index] < least}
        if not low:
            for index in open_groups:
                shares[index] = min(parts[index], group_bytes[index])
            break
        for index in low:
            shares[index] = least
        left -= least * len(low)
        open_groups -= low
    return shares


def choose_requests(
    requests: Iterable[BudgetRequest], overrides: Mapping[str, BudgetRequest], node: Node
) -> tuple[BudgetRequest, ...]:
    """What holds for one node: its override, if it is named in one, or else what holds for every node."""
    name = override_name(overrides, node)
    return tuple(requests) if name is None else (overrides[name],)


def override_name(overrides: Iterable[str], node: Node) -> str | None:
    """By which of its names a node has a budget of its own; None where it has what holds for every node."""
    named = set(overrides)
    return next((name for name in (node.name, *node.aliases) if name in named), None)


def unmatched(overrides: Iterable[str], nodes: Sequence[Node]) -> list[str]:
    """Names of overrides that mean none of the nodes."""
    known = {name for node in nodes for name in (node.name, *node.aliases)}
    return sorted(set(overrides) - known)
