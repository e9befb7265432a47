"""What can go wrong with experts: computing them, reading them from a store, reaching them over the wire."""

from __future__ import annotations

from typing import Literal

LossKind = Literal["lost", "late", "silent"]
"""Why a connection ended: it was closed or broke, its deadline passed, or nothing was heard of the peer."""


class ExpertError(Exception):
    """Root of the experts' errors."""


# Computing


class BudgetTooSmall(ExpertError):
    """The budget cannot hold even one expert of this store."""

    def __init__(self, budget_bytes: int, expert_bytes: int) -> None:
        super().__init__(budget_bytes, expert_bytes)
        self.budget_bytes, self.expert_bytes = budget_bytes, expert_bytes

    def __str__(self) -> str:
        return f"budget of {self.budget_bytes} bytes is below one expert ({self.expert_bytes} bytes)"


class NotInGroup(ExpertError):
    """A worker was asked for an expert of another group."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"{self.key} does not belong to this worker's group"


class ExpertUnavailable(ExpertError):
    """Nobody computes some experts of a layer: no actor answers for them, and this process cannot."""

    def __init__(
        self, component: str, layer: int, experts: tuple[int, ...], waited_s: float, reason: str
    ) -> None:
        super().__init__(component, layer, experts, waited_s, reason)
        self.component, self.layer, self.experts = component, layer, experts
        self.waited_s, self.reason = waited_s, reason

    def __str__(self) -> str:
        numbers = ", ".join(map(str, self.experts))
        return (
            f"nobody could compute {self.component}, layer {self.layer}, experts {numbers}, "
            f"for {self.waited_s:.0f} s: {self.reason}"
        )


class NotRowInvariant(ExpertError):
    """On this machine a row's bits depend on its neighbours, so exact output cannot be promised."""

    def __init__(self, kernel: str, dtype: str) -> None:
        super().__init__(kernel, dtype)
        self.kernel, self.dtype = kernel, dtype

    def __str__(self) -> str:
        return f"self-test failed: {self.kernel} in {self.dtype} gives a row other bits beside other rows"


class ProductsUnavailable(ExpertError):
    """The environment asks for matrix products that this machine does not have."""

    def __init__(self, asked: str, choices: str) -> None:
        super().__init__(asked, choices)
        self.asked, self.choices = asked, choices

    def __str__(self) -> str:
        return f"{self.asked} is not here; choose one of: {self.choices}"


# Reading experts from a store


class UnknownExpert(ExpertError):
    """The store has no such expert."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"the store has no expert {self.key}"


class StoreDamaged(ExpertError):
    """A file of the store is missing, cut short, altered, or contradicts the manifest."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


class ExpertCorrupt(ExpertError):
    """An expert's bytes are not those that were extracted."""

    def __init__(self, key: str, file: str, offset: int, reason: str) -> None:
        super().__init__(key, file, offset, reason)
        self.key, self.file, self.offset, self.reason = key, file, offset, reason

    def __str__(self) -> str:
        return f"expert {self.key} in {self.file} at offset {self.offset}: {self.reason}"


# Devices


class DeviceUnavailable(ExpertError):
    """The device that was asked for is not one that this process can compute on."""

    def __init__(self, device: str, reason: str, option: str = "device") -> None:
        super().__init__(device, reason, option)
        self.device, self.reason, self.option = device, reason, option

    def __str__(self) -> str:
        return f"--{self.option} {self.device}: {self.reason}"


# Weights that come from elsewhere


class RecordNotHeld(ExpertError):
    """A source does not have what was asked for; another may."""

    def __init__(self, source: str, what: str) -> None:
        super().__init__(source, what)
        self.source, self.what = source, what

    def __str__(self) -> str:
        return f"{self.source} does not have {self.what}"


class SourceFailed(ExpertError):
    """A source of weights cannot be reached, broke off, or cannot read what it has. It may work later."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)
        self.source, self.reason = source, reason

    def __str__(self) -> str:
        return f"weights from {self.source}: {self.reason}"


class SourceLied(SourceFailed):
    """A source gave other bytes than the store has, or what the protocol does not allow. It is not asked again."""


class WeightsUnavailable(ExpertError):
    """No source gives an expert's record or the store's description."""

    def __init__(self, what: str, reasons: str) -> None:
        super().__init__(what, reasons)
        self.what, self.reasons = what, reasons

    def __str__(self) -> str:
        return f"nobody gives {self.what}: {self.reasons}"


class CacheTooSmall(ExpertError):
    """The limit of a store cache is below the groups of this node."""

    def __init__(self, folder: str, limit_bytes: int, needed_bytes: int) -> None:
        super().__init__(folder, limit_bytes, needed_bytes)
        self.folder, self.limit_bytes, self.needed_bytes = folder, limit_bytes, needed_bytes

    def __str__(self) -> str:
        return (
            f"{self.folder}: the experts of this node take {self.needed_bytes} bytes, "
            f"above the store cache's limit of {self.limit_bytes} bytes"
        )


class CacheDiskFull(ExpertError):
    """The disk under a store cache has no room."""

    def __init__(self, folder: str, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(folder, needed_bytes, free_bytes)
        self.folder, self.needed_bytes, self.free_bytes = folder, needed_bytes, free_bytes

    def __str__(self) -> str:
        return f"{self.folder}: the disk is full; {self.needed_bytes} bytes needed, {self.free_bytes} free"


class CacheUnusable(ExpertError):
    """A store cache's folder cannot be made, read, locked or written."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"store cache {self.path}: {self.reason}"


# Trust


class TrustMismatch(ExpertError):
    """Two records of trust are about different experts."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(expected, found)
        self.expected, self.found = expected, found

    def __str__(self) -> str:
        return f"trust is kept about {self.expected}, not {self.found}"


class LedgerBusy(ExpertError):
    """Another process owns the trust ledger."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return f"{self.path}: another process keeps this trust ledger; stop it or choose another --state-dir"


class LedgerUnusable(ExpertError):
    """The trust ledger cannot be opened, read or written."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"trust ledger {self.path}: {self.reason}"


# Reaching experts over the wire


class TransportError(ExpertError):
    """Root of the data plane's errors."""


class FrameFault(TransportError):
    """The peer sent something that the wire format or this connection's agreement does not allow."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class LinkLost(TransportError):
    """A socket can carry no more frames. `is_orderly` when the peer left between two frames."""

    def __init__(self, reason: str, is_orderly: bool = False, kind: LossKind = "lost") -> None:
        super().__init__(reason, is_orderly, kind)
        self.reason, self.is_orderly, self.kind = reason, is_orderly, kind

    def __str__(self) -> str:
        return self.reason


class ConnectFailed(TransportError):
    """Nobody answers at an expert actor's address."""

    def __init__(self, name: str, address: str, reason: str) -> None:
        super().__init__(name, address, reason)
        self.name, self.address, self.reason = name, address, reason

    def __str__(self) -> str:
        return f"cannot connect to {self.name} at {self.address}: {self.reason}"


class HandshakeRefused(TransportError):
    """Somebody answers, but one side did not accept the other."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"no agreement with {self.name}: {self.reason}"


class PeerLost(TransportError):
    """The connection to an actor is closed; what was asked is not answered and never will be on it."""

    def __init__(self, name: str, reason: str, kind: LossKind = "lost") -> None:
        super().__init__(name, reason, kind)
        self.name, self.reason, self.kind = name, reason, kind

    def __str__(self) -> str:
        return f"connection to {self.name} lost: {self.reason}"


class RemoteExpertError(TransportError):
    """The actor could not compute a call. The connection is still good."""

    def __init__(self, name: str, code: int, message: str) -> None:
        super().__init__(name, code, message)
        self.name, self.code, self.message = name, code, message

    def __str__(self) -> str:
        return f"{self.name} answered with error {self.code}: {self.message}"


class AnswerNotFinite(TransportError):
    """An actor answered finite activations with rows that are infinite or not a number."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"{self.name} answered with values that are not finite"
