"""Moves bytes from shards into store files with a few threads; reading, hashing and writing overlap.

Memory is bounded by one buffer a thread, whatever the tensors' sizes. Work goes in steps, all that one shard gives to
one file: a step that the journal calls done is checked by its hashes and not repeated. Called by `extraction.extract`.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from extraction.dtypes import convert
from extraction.errors import CheckpointDamaged, TensorUnexpected
from extraction.manifest import ITEM_SIZES
from extraction.quantise import quantise_rows
from extraction.shards import ShardSupply
from extraction.store_files import Piece, Step, StoreFile

BUFFER_BYTES = 1024 * 1024
"""Of each thread; small enough that a chunk is still in the processor's cache when it is hashed and written."""
MAX_THREADS = 4

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, by one thread at a time, with growing numbers."""


class Meter:
    """Counts bytes for whoever watches."""

    def __init__(self, total_bytes: int, progress: Progress | None) -> None:
        self._total_bytes, self._progress = total_bytes, progress
        self._done_bytes = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done_bytes += nbytes
            if self._progress is not None:
                self._progress(self._done_bytes, self._total_bytes)


class _Stopped(Exception):
    """Another thread failed, or the run was interrupted."""


@dataclass(frozen=True)
class _Task:
    """What is hashed together in one step: one owner's pieces, in order."""

    owner: str
    pieces: tuple[Piece, ...]


class Copier:
    """Threads and open files of one extraction; a context manager."""

    def __init__(self, root: Path, shards: ShardSupply, meter: Meter) -> None:
        self._root, self._shards, self._meter = root, shards, meter
        self._pool = ThreadPoolExecutor(num_threads(), thread_name_prefix="copy")
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._syncs: list[Future[None]] = []
        self._buffers = threading.local()
        self._stop = threading.Event()

    def __enter__(self) -> Copier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._syncer.shutdown(wait=True, cancel_futures=True)

    def prepare(self, file: StoreFile) -> None:
        """Make the file with its header and its whole length, or bring what is there to both."""
        path = self._root / file.name
        path.parent.mkdir(exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
        try:
            os.ftruncate(descriptor, file.nbytes)
            _write(descriptor, memoryview(file.header), 0)
        finally:
            os.close(descriptor)

    def copy(self, step: Step) -> dict[str, str]:
        """Returns the digest of each owner's bytes in this step. Raises CheckpointDamaged, TensorUnexpected."""
        with (
            self._shards.opened(step.shard) as source,
            _opened(self._root / step.file, os.O_WRONLY) as target,
        ):
            digests = self._all(step, lambda task: self._copy(task, source, target))
        self._syncs.append(self._syncer.submit(_sync, self._root / step.file))
        return digests

    def is_done(self, step: Step, digests: Mapping[str, str]) -> bool:
        """Whether the file holds what a journal says that this step wrote."""
        try:
            with _opened(self._root / step.file, os.O_RDONLY) as target:
                found = self._all(step, lambda task: self._digest(task, target))
        except (CheckpointDamaged, OSError):
            return False
        if found != digests:
            return False
        self._meter.add(sum(piece.source_bytes for piece in step.pieces))
        return True

    def digest(self, owners: Mapping[str, tuple[Piece, ...]]) -> dict[str, str]:
        """Of owners whose pieces came in several steps: their bytes are read again."""

        def run(task: _Task) -> str:
            with _opened(self._root / task.pieces[0].file, os.O_RDONLY) as target:
                return self._digest(task, target)

        return self._run([_Task(owner, pieces) for owner, pieces in owners.items()], run)

    def wait_until_synced(self) -> None:
        """All that was copied is on the disk. Raises OSError."""
        while self._syncs:
            self._syncs.pop(0).result()

    def _all(self, step: Step, work: Callable[[_Task], str]) -> dict[str, str]:
        owners: dict[str, list[Piece]] = {}
        for piece in step.pieces:
            owners.setdefault(piece.owner, []).append(piece)
        return self._run([_Task(owner, tuple(pieces)) for owner, pieces in owners.items()], work)

    def _run(self, tasks: Sequence[_Task], work: Callable[[_Task], str]) -> dict[str, str]:
        """Work of every task, in all threads; after an error or an interrupt the others stop soon."""
        futures = [self._pool.submit(work, task) for task in tasks]
        try:
            return {task.owner: future.result() for task, future in zip(tasks, futures, strict=True)}
        except BaseException:
            self._stop.set()
            raise

    def _copy(self, task: _Task, source: int, target: int) -> str:
        digest = hashlib.sha256()
        scales = []
        for piece in task.pieces:
            if piece.quantization is not None:
                scales.append((piece, self._copy_codes(piece, source, target, digest.update)))
                continue
            offset = piece.offset
            for raw in self._source_chunks(piece, source):
                try:
                    chunk = convert(raw, piece.source_dtype, piece.dtype)
                except OverflowError as error:
                    raise TensorUnexpected(piece.tensor, f"has values beyond the range of {error}") from error
                digest.update(chunk)
                _write(target, chunk, offset)
                offset += len(chunk)
                self._meter.add(len(raw))
        for piece, raw_scales in scales:
            digest.update(raw_scales)
            _write(target, memoryview(raw_scales), piece.scales_offset)
        return digest.hexdigest()

    def _copy_codes(
        self, piece: Piece, source: int, target: int, update: Callable[[memoryview], None]
    ) -> bytes:
        """Write the codes; returns the scales, which an owner has behind all of its codes."""
        assert piece.quantization is not None
        offset, scales = piece.offset, bytearray()
        inputs = piece.shape[-1]
        for raw in self._source_chunks(piece, source, unit=inputs * ITEM_SIZES[piece.source_dtype]):
            try:
                codes, chunk_scales = quantise_rows(raw, piece.source_dtype, inputs, piece.quantization)
            except ValueError as error:
                raise TensorUnexpected(piece.tensor, f"{error} and cannot be quantised") from error
            update(codes)
            _write(target, codes, offset)
            offset += len(codes)
            scales += chunk_scales
            self._meter.add(len(raw))
        return bytes(scales)

    def _digest(self, task: _Task, target: int) -> str:
        digest = hashlib.sha256()
        ranges = [(piece, piece.offset, piece.nbytes) for piece in task.pieces]
        ranges += [(piece, piece.scales_offset, piece.scales_nbytes) for piece in task.pieces]
        for piece, offset, nbytes in ranges:
            for raw in self._chunks(target, piece.file, offset, nbytes, piece.tensor):
                digest.update(raw)
        return digest.hexdigest()

    def _source_chunks(self, piece: Piece, source: int, unit: int = 1) -> Iterator[memoryview]:
        return self._chunks(source, piece.shard, piece.source_offset, piece.source_bytes, piece.tensor, unit)

    def _chunks(
        self, descriptor: int, file: str, offset: int, nbytes: int, tensor: str, unit: int = 1
    ) -> Iterator[memoryview]:
        """Views of this thread's buffer, each good until the next is asked for, and of whole units of bytes."""
        size = whole_units(unit)
        if len(getattr(self._buffers, "buffer", b"")) < size:
            self._buffers.buffer = bytearray(max(size, BUFFER_BYTES))
        buffer = memoryview(self._buffers.buffer)[:size]
        for chunk in read_chunks(descriptor, file, offset, nbytes, tensor, buffer):
            if self._stop.is_set():
                raise _Stopped
            yield chunk


def num_threads() -> int:
    """One a core, but few: more only compete for the disk."""
    return min(MAX_THREADS, max(2, len(os.sched_getaffinity(0))))


def whole_units(unit: int) -> int:
    """Bytes of a buffer that holds whole units, such as a matrix's rows, and at least one."""
    return max(1, BUFFER_BYTES // unit) * unit


def read_chunks(
    descriptor: int, file: str, offset: int, nbytes: int, tensor: str, buffer: bytearray | memoryview
) -> Iterator[memoryview]:
    """The bytes as views of `buffer`, all full but the last. Raises CheckpointDamaged naming file and tensor."""
    end = offset + nbytes
    while offset < end:
        view = memoryview(buffer)[: min(len(buffer), end - offset)]
        filled = 0
        while filled < len(view):
            try:
                count = os.preadv(descriptor, [view[filled:]], offset + filled)
            except OSError as error:
                reason = f"cannot be read at offset {offset + filled}: {error.strerror}"
                raise CheckpointDamaged(file, reason) from error
            if count == 0:
                raise CheckpointDamaged(file, f"is cut short inside tensor {tensor!r}")
            filled += count
        yield view
        offset += len(view)


@contextmanager
def _opened(path: Path, mode: int) -> Iterator[int]:
    """A file of our own workspace; never through a link that somebody put there. Raises OSError."""
    descriptor = os.open(path, mode | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _sync(path: Path) -> None:
    with _opened(path, os.O_RDONLY) as descriptor:
        os.fsync(descriptor)
