"""Mean outputs on disk: one file a store, whole under its name or not there.

One line of JSON that says whose means they are, then for each layer, ascending, the mean rows (bfloat16, experts by
width), mean norms and uses (float32, a number an expert), then the SHA-256 of all that; little-endian, without gaps.
So a file's length and first line follow from the model, and whatever differs is damaged. Means are rounded to bfloat16
here and nowhere else: a running mean in memory would lose every small step to rounding.

Called by `router.means_keeper`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from router.errors import MeansDamaged, MeansUnusable
from router.output_means import LayerMeans

VERSION = 1
FOLDER_MODE, FILE_MODE = 0o700, 0o600
DIGEST_BYTES = hashlib.sha256().digest_size
MAX_USES = 2.0**40
"""No count of uses is above it."""


@dataclass(frozen=True)
class MeansIdentity:
    """Whose means they are: of no use for other weights, nor for the same in another quantisation."""

    store_hash: str
    quantisation: str
    """The dtype that the experts are stored in."""
    component: str
    layers: tuple[int, ...]
    """With experts, ascending."""
    num_experts: int
    """Of each layer."""
    width: int

    @property
    def header(self) -> bytes:
        facts = {"format": "sage-moe stand-ins", "version": VERSION} | asdict(self)
        return json.dumps(facts, separators=(",", ":")).encode() + b"\n"

    @property
    def file_bytes(self) -> int:
        num_experts = len(self.layers) * self.num_experts
        return len(self.header) + num_experts * (2 * self.width + 2 * 4) + DIGEST_BYTES


def means_path(state_folder: Path, store_hash: str) -> Path:
    return state_folder / "stand-ins" / f"{store_hash[:32]}.means"


def write_means(path: Path, identity: MeansIdentity, copy: Callable[[int], LayerMeans]) -> bool:
    """Take the place of the file, once all of it is on disk. copy: of one layer; no more than that is held at a time.

    False where another process is writing it. Raises MeansUnusable.
    """
    try:
        path.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        with _writing(path) as is_ours:
            if is_ours:
                _write(path, identity, copy)
            return is_ours
    except OSError as error:
        raise MeansUnusable(str(path), error.strerror or str(error)) from error


def read_means(path: Path, identity: MeansIdentity) -> dict[int, LayerMeans]:
    """By layer; empty where there is no file.

    Raises MeansUnusable where it cannot be read, MeansDamaged where it is not what was written.
    """
    try:
        raw = _read(path, identity.file_bytes)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise MeansUnusable(str(path), error.strerror or str(error)) from error
    if len(raw) != identity.file_bytes:
        raise MeansDamaged(str(path), f"does not have {identity.file_bytes} bytes")
    if hashlib.sha256(raw[:-DIGEST_BYTES]).digest() != raw[-DIGEST_BYTES:]:
        raise MeansDamaged(str(path), "does not have the hash that it ends with")
    if not raw.startswith(identity.header):
        raise MeansDamaged(str(path), "is of another store, quantisation or version")
    layers = dict(zip(identity.layers, _decoded(raw, identity), strict=True))
    if not all(map(_are_sound, layers.values())):
        raise MeansDamaged(str(path), "has numbers that no mean can have")
    return layers


def set_aside(path: Path) -> Path:
    """Under a name of its own, in place of what was set aside before. Raises MeansUnusable."""
    aside = path.with_name(f"{path.name}.damaged")
    try:
        os.replace(path, aside)
    except OSError as error:
        raise MeansUnusable(str(path), error.strerror or str(error)) from error
    return aside


@contextmanager
def _writing(path: Path) -> Iterator[bool]:
    """Whether nobody else writes the file meanwhile. The lock goes with the process, however it ends; its file
    stays."""
    lock_file = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
    try:
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(lock_file)


def _write(path: Path, identity: MeansIdentity, copy: Callable[[int], LayerMeans]) -> None:
    # One name for whoever holds the lock: what a killed writer left is written over.
    temporary = path.with_name(f".{path.name}.tmp")
    digest = hashlib.sha256()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(temporary, flags, FILE_MODE), "wb") as file:
        for part in (identity.header, *_lazily(identity, copy)):
            digest.update(part)
            file.write(part)
        file.write(digest.digest())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(path: Path, max_bytes: int) -> bytes:
    """At most one byte more than `max_bytes` of a regular file. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no file")
    with os.fdopen(descriptor, "rb") as file:
        return file.read(max_bytes + 1)


def _lazily(identity: MeansIdentity, copy: Callable[[int], LayerMeans]) -> Iterator[bytes]:
    for layer in identity.layers:
        means = copy(layer)
        yield means.output_ED.bfloat16().view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
        for numbers_E in (means.norm_E, means.uses_E):
            yield numbers_E.numpy().astype("<f4", copy=False).tobytes()


def _decoded(raw: bytes, identity: MeansIdentity) -> Iterator[LayerMeans]:
    at, num_experts, width = len(identity.header), identity.num_experts, identity.width

    def numbers(kind: str, count: int) -> Tensor:
        nonlocal at
        found = np.frombuffer(raw, kind, count, at)
        at += found.nbytes
        return torch.from_numpy(found.astype(kind[1:]))

    for _ in identity.layers:
        output_ED = numbers("<i2", num_experts * width).view(torch.bfloat16).view(num_experts, width)
        yield LayerMeans(output_ED, numbers("<f4", num_experts), numbers("<f4", num_experts))


def _are_sound(means: LayerMeans) -> bool:
    uses_E = means.uses_E
    is_finite = all(bool(part.isfinite().all()) for part in means)
    return is_finite and bool(((uses_E >= 0) & (uses_E <= MAX_USES) & (means.norm_E >= 0)).all())
