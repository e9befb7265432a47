"""What can go wrong with checkpoints and stores. Every message is one line that a user can act on."""

from __future__ import annotations

MAX_MESSAGE_CHARS = 1000


def one_line(text: str) -> str:
    """The text with its control characters escaped and its middle left out where it is too long.

    Messages quote names that others chose: none may break the line, move the cursor, or flood the terminal.
    """
    if len(text) > MAX_MESSAGE_CHARS:
        half = MAX_MESSAGE_CHARS // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


class ExtractionError(Exception):
    """Root of the extraction's errors. `text` is the message, `str` the message as one safe line."""

    def text(self) -> str:
        return super().__str__()

    def __str__(self) -> str:
        return one_line(self.text())


class CheckpointDamaged(ExtractionError):
    """A file of a checkpoint or store is missing, cut short, or contradicts itself."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def text(self) -> str:
        return f"{self.file}: {self.reason}"


class TensorsMissing(ExtractionError):
    """The checkpoint lacks tensors that its configuration implies."""

    def __init__(self, names: tuple[str, ...], total: int) -> None:
        super().__init__(names, total)
        self.names, self.total = names, total

    def text(self) -> str:
        more = f" and {self.total - len(self.names)} more" if self.total > len(self.names) else ""
        count = "1 tensor is" if self.total == 1 else f"{self.total} tensors are"
        return f"the checkpoint is incomplete, {count} missing: {', '.join(self.names)}{more}"


class TensorUnexpected(ExtractionError):
    """A tensor's name, shape or dtype is not what the family and configuration imply."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def text(self) -> str:
        return f"tensor {self.name}: {self.reason}"


class FamilyUnknown(ExtractionError):
    """No layout is known for this model type."""

    def __init__(self, model_type: str, known: tuple[str, ...]) -> None:
        super().__init__(model_type, known)
        self.model_type, self.known = model_type, known

    def text(self) -> str:
        return f"model type {self.model_type!r} is not supported; known: {', '.join(self.known)}"


class ConfigInvalid(ExtractionError):
    """A checkpoint's configuration lacks a key, or has a value that no model has."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def text(self) -> str:
        return f"config.json: {self.key}: {self.reason}"


class PathRefused(ExtractionError):
    """A path leads out of its folder or is not a regular file."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def text(self) -> str:
        return f"{self.path}: {self.reason}"


class DestinationOccupied(ExtractionError):
    """DEST exists already."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def text(self) -> str:
        return f"{self.path} exists already; choose another name or remove it"


class DiskFull(ExtractionError):
    """The store does not fit on the disk."""

    def __init__(self, path: str, needed: int, free: int) -> None:
        super().__init__(path, needed, free)
        self.path, self.needed, self.free = path, needed, free

    def text(self) -> str:
        missing = max(0, self.needed - self.free)
        return (
            f"{self.path}: the disk is full; {self.needed} bytes needed, {self.free} free, {missing} missing"
        )


class ManifestInvalid(ExtractionError):
    """A store's manifest or index cannot be used."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def text(self) -> str:
        return f"{self.file}: {self.reason}"


class HubRefused(ExtractionError):
    """A model hub does not give what a name stands for."""

    def __init__(self, hub_id: str, reason: str) -> None:
        super().__init__(hub_id, reason)
        self.hub_id, self.reason = hub_id, reason

    def text(self) -> str:
        return f"{self.hub_id} {self.reason}"


class OptionRefused(ExtractionError):
    """An option asks for what this checkpoint or store does not have."""

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(option, reason)
        self.option, self.reason = option, reason

    def text(self) -> str:
        return f"{self.option}: {self.reason}"


class StoreDiffers(ExtractionError):
    """A store does not hold what its checkpoint does. Names the first difference."""

    def __init__(self, tensor: str, file: str, offset: int, reason: str) -> None:
        super().__init__(tensor, file, offset, reason)
        self.tensor, self.file, self.offset, self.reason = tensor, file, offset, reason

    def text(self) -> str:
        return f"tensor {self.tensor}: {self.file} at offset {self.offset}: {self.reason}"
