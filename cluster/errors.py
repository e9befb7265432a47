"""What can go wrong in placing and keeping expert actors."""

from __future__ import annotations

from collections.abc import Mapping


class ClusterError(Exception):
    """Root of the cluster's errors."""


class SupervisorMissing(ClusterError):
    """No supervisor answers in the namespace; the service is not running here."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"no supervisor is running: {self.reason}"


class ActorsNotStarted(ClusterError):
    """Expert actors did not come up in time, or failed while starting."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"expert actor {self.name} did not start: {self.reason}"


class KeeperNotStarted(ClusterError):
    """Nobody would give the store's records to other machines."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the head's weight server did not start: {self.reason}"


class NodeBudgetTooSmall(ClusterError):
    """A node's budget is not one expert for each of the processes that share it."""

    def __init__(self, node: str, budget_bytes: int, num_workers: int, expert_bytes: int) -> None:
        super().__init__(node, budget_bytes, num_workers, expert_bytes)
        self.node, self.budget_bytes = node, budget_bytes
        self.num_workers, self.expert_bytes = num_workers, expert_bytes

    def __str__(self) -> str:
        needed = self.num_workers * self.expert_bytes
        return (
            f"expert-budget: {self.budget_bytes} bytes on {self.node} are below one expert for each of "
            f"{self.num_workers} processes (router and expert actors), {needed} bytes"
        )


class NodeTooSmall(ClusterError):
    """`fit` finds no room for even one expert."""

    def __init__(
        self, node: str, room_bytes: int, expert_bytes: int, available_bytes: int, needs: Mapping[str, int]
    ) -> None:
        super().__init__(node, room_bytes, expert_bytes, available_bytes, needs)
        self.node, self.room_bytes, self.expert_bytes = node, room_bytes, expert_bytes
        self.available_bytes, self.needs = available_bytes, needs

    def __str__(self) -> str:
        needs = ", ".join(f"{name} {num_bytes}" for name, num_bytes in self.needs.items())
        return (
            f"expert-budget: fit leaves {self.room_bytes} bytes on {self.node}, below one expert "
            f"({self.expert_bytes} bytes): of {self.available_bytes} available, {needs}; "
            "lower kv-budget or name a size"
        )
