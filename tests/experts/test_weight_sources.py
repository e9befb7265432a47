"""Weight servers and fetchers that do not trust each other: liars, endless answers, cut connections, wrong secrets."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.errors import FrameFault, RecordNotHeld, SourceFailed, SourceLied, WeightsUnavailable
from experts.frame import HEADER_BYTES, Header, Kind, encode_header
from experts.store import ExpertStore
from experts.weight_client import WeightLink
from experts.weight_frames import (
    PART_BYTES,
    Announcement,
    WeightKind,
    check_question,
    decode_announcement,
    decode_key,
    encode_announcement,
    encode_key,
    encode_question,
    end_header,
    num_parts,
    part_header,
)
from experts.weight_sources import FIRST_PAUSE_S, LONGEST_PAUSE_S, FolderSource, SourceOrder
from extraction.manifest import ExpertKey, FileEntry
from tests.experts.weight_peers import (
    PATIENCE_S,
    SECRET,
    FakeWeightServer,
    assert_all_right,
    joining,
    record_files,
    sharing,
    source_of,
    speak,
)

KEY = ExpertKey("model", 2, 5)
Forge = Callable[[int, bytes], bytes]
"""From a question's number and the right record to what is sent in place of the right answer."""


@pytest.fixture(scope="module")
def whole(tiny_store: Path) -> ExpertStore:
    return ExpertStore.open(tiny_store)


def _part(sequence: int, nbytes: int, **changed: int) -> bytes:
    return encode_header(part_header(sequence, 0, nbytes)._replace(**changed))


def _endless(sequence: int, record: bytes) -> bytes:
    return speak(record, sequence)[:-HEADER_BYTES] + b"".join(
        _part(sequence, len(record), num_rows=number) + record for number in range(1, 50)
    )


FORGERIES: dict[str, Forge] = {
    "another expert's bytes": lambda n, record: speak(bytes(reversed(record)), n),
    "one flipped bit": lambda n, record: speak(record[:99] + bytes([record[99] ^ 1]) + record[100:], n),
    "a wrong hash at the end": lambda n, record: speak(record, n)[:-32] + bytes(32),
    "a longer record": lambda n, record: speak(record + b"more", n),
    "a shorter record": lambda n, record: speak(record[:-4], n),
    "an empty record": lambda n, record: speak(b"", n),
    "a part of 4 GiB": lambda n, record: _part(n, len(record), body_bytes=2**32 - 1),
    "parts without an end": _endless,
    "another question's answer": lambda n, record: speak(record, n + 1),
    "parts in another order": lambda n, record: _part(n, len(record), num_rows=1) + record,
    "a frame of the data plane": lambda n, record: encode_header(Header(Kind.ROWS, sequence=n, num_rows=1)),
    "an error that is none": lambda n, record: encode_header(Header(Kind.ERROR, sequence=n)),
    "an error of 4 GiB": lambda n, record: encode_header(
        Header(Kind.ERROR, error_code=16, sequence=n, body_bytes=2**32 - 1)
    ),
    "noise": lambda n, record: random.Random(7).randbytes(2 * HEADER_BYTES),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_liar_is_not_asked_again_and_the_next_source_is(
    tmp_path: Path, whole: ExpertStore, forgery: str
) -> None:
    def answer(connected: socket.socket, sequence: int, record: bytes) -> None:
        connected.sendall(FORGERIES[forgery](sequence, record))

    with FakeWeightServer(whole.root, answer) as liar, sharing(whole.root) as server:
        sources = source_of(liar.port, whole.hash), source_of(server.port, whole.hash)
        with joining(tmp_path, whole.hash, *sources) as store:
            assert store.wait(PATIENCE_S)
            assert list(store.progress().fetched_bytes) == [f"127.0.0.1:{server.port}"]
        assert liar.num_records <= 2, "one for each thread"
    assert assert_all_right(tmp_path, whole) == len(whole.expert_keys())
    assert all(not path.name.startswith(".") for path in record_files(tmp_path))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.999, 1.0])
def test_connection_cut_anywhere_leaves_no_wrong_record(
    tmp_path: Path, whole: ExpertStore, share: float
) -> None:
    def answer(connected: socket.socket, sequence: int, record: bytes) -> None:
        frames = speak(record, sequence)
        connected.sendall(frames[: round(share * (len(frames) - 1))])
        connected.shutdown(socket.SHUT_RDWR)

    with (
        FakeWeightServer(whole.root, answer) as server,
        joining(tmp_path, whole.hash, source_of(server.port, whole.hash), keys=()) as store,
    ):
        with pytest.raises(WeightsUnavailable, match=r"expert \('model', 2, 5\).*closed by the peer"):
            store.read_expert(KEY)
        assert record_files(tmp_path) == []


def test_server_that_comes_back_is_asked_again(tmp_path: Path, whole: ExpertStore) -> None:
    is_well = threading.Event()

    def answer(connected: socket.socket, sequence: int, record: bytes) -> None:
        if is_well.is_set():
            connected.sendall(speak(record, sequence))
        else:
            connected.shutdown(socket.SHUT_RDWR)

    with (
        FakeWeightServer(whole.root, answer) as server,
        joining(tmp_path, whole.hash, source_of(server.port, whole.hash), keys=(KEY,)) as store,
    ):
        with pytest.raises(WeightsUnavailable):
            store.read_expert(KEY)
        assert "closed by the peer" in store.progress().last_error
        is_well.set()
        assert store.wait(PATIENCE_S)
        assert store.progress().last_error == ""


def test_other_secret_is_refused_on_both_sides(tmp_path: Path, whole: ExpertStore) -> None:
    other = b"another secret of some length"
    with sharing(whole.root, other) as server, pytest.raises(SourceFailed, match="is it the same secret"):
        WeightLink("127.0.0.1", server.port, secret=SECRET)
    with (
        FakeWeightServer(whole.root, lambda *_: None, secret=other) as server,
        pytest.raises(SourceFailed, match="does not know the secret"),
    ):
        WeightLink("127.0.0.1", server.port, secret=SECRET)


def test_proof_for_the_data_plane_opens_no_weights(whole: ExpertStore) -> None:
    from experts.connection import ExpertConnection
    from experts.errors import HandshakeRefused
    from experts.roster import Endpoint

    with sharing(whole.root) as server, pytest.raises(HandshakeRefused):
        ExpertConnection(Endpoint("weights", "127.0.0.1", server.port, 0), secret=SECRET)


def test_server_of_another_store_is_left_alone(tmp_path: Path, whole: ExpertStore) -> None:
    with (
        FakeWeightServer(whole.root, lambda *_: None, announced="0" * 64) as server,
        pytest.raises(WeightsUnavailable, match="serves store 000000000000, another one"),
        joining(tmp_path, whole.hash, source_of(server.port, whole.hash)),
    ):
        pass


def test_manifest_of_another_store_is_refused(tmp_path: Path, whole: ExpertStore) -> None:
    """A server that claims the right hash, with a manifest that it is not of."""
    with (
        FakeWeightServer(whole.root, lambda *_: None, announced="0" * 64) as server,
        pytest.raises(WeightsUnavailable, match="its manifest is not that of store 0000"),
        joining(tmp_path, "0" * 64, source_of(server.port, "0" * 64)),
    ):
        pass


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "experts/model-layer-0002.safetensors", "records", ""]
)
def test_only_files_of_the_manifest_are_given(whole: ExpertStore, name: str) -> None:
    with sharing(whole.root) as server:
        link = WeightLink("127.0.0.1", server.port, secret=SECRET)
        with pytest.raises(RecordNotHeld):
            link.file(name, FileEntry(nbytes=10, sha256="0" * 64))
        assert link.manifest() == (whole.root / "manifest.json").read_bytes(), "the connection is still good"
        link.close()


@pytest.mark.parametrize(
    "question",
    [
        encode_header(Header(WeightKind.PART, sequence=1)),
        encode_header(Header(Kind.CALL, sequence=1)),
        encode_header(Header(WeightKind.ASK_EXPERT, sequence=1, body_bytes=4097)),
        encode_header(Header(WeightKind.ASK_EXPERT, sequence=2, body_bytes=8)) + bytes(8),
        encode_question(WeightKind.ASK_EXPERT, 1, b"\0" * 7),
        encode_question(WeightKind.ASK_EXPERT, 1, struct.pack("<II", 2, 5) + b"../model"),
        encode_question(WeightKind.ASK_MANIFEST, 1, b"?"),
    ],
)
def test_question_that_is_none_ends_the_connection_and_nothing_else(
    whole: ExpertStore, question: bytes
) -> None:
    with sharing(whole.root) as server:
        link = WeightLink("127.0.0.1", server.port, secret=SECRET)
        link._channel._socket.sendall(question)
        with pytest.raises(SourceFailed):
            link.manifest()
        other = WeightLink("127.0.0.1", server.port, secret=SECRET)
        assert other.record(KEY, whole.record(KEY).nbytes, lambda piece: None) == whole.record(KEY).sha256
        other.close()


def test_expert_that_the_store_has_not_is_refused_without_harm(whole: ExpertStore) -> None:
    with sharing(whole.root) as server:
        link = WeightLink("127.0.0.1", server.port, secret=SECRET)
        with pytest.raises(RecordNotHeld, match="talker"):
            link.record(ExpertKey("talker", 2, 5), 10, lambda piece: None)
        assert link.record(KEY, whole.record(KEY).nbytes, lambda piece: None) == whole.record(KEY).sha256
        link.close()


def test_nobody_there_is_said_with_the_address(tmp_path: Path, whole: ExpertStore, free_port: int) -> None:
    with (
        pytest.raises(WeightsUnavailable, match=f"127.0.0.1:{free_port}: cannot connect: Connection refused"),
        joining(tmp_path, whole.hash, source_of(free_port, whole.hash)),
    ):
        pass


def test_folder_that_lacks_some_records_gives_the_others(tmp_path: Path, whole: ExpertStore) -> None:
    import shutil

    part = tmp_path / "part"
    shutil.copytree(whole.root, part)
    (part / "experts/model-layer-0002.safetensors").unlink()
    keys = whole.expert_keys()
    with sharing(whole.root) as server:
        sources = FolderSource(part, whole.hash), source_of(server.port, whole.hash)
        with joining(tmp_path / "cache", whole.hash, *sources) as store:
            assert store.wait(PATIENCE_S)
            fetched = store.progress().fetched_bytes
    from_folder = sum(whole.record(key).nbytes for key in keys if key.layer == 0)
    assert fetched[str(part)] == from_folder
    assert sum(fetched.values()) == sum(whole.record(key).nbytes for key in keys)


# The order of sources


def test_source_that_failed_rests_longer_each_time_and_recovers() -> None:
    order, now_s, pauses = SourceOrder(2), 100.0, []
    for _ in range(10):
        order.failed(0, SourceFailed("a", "broke"), now_s)
        until_s = order._standings[0].retry_at_s
        pauses.append(until_s - now_s)
        assert order.askable(until_s - 1e-6) == [1]
        assert order.askable(until_s) == [0, 1]
        now_s = until_s
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (FIRST_PAUSE_S, LONGEST_PAUSE_S)
    order.worked(0)
    assert order.askable(0.0) == [0, 1]


def test_urgent_asks_those_that_rest_too_but_never_a_liar() -> None:
    order = SourceOrder(3)
    order.failed(0, SourceFailed("a", "broke"), 0.0)
    order.failed(1, SourceLied("b", "wrong bytes"), 0.0)
    assert order.askable(0.1, is_urgent=True) == [2, 0]
    assert order.askable(1e9) == [0, 2]
    assert order.reasons() == "weights from a: broke; weights from b: wrong bytes"


# The frames


@given(
    st.builds(
        ExpertKey,
        st.from_regex("[A-Za-z0-9_.-]{1,40}", fullmatch=True),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**32 - 1),
    )
)
def test_key_survives_the_wire(key: ExpertKey) -> None:
    assert decode_key(encode_key(key)) == key


@given(st.binary(max_size=80))
def test_any_bytes_are_a_key_or_a_fault(body: bytes) -> None:
    with suppress(FrameFault):
        assert encode_key(decode_key(body)) == body


@given(st.binary(max_size=200))
def test_any_bytes_are_an_announcement_or_a_fault(body: bytes) -> None:
    with suppress(FrameFault):
        decode_announcement(body)


@pytest.mark.parametrize(
    ("store", "size"),
    [("0" * 63, 9), ("G" * 64, 9), (None, 9), ("0" * 64, 0), ("0" * 64, True), ("0" * 64, 2**40)],
)
def test_announcement_out_of_range_is_a_fault(store: str, size: int) -> None:
    with pytest.raises(FrameFault):
        decode_announcement(encode_announcement(Announcement(store, size)))


@given(st.integers(0, 5 * PART_BYTES))
def test_parts_add_up_to_the_answer(total_bytes: int) -> None:
    headers = [part_header(3, number, total_bytes) for number in range(num_parts(total_bytes))]
    assert sum(header.body_bytes for header in headers) == total_bytes
    assert all(0 < header.body_bytes <= PART_BYTES for header in headers)
    assert [header.num_rows for header in headers] == list(range(len(headers)))


@given(st.integers(0, 255), st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_only_a_question_of_its_number_is_taken(kind: int, body_bytes: int, sequence: int) -> None:
    header = Header(kind, sequence=sequence, body_bytes=body_bytes)
    is_right = 32 <= kind <= 34 and body_bytes <= 4096 and sequence == 2
    if is_right:
        assert check_question(header, 2) == kind
    else:
        with pytest.raises(FrameFault):
            check_question(header, 2)


def test_end_says_nothing_but_the_hash() -> None:
    assert end_header(4) == Header(WeightKind.END, sequence=4, body_bytes=32)
