"""Gives a store's description and expert records to who knows the cluster's secret.

Serves what the store holds on this machine and nothing else: a question names a file of the manifest or an expert, and
what is sent is read through the store's own checks, a part at a time, so that a connection costs one part of memory
whatever it asks for. Loopback unless told otherwise. Used by `experts.actor`, `cluster.weight_keeper` and
`sage-moe store share`.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from experts.channel import Channel, TransportLimits
from experts.errors import ExpertCorrupt, FrameFault, StoreDamaged
from experts.frame import MAX_ERROR_BYTES, Header, Kind, encode_header
from experts.listener import Greeting, Listener
from experts.store import ExpertStore
from experts.weight_frames import (
    PART_BYTES,
    PART_TIMEOUT_S,
    WEIGHT_LIMITS,
    WEIGHT_ROLES,
    Announcement,
    WeightFault,
    WeightKind,
    check_question,
    decode_key,
    encode_announcement,
    end_header,
    part_header,
)
from extraction.errors import ExtractionError
from extraction.files import read_small_file
from extraction.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Answer:
    nbytes: int
    pieces: Iterator[memoryview]
    check: Callable[[str], None]
    """Raises ExpertCorrupt or StoreDamaged for a hash that what was read should not have."""


class _Refused(Exception):
    def __init__(self, fault: WeightFault, reason: str) -> None:
        super().__init__(fault, reason)
        self.fault, self.reason = fault, reason


class WeightServer:
    """One store behind a port."""

    def __init__(
        self,
        store: ExpertStore,
        *,
        secret: bytes,
        host: str = "127.0.0.1",
        port: int = 0,
        limits: TransportLimits = WEIGHT_LIMITS,
    ) -> None:
        """store: belongs to the caller, and stays open longer. Binds at once (port 0: a free one).

        Raises OSError where the port is taken, StoreDamaged, or ValueError for the secret.
        """
        self._store, self._limits = store, limits
        self._manifest = _read_file(store, MANIFEST_NAME)
        if hashlib.sha256(self._manifest).hexdigest() != store.hash:
            raise StoreDamaged(str(store.root), "has another manifest than when it was opened")
        announcement = encode_announcement(Announcement(store.hash, len(self._manifest)))
        greeting = Greeting(announcement, roles=WEIGHT_ROLES)
        self._listener = Listener(
            self._serve, greeting, secret=secret, host=host, port=port, limits=limits, log=logger
        )

    @property
    def port(self) -> int:
        return self._listener.port

    def start(self) -> None:
        self._listener.start()

    def stop(self) -> None:
        self._listener.stop()

    def _serve(self, channel: Channel) -> None:
        """Answer questions until the peer leaves."""
        sequence = 0
        while True:
            header = channel.receive_header(math.inf, self._limits.idle_timeout_s)
            sequence += 1
            kind = check_question(header, sequence)
            body = bytearray(header.body_bytes)
            deadline_s = time.monotonic() + PART_TIMEOUT_S
            channel.receive_body(memoryview(body), deadline_s=deadline_s, silence_s=self._limits.silence_s)
            try:
                self._send(channel, sequence, self._find(kind, bytes(body)))
            except _Refused as refusal:
                _refuse(channel, sequence, refusal)

    def _find(self, kind: WeightKind, body: bytes) -> _Answer:
        """Raises _Refused, or FrameFault for what is no question."""
        if kind == WeightKind.ASK_EXPERT:
            return self._record(body)
        if kind == WeightKind.ASK_FILE:
            return _whole(self._file(body))
        if body:
            raise FrameFault("question for the manifest with a body")
        return _whole(self._manifest)

    def _file(self, body: bytes) -> bytes:
        name = body.decode("utf-8", "replace")
        if name not in self._store.manifest.files:
            raise _Refused(WeightFault.NOT_HELD, "the store has no such file")
        try:
            return _read_file(self._store, name)
        except StoreDamaged as error:
            logger.warning("cannot be given: %s", error)
            raise _Refused(WeightFault.UNREADABLE, error.reason) from error

    def _record(self, body: bytes) -> _Answer:
        key = decode_key(body)
        if not self._store.holds(key):
            raise _Refused(WeightFault.NOT_HELD, "the record is not here")
        check = partial(self._store.check_digest, key)
        return _Answer(self._store.record(key).nbytes, self._store.chunks(key, PART_BYTES), check)

    def _send(self, channel: Channel, sequence: int, answer: _Answer) -> None:
        """Raises _Refused, even after the first parts: the peer believes nothing before the end."""
        digest = hashlib.sha256()
        try:
            for number, piece in enumerate(answer.pieces):
                digest.update(piece)
                head = encode_header(part_header(sequence, number, answer.nbytes))
                channel.send(head, piece, deadline_s=time.monotonic() + PART_TIMEOUT_S)
            answer.check(digest.hexdigest())
        except (ExpertCorrupt, StoreDamaged) as error:
            logger.warning("cannot be given: %s", error)
            raise _Refused(WeightFault.UNREADABLE, str(error)) from error
        tail = encode_header(end_header(sequence)) + digest.digest()
        channel.send(tail, deadline_s=time.monotonic() + PART_TIMEOUT_S)


def _whole(content: bytes) -> _Answer:
    view = memoryview(content)
    pieces = (view[start : start + PART_BYTES] for start in range(0, len(view), PART_BYTES))
    return _Answer(len(view), pieces, lambda sha256: None)


def _refuse(channel: Channel, sequence: int, refusal: _Refused) -> None:
    body = refusal.reason.encode("utf-8", "replace")[:MAX_ERROR_BYTES]
    header = Header(Kind.ERROR, error_code=refusal.fault, sequence=sequence, body_bytes=len(body))
    channel.send(encode_header(header) + body, deadline_s=time.monotonic() + PART_TIMEOUT_S)


def _read_file(store: ExpertStore, name: str) -> bytes:
    """Raises StoreDamaged."""
    try:
        return read_small_file(store.root, name, MAX_MANIFEST_BYTES)
    except ExtractionError as error:
        raise StoreDamaged(str(store.root), str(error)) from error
