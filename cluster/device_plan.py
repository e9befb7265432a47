"""How memory is divided where a device computes: what is on it, and what is in host memory behind it. Pure.

`cluster.memory_plan` for one process with a device. Called by `gateway.service.memory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.errors import NodeTooSmall
from cluster.memory_plan import SPARE_PERCENT, BaseMemory, MemoryPlan, Node, ProcessMemory, plan_memory
from experts.budget import FIT, BudgetRequest, ExpertBytes, resolve_budget
from router.footprint import LIBRARY_BYTES, Footprint

DEVICE_TIER, HOST_TIER = "device", "host"
PASSING_EXPERTS = 16
"""In host memory where the device holds all, so that none has to come back: enough for reads and copies to overlap."""


def plan_device(
    requests: Sequence[BudgetRequest],
    host_requests: Sequence[BudgetRequest],
    footprint: Footprint,
    stored: ExpertBytes,
    device: Node,
    node: Node,
    base: BaseMemory,
) -> MemoryPlan:
    """The plan of one process: its first row is the device's, `behind` the host's.

    requests: of experts on the device; host_requests: of those behind it, none of them: what fits and is of use.
    footprint: of what is on the device. stored: the experts as the store has them, which is how the host has them.
    Raises BudgetTooSmall or NodeTooSmall.
    """
    on_device = replace(footprint, swap_bytes=0, stand_in_bytes=0)
    plan = plan_memory(requests, on_device, (), device, BaseMemory(router=0))
    needs = {
        "processes": base.router + base.others,
        "swap": footprint.swap_bytes,
        "buffers": LIBRARY_BYTES,
        f"{SPARE_PERCENT}% left": node.memory.total_bytes * SPARE_PERCENT // 100,
        "stand-ins": footprint.stand_in_bytes,
    }
    useful = stored.total
    if plan.budget_bytes >= footprint.experts.total:
        useful = min(useful, PASSING_EXPERTS * stored.largest)
    chosen = tuple(host_requests) or (FIT,)
    room = node.memory.available_bytes - sum(needs.values())
    if any(request.is_fit for request in chosen) and room < stored.largest:
        raise NodeTooSmall(node.name, max(0, room), stored.largest, node.memory.available_bytes, needs)
    budget = resolve_budget(chosen, stored, min(room, useful))
    router = replace(plan.router, tier=DEVICE_TIER)
    behind = ProcessMemory(
        router.process,
        base.router,
        backbone_bytes=0,
        kv_bytes=0,
        swap_bytes=footprint.swap_bytes,
        buffer_bytes=LIBRARY_BYTES,
        budget_bytes=budget,
        expert_bytes=stored.total,
        node=node.name,
        tier=HOST_TIER,
        stand_in_bytes=footprint.stand_in_bytes,
    )
    return replace(plan, processes=(router,), behind=behind)
