"""A fetcher's end of a connection to a weight server: one question at a time, every byte of an answer bounded.

Proves the cluster's secret and wants it proved, as the data plane does (`experts.handshake`). What a server sends is
believed only as far as a hash goes that the caller knows already: the store's hash covers the manifest, the manifest
everything else of a copied store. Used by `experts.weight_sources`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

from experts.channel import TransportLimits, connect
from experts.errors import FrameFault, LinkLost, RecordNotHeld, SourceFailed, SourceLied
from experts.frame import Header, Kind, check_exact
from experts.handshake import check_secret, prove_and_hear
from experts.weight_frames import (
    DIGEST_BYTES,
    PART_BYTES,
    PART_TIMEOUT_S,
    WEIGHT_LIMITS,
    WEIGHT_ROLES,
    WeightFault,
    WeightKind,
    check_refusal,
    decode_announcement,
    encode_key,
    encode_question,
    end_header,
    num_parts,
    part_header,
)
from extraction.errors import one_line
from extraction.manifest import MAX_MANIFEST_BYTES, ExpertKey, FileEntry

Sink = Callable[[memoryview], object]
"""Takes an answer's bytes as they come; each piece is overwritten after the call."""


class WeightLink:
    """Belongs to one thread at a time. After SourceFailed it is closed; after RecordNotHeld it is still good."""

    def __init__(
        self, host: str, port: int, *, secret: bytes, limits: TransportLimits = WEIGHT_LIMITS
    ) -> None:
        """Connect and agree. Raises SourceFailed; ValueError when the secret is too short."""
        check_secret(secret)
        self.name = f"{host}:{port}"
        self._limits = limits
        try:
            self._channel = connect(host, port, limits)
        except OSError as error:
            raise SourceFailed(self.name, f"cannot connect: {error.strerror or error}") from error
        deadline_s = time.monotonic() + limits.handshake_timeout_s
        try:
            body = prove_and_hear(self._channel, secret, 0, limits, deadline_s, WEIGHT_ROLES)
            self.announcement = decode_announcement(body)
        except (LinkLost, FrameFault) as error:
            self._channel.close()
            raise SourceFailed(self.name, f"no agreement: {error}") from error
        self._sequence = 0
        self._buffer = memoryview(bytearray(PART_BYTES))

    def manifest(self) -> bytes:
        """Raises SourceFailed, or SourceLied where it is not what the announced hash names."""
        content = bytearray()
        announced = self.announcement
        digest = self._ask(
            WeightKind.ASK_MANIFEST, b"", "its manifest", announced.manifest_bytes, content.extend
        )
        if digest != announced.store_hash:
            raise self._lied(f"its manifest is not that of store {announced.store_hash}")
        return bytes(content)

    def file(self, name: str, entry: FileEntry) -> bytes:
        """A small file that the manifest lists. Raises SourceFailed, SourceLied or RecordNotHeld."""
        if entry.nbytes > MAX_MANIFEST_BYTES:
            raise SourceFailed(self.name, f"{name} of {entry.nbytes} bytes, at most {MAX_MANIFEST_BYTES}")
        content = bytearray()
        digest = self._ask(WeightKind.ASK_FILE, name.encode(), name, entry.nbytes, content.extend)
        if digest != entry.sha256:
            raise self._lied(f"{name} has another hash than the manifest says")
        return bytes(content)

    def record(self, key: ExpertKey, nbytes: int, sink: Sink) -> str:
        """The SHA-256 of what came, for the caller to compare. Raises SourceFailed, SourceLied or RecordNotHeld."""
        return self._ask(WeightKind.ASK_EXPERT, encode_key(key), f"expert {tuple(key)}", nbytes, sink)

    def end(self) -> None:
        """Any thread may call: whoever waits for an answer gets SourceFailed."""
        self._channel.end("closed here")

    def close(self) -> None:
        self._channel.close()

    def _ask(self, kind: WeightKind, body: bytes, what: str, total_bytes: int, sink: Sink) -> str:
        """What the sink raises goes through, and closes the link: the rest of the answer would be in the way."""
        try:
            return self._exchange(kind, body, what, total_bytes, sink)
        except RecordNotHeld:
            raise
        except LinkLost as loss:
            self.close()
            raise SourceFailed(self.name, str(loss)) from loss
        except FrameFault as fault:
            raise self._lied(str(fault)) from fault
        except BaseException:
            self.close()
            raise

    def _exchange(self, kind: WeightKind, body: bytes, what: str, total_bytes: int, sink: Sink) -> str:
        self._sequence += 1
        question = encode_question(kind, self._sequence, body)
        self._channel.send(question, deadline_s=time.monotonic() + PART_TIMEOUT_S)
        digest = hashlib.sha256()
        for number in range(num_parts(total_bytes)):
            piece = self._receive(part_header(self._sequence, number, total_bytes), what)
            digest.update(piece)
            sink(piece)
        end = bytes(self._receive(end_header(self._sequence), what))
        if end != digest.digest():
            raise FrameFault(f"{what} came with another hash than was sent")
        return end.hex()

    def _receive(self, expected: Header, what: str) -> memoryview:
        """The body of the one frame that may come now, or RecordNotHeld or SourceFailed for a refusal."""
        deadline_s = time.monotonic() + PART_TIMEOUT_S
        header = self._channel.receive_header(deadline_s, self._limits.silence_s)
        if header.kind == Kind.ERROR:
            check_refusal(header, self._sequence)
            raise self._refusal(header.error_code, self._body(header.body_bytes, deadline_s), what)
        check_exact(header, expected)
        return self._body(header.body_bytes, deadline_s)

    def _body(self, nbytes: int, deadline_s: float) -> memoryview:
        body = self._buffer[:nbytes]
        self._channel.receive_body(body, deadline_s=deadline_s, silence_s=self._limits.silence_s)
        return body

    def _refusal(self, code: int, message: memoryview, what: str) -> RecordNotHeld | SourceFailed:
        if code == WeightFault.NOT_HELD:
            return RecordNotHeld(self.name, what)
        reason = one_line(bytes(message).decode("utf-8", "replace"))
        return SourceFailed(self.name, f"cannot give {what}: {reason}")

    def _lied(self, reason: str) -> SourceLied:
        self.close()
        return SourceLied(self.name, reason)


assert DIGEST_BYTES <= PART_BYTES, "one buffer serves every frame"
