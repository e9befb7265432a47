"""How long the processes of a cluster take over one layer, as the simulator reckons it. Pure.

The router asks one process after another, computes its own share, and takes the answers in the order in which it asked.
Links carry one message after another; what a node is asked waits for one of its cores. Called by `cluster.simulator`.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.simulated_worker import Costs
from cluster.topology import NodeFacts


@dataclass(frozen=True)
class Job:
    """What one actor is asked in a layer."""

    node_id: str
    compute_s: float
    """Of one of the node's cores, or of as many as a worker has threads."""
    message_s: float
    """The router's own time for question and answer, half of it for each."""
    asked_bytes: int
    answered_bytes: int


@dataclass(frozen=True)
class Machines:
    """What a layer's time depends on beside its jobs."""

    nodes: Mapping[str, NodeFacts]
    router_node: str
    crowded: frozenset[str]
    """Nodes with more processes than cores for them."""

    @property
    def router_bytes_s(self) -> float:
        """Of the router's own link, through which all answers come: as fast as the fastest of the others."""
        rates = [node.bandwidth_bytes_s for name, node in self.nodes.items() if name != self.router_node]
        return max(rates, default=float("inf"))


def layer_s(jobs: Sequence[Job], own_s: float, machines: Machines, costs: Costs) -> float:
    """Seconds from the router's first question to its last answer. own_s: of its own share of the experts."""
    rate = machines.router_bytes_s
    sent_s = link_s = 0.0
    arrived: dict[str, list[tuple[float, int]]] = {}
    for number, job in enumerate(jobs):
        node = machines.nodes[job.node_id]
        sent_s += job.message_s / 2
        link_s = _carried(sent_s, link_s, job.asked_bytes, node, rate)
        arrived.setdefault(job.node_id, []).append((link_s + node.round_trip_s / 2, number))
    now_s = sent_s + own_s
    done_s = [0.0] * len(jobs)
    for node_id, arrivals in arrived.items():
        cores = max(1, machines.nodes[node_id].num_cores // costs.threads)
        router_until_s = now_s if node_id == machines.router_node else 0.0
        work = [(at_s, jobs[number].compute_s) for at_s, number in arrivals]
        ends_s = _ends(work, cores, router_until_s)
        if node_id in machines.crowded:
            alone_s = _ends(work, 1, router_until_s)
            share = costs.overlap
            ends_s = [share * end + (1 - share) * alone for end, alone in zip(ends_s, alone_s, strict=True)]
        for (_, number), end_s in zip(arrivals, ends_s, strict=True):
            done_s[number] = end_s
    link_s = 0.0
    for job, end_s in zip(jobs, done_s, strict=True):
        node = machines.nodes[job.node_id]
        link_s = _carried(end_s + node.round_trip_s / 2, link_s, job.answered_bytes, node, rate)
        now_s = max(now_s, link_s) + job.message_s / 2
    return now_s


def _carried(ready_s: float, free_s: float, nbytes: int, node: NodeFacts, router_bytes_s: float) -> float:
    """When a message is through: its node's link and the router's carry it at once, the router's after others."""
    if node.bandwidth_bytes_s == float("inf"):
        return ready_s
    return max(ready_s + nbytes / node.bandwidth_bytes_s, free_s + nbytes / router_bytes_s)


def _ends(work: Sequence[tuple[float, float]], cores: int, router_until_s: float) -> list[float]:
    """When each piece of (arrival, seconds) is done, first come, first served; the router has one core until then."""
    free = [router_until_s, *[0.0] * (cores - 1)]
    heapq.heapify(free)
    ends = []
    for at_s, seconds in work:
        end_s = max(at_s, free[0]) + seconds
        heapq.heapreplace(free, end_s)
        ends.append(end_s)
    return ends
