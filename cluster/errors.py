"""What can go wrong in placing and keeping expert actors."""

from __future__ import annotations


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
