"""One process that computes experts, as the simulator sees it: the real residency, and measured seconds in place of
arithmetic. Called by `cluster.simulator`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.topology import NodeFacts
from experts.residency import Residency
from extraction.manifest import ExpertKey


@dataclass(frozen=True)
class ModelShape:
    """What of a model costs time and room on the way between router and experts."""

    component: str
    layers: tuple[int, ...]
    """Numbers of the layers with experts."""
    expert_bytes: int
    row_bytes: int
    """Of one token's activation; an expert's answer for it takes as much."""


@dataclass(frozen=True)
class RouterCosts:
    """Seconds of a router's own work: all but experts and messages."""

    step_s: float
    """Of a step with one row: attention, head, sampling."""
    row_s: float
    """Of each further row of a step, likewise."""
    layer_s: float
    """Of a layer's gate, dispatch and combine for one row. Below 0 where all layers go in one call, which saves some of
    what a worker's calls take."""
    layer_row_s: float
    """Of each further row, likewise."""

    def of_step(self, num_rows: int) -> float:
        return self.step_s + (num_rows - 1) * self.row_s

    def of_layer(self, num_rows: int) -> float:
        return self.layer_s + (num_rows - 1) * self.layer_row_s


@dataclass(frozen=True)
class Costs:
    """Seconds and rates of one machine like those that are simulated, measured by `benchmarks/bench_simulator.py`.
    What nodes differ in is in `NodeFacts`."""

    near: RouterCosts
    """Of a router that computes all experts itself."""
    far: RouterCosts
    """Of one that asks actors, in every layer."""
    call_s: float
    """Of a worker's call, besides its experts."""
    expert_s: float
    """Of an expert in a call, besides the bytes of its weights."""
    expert_row_s: float
    """Of a row at an expert, besides the first."""
    message_s: float
    """The router's own time for a message and its answer: no two overlap."""
    message_row_s: float = 0.0
    """And for each row that is answered."""
    weights_s: float = 0.0
    """Of a step: reading the backbone's weights, where they are more than what `step_s` was measured with."""
    frame_s: float = 0.0
    """An actor's time for a message and its answer, besides computing."""
    actor_factor: float = 1.0
    """How much longer an actor takes for the same than the router's own worker, the weights' bytes left out: its core
    has slept in between."""
    crowded_work: float = 1.0
    """On a node with more processes than cores: how many times as long a process's own work takes."""
    crowded_messages: float = 1.0
    """The same of messages, at both ends: who has a core of its own looks for bytes, others sleep until woken."""
    overlap: float = 1.0
    """On a node with more processes than cores: how much of what could be computed at once really is. The kernel often
    leaves a process that was woken behind another one, while a core is free."""
    threads: int = 1
    """With which one worker computes: as many fewer workers of a node compute at once."""
    notice_s: float = 1.0
    """From a node's loss until heartbeats have told it."""
    start_s: float = 5.0
    """From the decision to start an actor until it takes rows."""

    def router(self, has_actors: bool) -> RouterCosts:
        return self.far if has_actors else self.near

    def work_factor(self, is_crowded: bool) -> float:
        return self.crowded_work if is_crowded else 1.0

    def message_factor(self, is_crowded: bool) -> float:
        return self.crowded_messages if is_crowded else 1.0


@dataclass(frozen=True)
class Work:
    """What one call took."""

    compute_s: float
    uses: int
    misses: int


class SimulatedWorker:
    """Holds names of experts within a budget, as `experts.worker.ExpertWorker` holds the experts."""

    def __init__(
        self,
        shape: ModelShape,
        costs: Costs,
        budget_bytes: int | None,
        *,
        ready_at_s: float = 0.0,
        is_actor: bool = True,
    ) -> None:
        """ready_at_s: before which no rows are taken, on the simulation's clock."""
        self.ready_at_s = ready_at_s
        self._factor = costs.actor_factor if is_actor else 1.0
        self._frame_s = costs.frame_s if is_actor else 0.0
        self._shape, self._costs = shape, costs
        self._residency = Residency(budget_bytes)

    def warm(self, keys: Sequence[ExpertKey]) -> None:
        """Hold these experts, as many as fit, as a process does when it has started."""
        budget = self._residency.budget_bytes
        nbytes = self._shape.expert_bytes
        fitting = keys if budget is None else keys[: budget // nbytes]
        if fitting:
            self._residency.admit(fitting, [nbytes] * len(fitting))

    def set_budget(self, budget_bytes: int) -> None:
        if self._residency.budget_bytes is not None:
            self._residency.set_budget(budget_bytes)

    def compute(
        self,
        keys: Sequence[ExpertKey],
        num_rows: int,
        node: NodeFacts,
        step: int,
        *,
        is_crowded: bool = False,
    ) -> Work:
        """A call for `num_rows` rows of distinct experts. Misses are read while the experts that are there compute.
        is_crowded: whether the node has more processes than cores.

        Raises BudgetTooSmall where not even one expert fits.
        """
        costs, nbytes = self._costs, self._shape.expert_bytes
        sizes = [nbytes] * len(keys)
        misses = 0
        for wave in self._residency.waves(sizes):
            exchange = self._residency.admit(
                keys[wave.start : wave.stop], sizes[wave.start : wave.stop], float(step)
            )
            misses += len(exchange.load)
        software_s = costs.call_s + len(keys) * costs.expert_s + (num_rows - len(keys)) * costs.expert_row_s
        factor = self._factor * costs.work_factor(is_crowded)
        frame_s = self._frame_s * costs.message_factor(is_crowded)
        compute_s = factor * software_s + len(keys) * nbytes / node.expert_bytes_s
        read_s = misses * nbytes / node.disk_bytes_s
        return Work(frame_s + max(compute_s, read_s), len(keys), misses)
