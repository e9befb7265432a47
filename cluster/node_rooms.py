"""What the machines of a running cluster may hold of a service's experts: from their reports to a topology. Pure.

The router's machine is divided by `cluster.memory_plan`; of every other one this takes away idle actors, their buffers
and what is left to others. A machine that cannot take part is named with the reason. Called by
`gateway.service.placing`, and by `cluster.node_watch` for machines that join.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from cluster.memory_plan import Node, choose_requests
from cluster.node_report import SPARE_PERCENT, CardReport, NodeReport, as_node_facts
from cluster.topology import ACTORS_ON_A_CARD, NodeFacts, Topology
from experts.budget import FIT, BudgetRequest, ExpertBytes, resolve_budget
from experts.errors import BudgetTooSmall
from experts.node_memory import NodeMemory

ACTORS_ON_A_NODE = 2
"""Without a card, for which idle memory and buffers are set aside: one for its own group, one replica of another's."""
NO_EXPERTS = ExpertBytes(0, 0)


@dataclass(frozen=True)
class RoomRules:
    """What holds for every machine of a service."""

    experts: ExpertBytes
    """Of the whole model, in memory."""
    actor_bytes: int
    """Of an expert actor beside its experts: an idle process, and buffers for every router's calls."""
    router_room_bytes: int
    """What experts may take on the routers' machine, as its memory plan has it."""
    requests: tuple[BudgetRequest, ...] = (FIT,)
    overrides: Mapping[str, BudgetRequest] = field(default_factory=dict)
    """In place of `requests`, by a node's name or address."""
    has_cache: bool = False
    """Whether machines without the store may fetch what they need of it."""
    cache_limit_bytes: int | None = None
    code: str = ""
    """Digest of the code that the machines must have; empty for any."""
    expert_device: str = "cpu"
    """On which actors compute: `cuda` on a card of each machine, `auto` where it has one."""
    is_router_on_card: bool = False
    card_bytes: int = 0
    """Of an expert actor on a card beside its experts."""
    host_requests: tuple[BudgetRequest, ...] = ()
    """Of the rest of host memory where actors are on cards: behind these, and of machines that compute without; none of
    them: what fits."""
    stored: ExpertBytes = NO_EXPERTS
    """The whole model, as the store has it."""

    def card_of(self, report: NodeReport) -> CardReport | None:
        """On which experts are computed there; None for host memory. On the routers' machine it is they who do."""
        is_wanted = self.is_router_on_card if report.is_here else self.expert_device != "cpu"
        return report.card if is_wanted else None

    @property
    def requests_of_hosts(self) -> tuple[BudgetRequest, ...]:
        """Of a machine that computes on its CPU."""
        return self.requests if self.expert_device == "cpu" else self.host_requests or (FIT,)


def node_names(report: NodeReport) -> Node:
    """By which names a user may mean it. Raises ValueError for a node that told nothing."""
    if report.machine is None:
        raise ValueError(f"{report.address} told nothing: {report.problem}")
    name = report.machine.name
    aliases = {report.address, name.partition(".")[0], *(("localhost",) if report.is_here else ())}
    return Node(name, tuple(sorted(aliases - {name})), report.machine.memory)


def facts_of(report: NodeReport, rules: RoomRules) -> NodeFacts | str:
    """What planning needs of a machine, or why it cannot hold experts."""
    if reason := _refusal(report, rules):
        return reason
    assert report.machine is not None
    disk, node, card = _disk_room(report, rules), node_names(report), rules.card_of(report)
    if report.is_here:
        facts = as_node_facts(report, rules.router_room_bytes, disk, card)
        return replace(facts, gpus=(), is_for_actors=card is None and rules.expert_device != "cuda")
    if card is None:
        on_host = replace(rules, requests=rules.requests_of_hosts)
        return as_node_facts(report, _room(node, on_host, ACTORS_ON_A_NODE), disk)
    on_card = replace(rules, actor_bytes=rules.card_bytes)
    behind = replace(rules, requests=rules.requests_of_hosts, overrides={}, experts=rules.stored)
    behind_bytes = _room(node, behind, ACTORS_ON_A_CARD)
    if behind_bytes < (least := ACTORS_ON_A_CARD * rules.stored.largest):
        return (
            f"the host memory behind its card has {behind_bytes} bytes for experts, less than the {least} bytes of one "
            f"for each of {ACTORS_ON_A_CARD} actors"
        )
    room = _room(replace(node, memory=card.memory), on_card, ACTORS_ON_A_CARD)
    return as_node_facts(report, room, disk, card, behind_bytes)


def make_topology(reports: Iterable[NodeReport], rules: RoomRules) -> tuple[Topology, dict[str, str]]:
    """The machines that can take part, the routers' being the one that asked; and why the others cannot, by node id.

    Raises ValueError where that one cannot.
    """
    found = {report.node_id: (report, facts_of(report, rules)) for report in reports}
    nodes = tuple(facts for _, facts in found.values() if isinstance(facts, NodeFacts))
    refused = {node_id: facts for node_id, (_, facts) in found.items() if isinstance(facts, str)}
    here = next((node_id for node_id, (report, _) in found.items() if report.is_here), None)
    if here is None or here in refused:
        raise ValueError(f"this machine cannot hold experts: {refused.get(here or '', 'it told nothing')}")
    return Topology(nodes, here), refused


def _refusal(report: NodeReport, rules: RoomRules) -> str:
    if report.machine is None or report.arithmetic is None:
        return f"it tells nothing: {report.problem}"
    if not report.is_here and report.link is None:
        return f"it is not reached: {report.link_problem}"
    if rules.code not in ("", report.machine.versions.code):
        return "it has another version of sage-moe; see sage-moe doctor"
    card = rules.card_of(report)
    if card is None and rules.expert_device == "cuda" and not report.is_here:
        return "PyTorch sees no GPU there; --expert-device auto lets it compute without"
    if not (card.arithmetic if card else report.arithmetic).numerics_class:
        return "its arithmetic gives other bits for more rows (docs/exactness.md)"
    if not report.has_store and not rules.has_cache:
        return "it does not have the store; copy it there, or serve with --store-cache"
    return ""


def _room(node: Node, rules: RoomRules, num_actors: int) -> int:
    """Of a machine without routers, beside so many actors. Less than one expert is none."""
    memory: NodeMemory = node.memory
    room = memory.available_bytes - memory.total_bytes * SPARE_PERCENT // 100
    room -= num_actors * rules.actor_bytes
    requests = choose_requests(rules.requests, rules.overrides, node)
    try:
        return resolve_budget(requests, rules.experts, max(0, min(room, rules.experts.total)))
    except BudgetTooSmall:
        return 0


def _disk_room(report: NodeReport, rules: RoomRules) -> int:
    """For records that the machine fetches."""
    if report.has_store or not rules.has_cache or report.machine is None:
        return 0
    free = report.machine.cache_free_bytes if report.machine.is_cache_writable else 0
    return free if rules.cache_limit_bytes is None else min(free, rules.cache_limit_bytes)
