"""Weight servers over stores, and one that speaks byte by byte and so can say what the real one never would."""

from __future__ import annotations

import hashlib
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from experts.cached_store import CachedStore
from experts.frame import HEADER_BYTES, Header, Kind, decode_header, encode_header
from experts.handshake import prove
from experts.store import ExpertStore
from experts.store_cache import StoreCache
from experts.weight_frames import (
    PART_BYTES,
    WEIGHT_ROLES,
    Announcement,
    WeightKind,
    decode_key,
    encode_announcement,
    end_header,
    num_parts,
    part_header,
)
from experts.weight_server import WeightServer
from experts.weight_sources import ServerSource, WeightSource
from extraction.manifest import MANIFEST_NAME, ExpertKey

SECRET = b"0123456789abcdef-the-cluster"
PATIENCE_S = 60.0
"""More than a busy machine needs for any of these stores."""
Answer = Callable[[socket.socket, int, bytes], None]
"""Gets the socket, the question's number and the right answer."""


@contextmanager
def sharing(root: Path, secret: bytes = SECRET) -> Iterator[WeightServer]:
    store = ExpertStore.open(root)
    server = WeightServer(store, secret=secret)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        store.close()


def source_of(port: int, store_hash: str, *, is_origin: bool = True, secret: bytes = SECRET) -> ServerSource:
    return ServerSource("127.0.0.1", port, secret=secret, store_hash=store_hash, is_origin=is_origin)


@contextmanager
def joining(
    root: Path,
    store_hash: str,
    *sources: WeightSource,
    keys: tuple[ExpertKey, ...] | None = None,
    limit_bytes: int | None = None,
) -> Iterator[CachedStore]:
    store = CachedStore.join(StoreCache(root, limit_bytes), store_hash, sources, keys)
    try:
        yield store
    finally:
        store.close()


def record_files(cache_root: Path) -> list[Path]:
    """Everything in the folders of records, whatever its name."""
    return sorted(cache_root.glob("stores/*/records/*")) + sorted(cache_root.glob("stores/*/records/.*"))


def assert_all_right(cache_root: Path, store: ExpertStore) -> int:
    """Every file under a final name is a record, byte for byte; returns how many there are."""
    expected = {store.record(key).sha256 for key in store.expert_keys()}
    finished = [path for path in record_files(cache_root) if not path.name.startswith(".")]
    for path in finished:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name[-64:]
        assert path.name[-64:] in expected
    return len(finished)


def speak(answer: bytes, sequence: int) -> bytes:
    """The frames of an honest answer."""
    frames = b""
    for number in range(num_parts(len(answer))):
        header = part_header(sequence, number, len(answer))
        start = number * PART_BYTES
        frames += encode_header(header) + answer[start : start + header.body_bytes]
    return frames + encode_header(end_header(sequence)) + hashlib.sha256(answer).digest()


class FakeWeightServer:
    """Proves the secret, answers about the description honestly, and about records as a script says."""

    def __init__(self, root: Path, answer: Answer, *, secret: bytes = SECRET, announced: str = "") -> None:
        self._root, self._answer, self._secret = root, answer, secret
        self.store = ExpertStore.open(root)
        self._announced = announced or self.store.hash
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.is_done = threading.Event()
        self.num_records = 0
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> FakeWeightServer:
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_done.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in (self._accepting, *self._threads):
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        self.store.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connected, _ = self._listener.accept()
                thread = threading.Thread(target=self._attend, args=(connected,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _attend(self, connected: socket.socket) -> None:
        connected.settimeout(PATIENCE_S)
        with connected, suppress(OSError):
            _, nonce = _hear(connected)
            challenge = secrets.token_bytes(32)
            connected.sendall(encode_header(Header(Kind.CHALLENGE, body_bytes=32)) + challenge)
            _hear(connected)
            manifest = (self._root / MANIFEST_NAME).read_bytes()
            info = encode_announcement(Announcement(self._announced, len(manifest)))
            proof = prove(self._secret, WEIGHT_ROLES.answerer, 0, nonce + challenge, info)
            body = proof + info
            connected.sendall(encode_header(Header(Kind.WELCOME, body_bytes=len(body))) + body)
            self._answer_all(connected, manifest)

    def _answer_all(self, connected: socket.socket, manifest: bytes) -> None:
        while not self.is_done.is_set():
            header, body = _hear(connected)
            if header.kind == WeightKind.ASK_MANIFEST:
                connected.sendall(speak(manifest, header.sequence))
            elif header.kind == WeightKind.ASK_FILE:
                connected.sendall(speak((self._root / body.decode()).read_bytes(), header.sequence))
            else:
                self.num_records += 1
                record = self.store.read_expert(decode_key(body)).numpy().tobytes()
                self._answer(connected, header.sequence, record)


def _hear(connected: socket.socket) -> tuple[Header, bytes]:
    header = decode_header(_exactly(connected, HEADER_BYTES))
    return header, _exactly(connected, header.body_bytes)


def _exactly(connected: socket.socket, nbytes: int) -> bytes:
    received = b""
    while len(received) < nbytes:
        more = connected.recv(nbytes - len(received))
        if not more:
            raise ConnectionError("the other end has gone")
        received += more
    return received
