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


class SyncFailed(ClusterError):
    """A machine did not get the records that it was to get."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(address, reason)
        self.address, self.reason = address, reason

    def __str__(self) -> str:
        return (
            f"{self.address} does not get all records; the same command goes on with the rest: {self.reason}"
        )


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
        speech = "lower speech-budget, leave speech out, " if "speech" in self.needs else ""
        return (
            f"expert-budget: fit leaves {self.room_bytes} bytes on {self.node}, below one expert "
            f"({self.expert_bytes} bytes): of {self.available_bytes} available, {needs}; "
            f"lower kv-budget, {speech}or name a size"
        )


class NoRoomForExperts(ClusterError):
    """The nodes' memory and disks together do not hold every expert."""

    def __init__(self, needed_bytes: int, room_bytes: int) -> None:
        super().__init__(needed_bytes, room_bytes)
        self.needed_bytes, self.room_bytes = needed_bytes, room_bytes

    def __str__(self) -> str:
        return (
            f"experts of {self.needed_bytes} bytes have no room: the nodes have memory for {self.room_bytes} bytes, "
            "in pieces of at least one expert, and no node with memory for one has a store or disk for the rest"
        )


class NodeAddressInvalid(ClusterError):
    """What Ray names as a node's address is no numeric address of one machine."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address

    def __str__(self) -> str:
        return f"{self.address!r} is no node's IP address; start its Ray with --node-ip-address"


class RouterTooSmall(ClusterError):
    """The router's machine cannot hold what is needed beside experts."""

    def __init__(
        self, node: str, memory_bytes: int, needed_bytes: int, backbone_bytes: int, kv_bytes: int
    ) -> None:
        super().__init__(node, memory_bytes, needed_bytes, backbone_bytes, kv_bytes)
        self.node, self.memory_bytes, self.needed_bytes = node, memory_bytes, needed_bytes
        self.backbone_bytes, self.kv_bytes = backbone_bytes, kv_bytes

    def __str__(self) -> str:
        return (
            f"{self.node} cannot run the router: {self.needed_bytes} bytes are needed beside experts (backbone "
            f"{self.backbone_bytes}, KV cache {self.kv_bytes}), {self.memory_bytes} are there; give it more memory, "
            "or lower --context or --streams"
        )


class HeadAddressInvalid(ClusterError):
    """What a user named as a cluster's head is no host and port."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"{self.text[:80]!r} is no HOST or HOST:PORT with a port from 1 to 65535"


class TokenUnusable(ClusterError):
    """Ray's authentication token cannot be read. The token is in no message."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)
        self.source, self.reason = source, reason

    def __str__(self) -> str:
        return f"Ray's token: {self.source} {self.reason}"


class ClusterRefused(ClusterError):
    """This machine or the cluster is not as it must be. `mend` is what the user can do."""

    def __init__(self, what: str, mend: str = "") -> None:
        super().__init__(what, mend)
        self.what, self.mend = what, mend

    def __str__(self) -> str:
        return f"{self.what}: {self.mend}" if self.mend else self.what


class ServiceRunsAlready(ClusterError):
    """Another service has this Ray cluster."""

    def __init__(self, description: str) -> None:
        super().__init__(description)
        self.description = description

    def __str__(self) -> str:
        return f"a service runs on this Ray cluster already ({self.description}): one cluster takes one; stop it first"


class HeadLost(ClusterError):
    """Nobody listens any more where the cluster's head was."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address

    def __str__(self) -> str:
        return f"the Ray cluster's head at {self.address} is lost, and the service with it: start both again"


class NodeLost(ClusterError):
    """This machine's Ray node did not start, or ended by itself. `reason` is Ray's own text."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"this machine is no node of the cluster: {self.reason}"
