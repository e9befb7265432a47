"""How memory is divided where some processes compute on cards: what is on these, and in host memory behind them. Pure.

`cluster.memory_plan` for one machine with cards. Ray chooses the card of an expert actor, and bounds only how many
share one. Every card therefore counts as the one with the least room, with the router on it and as many actors as may
come. Called by `gateway.service.memory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.errors import NodeBudgetTooSmall, NodeTooSmall
from cluster.memory_plan import (
    SPARE_PERCENT,
    TIER,
    BaseMemory,
    MemoryPlan,
    Node,
    ProcessMemory,
    divide_budget,
    reserve_bytes,
)
from experts.budget import FIT, BudgetRequest, ExpertBytes, resolve_budget
from router.footprint import LIBRARY_BYTES, Footprint

DEVICE_TIER, HOST_TIER = "device", "host"
PASSING_EXPERTS = 16
"""In host memory where the device holds all, so that none has to come back: enough for reads and copies to overlap."""


@dataclass(frozen=True)
class Process:
    """A router or an expert actor, before memory is divided."""

    name: str
    is_router: bool
    is_on_card: bool
    experts: ExpertBytes
    """All that it may compute, as they are there."""
    stored: ExpertBytes
    """The same as the store has them, which is how host memory behind a card has them."""


@dataclass(frozen=True)
class Cards:
    """A machine's accelerators: the one with the least room, and how many there are."""

    node: Node
    number: int = 1

    def most_beside(self, num_actors: int) -> int:
        """Actors that share a card, at most."""
        return -(-num_actors // self.number)


def plan_devices(
    processes: Sequence[Process],
    requests: Sequence[BudgetRequest],
    host_requests: Sequence[BudgetRequest],
    footprint: Footprint,
    cards: Cards,
    node: Node,
    base: BaseMemory,
) -> MemoryPlan:
    """Rows of processes on cards are the cards'; `MemoryPlan.behind` has their host memory.

    processes: the routers, then the actors, which are all on cards or none. footprint: of a router where it computes.
    requests: of experts where the actors compute, or the routers where there are none; of all cards together.
    host_requests: of the rest of host memory; none of them: what fits and is of use.
    Raises BudgetTooSmall, NodeTooSmall or NodeBudgetTooSmall.
    """
    num_routers = sum(process.is_router for process in processes)
    actors_on_host = any(not (process.is_router or process.is_on_card) for process in processes)
    on_cards = [_row(each, footprint, cards.node, base, num_routers) for each in processes if each.is_on_card]
    on_host = [
        _behind(each, footprint, node, base, num_routers)
        if each.is_on_card
        else _row(each, footprint, node, base, num_routers)
        for each in processes
    ]
    asked_of_cards = (FIT,) if actors_on_host else tuple(requests)
    asked_of_host = (*requests, *host_requests) if actors_on_host else tuple(host_requests) or (FIT,)
    there = [process for process in processes if process.is_on_card]
    card_shares = _share_card(there, on_cards, asked_of_cards, footprint.experts_per_token, cards)
    held = dict(zip((process.name for process in there), card_shares, strict=True))
    host_shares = _share_host(processes, on_host, held, asked_of_host, footprint, node, base)
    behind = {
        row.process: replace(row, budget_bytes=share) for row, share in zip(on_host, host_shares, strict=True)
    }
    resident = {row.process: replace(row, budget_bytes=held[row.process]) for row in on_cards}
    rows = tuple(resident.get(process.name) or behind[process.name] for process in processes)
    about = node if len(processes) > num_routers else cards.node
    return MemoryPlan(
        about.name,
        about.memory.total_bytes,
        about.memory.available_bytes,
        _spare(about),
        sum(row.budget_bytes for row in rows),
        rows,
        num_routers,
        tuple(row for row in behind.values() if row.tier == HOST_TIER),
    )


def _row(
    process: Process, footprint: Footprint, node: Node, base: BaseMemory, num_routers: int
) -> ProcessMemory:
    """Where it computes, without a budget yet."""
    is_router, is_on_card = process.is_router, process.is_on_card
    idle = base.router if is_router else base.expert_actor
    return ProcessMemory(
        process.name,
        base.card if is_on_card else idle,
        footprint.backbone_bytes if is_router else 0,
        footprint.kv_bytes if is_router else 0,
        footprint.swap_bytes if is_router and not is_on_card else 0,
        footprint.buffer_bytes if is_router else num_routers * footprint.actor_buffer_bytes,
        budget_bytes=0,
        expert_bytes=process.experts.total,
        node=node.name,
        tier=DEVICE_TIER if is_on_card else TIER,
        stand_in_bytes=footprint.stand_in_bytes if is_router and not is_on_card else 0,
        media_bytes=footprint.media_bytes if is_router and not is_on_card else 0,
        speech_bytes=footprint.speech_bytes if is_router and not is_on_card else 0,
    )


def _behind(
    process: Process, footprint: Footprint, node: Node, base: BaseMemory, num_routers: int
) -> ProcessMemory:
    """Host memory of one that computes on a card: what is swapped out, and calls as they come and go."""
    is_router = process.is_router
    return ProcessMemory(
        process.name,
        base.router if is_router else base.expert_actor,
        backbone_bytes=0,
        kv_bytes=0,
        swap_bytes=footprint.swap_bytes if is_router else 0,
        buffer_bytes=LIBRARY_BYTES if is_router else num_routers * footprint.actor_buffer_bytes,
        budget_bytes=0,
        expert_bytes=process.stored.total,
        node=node.name,
        tier=HOST_TIER,
        stand_in_bytes=footprint.stand_in_bytes if is_router else 0,
        media_bytes=footprint.media_bytes if is_router else 0,
        speech_bytes=footprint.speech_bytes if is_router else 0,
    )


def _share_card(
    processes: Sequence[Process],
    rows: Sequence[ProcessMemory],
    requests: Sequence[BudgetRequest],
    experts_per_token: int,
    cards: Cards,
) -> list[int]:
    """Bytes of experts of each process that is on a card. Actors have alike: an expert at least, their group at most.

    What is asked of all cards together is divided by actors: a card has more than its part where more of them come to
    it, as far as there is room on the one with the least.
    """
    routers, actors = ([p for p in processes if p.is_router == is_router] for is_router in (True, False))
    beside = cards.most_beside(len(actors))
    num_used = max(1, min(cards.number, len(actors)))
    fullest = [row for row, process in zip(rows, processes, strict=True) if process.is_router]
    fullest += [row for row, process in zip(rows, processes, strict=True) if not process.is_router][:beside]
    experts = max((process.experts for process in processes), key=lambda each: each.largest)
    room = _room(fullest, cards.node, 0, requests, experts.largest)
    groups = sorted(process.experts.total for process in actors)
    useful = sum(process.experts.total for process in routers) + sum(groups[-beside:] if beside else ())
    whole = ExpertBytes(max(sum(groups), *(p.experts.total for p in routers), 0), experts.largest)
    asked = resolve_budget(requests, whole, num_used * min(room, useful))
    budget = asked // num_used
    if budget < len(fullest) * experts.largest:
        raise NodeBudgetTooSmall(cards.node.name, budget, len(fullest), experts.largest)
    if not actors:
        return [budget]
    reserve = 0
    if routers:
        wanted = reserve_bytes(budget, experts.largest, experts_per_token)
        reserve = min(wanted, budget - beside * experts.largest)
    most = min(
        _even_part(asked - reserve, groups),
        _even_part(max(budget, room) - reserve, groups[-beside:]),
    )
    shares = [min(process.experts.total, most) for process in actors]
    left = max(reserve, budget - sum(sorted(shares)[-beside:]))
    return [*(min(left, process.experts.total) for process in routers), *shares]


def _even_part(num_bytes: int, sizes: Sequence[int]) -> int:
    """The most that each may have if all have alike, at most their size, and together no more than `num_bytes`.

    sizes: ascending.
    """
    left = num_bytes
    for index, size in enumerate(sizes):
        part = left // (len(sizes) - index)
        if part <= size:
            return part
        left -= size
    return sizes[-1]


def _share_host(
    processes: Sequence[Process],
    rows: Sequence[ProcessMemory],
    on_card: dict[str, int],
    requests: Sequence[BudgetRequest],
    footprint: Footprint,
    node: Node,
    base: BaseMemory,
) -> list[int]:
    """Bytes of experts of every process in host memory: where it computes, or behind its card."""
    useful = [_useful(process, on_card.get(process.name)) for process in processes]
    largest = max((p.stored if p.is_on_card else p.experts).largest for p in processes)
    room = _room(rows, node, base.others, requests, largest)
    num_routers = sum(process.is_router for process in processes)
    computed = sum(p.experts.total for p in processes[num_routers:] if not p.is_on_card)
    experts = ExpertBytes(computed or processes[0].stored.total, largest)
    budget = resolve_budget(requests, experts, min(room, sum(useful)))
    per_token, groups = footprint.experts_per_token, useful[num_routers:]
    return divide_budget(budget, groups, experts, per_token, node.name, num_routers)


def _useful(process: Process, on_card_bytes: int | None) -> int:
    """Most bytes of host memory that a process has a use for."""
    if on_card_bytes is None:
        return process.experts.total
    stored = process.stored
    holds_all = on_card_bytes >= process.experts.total
    return min(stored.total, PASSING_EXPERTS * stored.largest) if holds_all else stored.total


def _room(
    rows: Sequence[ProcessMemory],
    node: Node,
    others: int,
    requests: Sequence[BudgetRequest],
    least: int,
) -> int:
    """For experts beside all else. Raises NodeTooSmall where what fits is asked for and is not one."""
    needs = {
        "processes": sum(row.base_bytes for row in rows) + others,
        "backbone": sum(row.backbone_bytes for row in rows),
        "KV cache": sum(row.kv_bytes for row in rows),
        "swap": sum(row.swap_bytes for row in rows),
        "buffers": sum(row.buffer_bytes for row in rows),
        f"{SPARE_PERCENT}% left": _spare(node),
        "stand-ins": sum(row.stand_in_bytes for row in rows),
        "images and sound": sum(row.media_bytes for row in rows),
        "speech": sum(row.speech_bytes for row in rows),
    }
    needs = {name: nbytes for name, nbytes in needs.items() if nbytes}
    room = node.memory.available_bytes - sum(needs.values())
    if any(request.is_fit for request in requests) and room < least:
        raise NodeTooSmall(node.name, max(0, room), least, node.memory.available_bytes, needs)
    return room


def _spare(node: Node) -> int:
    return node.memory.total_bytes * SPARE_PERCENT // 100
