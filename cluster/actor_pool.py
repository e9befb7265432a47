"""The Ray shell around expert actors: finds, creates, asks and ends them, and waits for none of them.

Every actor has at most one question open; a slow one's answer is taken whenever it comes. Decides nothing. Used by
`cluster.supervisor` on its thread, but for `ask_all`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.plan import ActorPlan
from cluster.resources import NAMESPACE, NODE_LABEL, expert_actor_options
from experts.actor import ActorSpec, ExpertActor
from experts.actor_report import ActorIdentity, Answer, Death

logger = logging.getLogger(__name__)

MAX_ERROR_CHARS = 300


class ActorPool:
    """Handles of expert actors, by their names in Ray."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}
        self._identified: set[str] = set()
        self._open: dict[str, Any] = {}
        """Answers that are awaited."""
        self._ending: dict[str, Any] = {}
        """Actors that were ended and whose names Ray still has."""
        self.full_nodes: frozenset[str] = frozenset()
        """Where an actor that waits for a machine is not to go, whatever memory Ray counts there."""

    def handle(self, name: str) -> Any:
        """Raises KeyError."""
        return self._handles[name]

    def names_in_use(self) -> frozenset[str]:
        """Of actors that were ended a moment ago."""
        return frozenset(self._ending)

    def find(self) -> list[str]:
        """Take up expert actors of our namespace that are new here, and return their names."""
        names = set(ray.util.list_named_actors())
        self._ending = {name: handle for name, handle in self._ending.items() if name in names}
        for handle in self._ending.values():
            ray.kill(handle)  # again: a first kill may come before the process is there
        return [
            name for name in sorted(names - self._handles.keys() - self._ending.keys()) if self._take_up(name)
        ]

    def _take_up(self, name: str) -> bool:
        try:
            handle = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return False  # gone meanwhile
        if not hasattr(handle, "identity"):
            return False  # not an expert actor
        self._handles[name] = handle
        return True

    def create(self, spec: ActorSpec, plan: ActorPlan, node_id: str | None, memory_bytes: int) -> str:
        """Start an actor. memory_bytes: what Ray is to count against the node's memory; 0 for nothing.

        Returns why that could not be; empty where it could.
        """
        options = expert_actor_options(spec.name)
        if plan.num_gpus:
            options["num_gpus"] = plan.num_gpus
        if memory_bytes:
            options["memory"] = memory_bytes
        if node_id is not None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id, soft=False)
        elif self.full_nodes:
            options["label_selector"] = {NODE_LABEL: f"!in({','.join(sorted(self.full_nodes))})"}
        try:
            self._handles[spec.name] = ray.remote(ExpertActor).options(**options).remote(spec)
        except (ray.exceptions.RayError, ValueError) as error:  # the latter for a name that is taken
            return short_reason(error)
        return ""

    def hear(self, timeout_s: float) -> dict[str, Answer]:
        """Ask every actor that has no question open, and return the answers that are there within the time-out."""
        for name, handle in self._handles.items():
            if name not in self._open:
                asked = handle.pulse if name in self._identified else handle.identity
                self._open[name] = asked.remote()
        names = {answer: name for name, answer in self._open.items()}
        if not names:
            return {}
        done, _ = ray.wait(list(names), num_returns=len(names), timeout=timeout_s)
        answers = {names[answer]: self._take(names[answer]) for answer in done}
        return {name: answer for name, answer in answers.items() if answer is not None}

    def _take(self, name: str) -> Answer | None:
        try:
            answer: Answer = ray.get(self._open.pop(name))
        except ray.exceptions.ActorUnavailableError:
            return None
        except (ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError) as error:
            return Death(short_reason(error))
        except ray.exceptions.RayError as error:
            logger.warning("expert actor %s does not answer as it should: %s", name, short_reason(error))
            return None
        if isinstance(answer, ActorIdentity):
            self._identified.add(name)
        return answer

    def end(self, name: str, is_dead: bool) -> None:
        """Forget an actor, and end its process unless it is dead already."""
        handle = self._handles.pop(name)
        self._identified.discard(name)
        self._open.pop(name, None)
        if not is_dead:
            ray.kill(handle)
            self._ending[name] = handle

    def end_all(self) -> None:
        for name in list(self._handles):
            self.end(name, is_dead=False)

    def ask_all(self, names: Collection[str], timeout_s: float) -> dict[str, dict[str, Any]]:
        """The status of those that give it within the time-out. On any thread: some may be ended meanwhile."""
        handles = {name: self._handles.get(name) for name in names}
        asked = {handle.status.remote(): name for name, handle in handles.items() if handle is not None}
        if not asked:
            return {}
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
        answers = {}
        for answer in done:
            try:
                answers[asked[answer]] = ray.get(answer)
            except ray.exceptions.RayError as error:
                logger.warning("no status of %s: %s", asked[answer], type(error).__name__)
        return answers


def short_reason(error: Exception) -> str:
    """Ray's errors carry stacks; the last line says what it was."""
    lines = str(error).strip().splitlines()
    return lines[-1][:MAX_ERROR_CHARS] if lines else type(error).__name__
