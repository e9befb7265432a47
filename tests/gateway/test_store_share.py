"""`sage-moe store share` and `store sync`, from the command line to the files."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experts.errors import CacheTooSmall, SourceFailed, WeightsUnavailable
from experts.store import ExpertStore
from extraction.manifest import group_of
from gateway.errors import OptionInvalid, SecretRefused, SyncStopped
from gateway.stores.command import store as app
from gateway.stores.secret_file import make_secret, read_secret
from gateway.stores.share import SyncRequest, parse_address, shared_store, sync
from tests.experts.weight_peers import FakeWeightServer, assert_all_right, record_files

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def whole(tiny_store: Path) -> ExpertStore:
    return ExpertStore.open(tiny_store)


@pytest.fixture
def secret_file(tmp_path: Path) -> str:
    path = str(tmp_path / "secret")
    assert make_secret(path)
    return path


@pytest.fixture
def address(whole: ExpertStore, secret_file: str) -> Iterator[str]:
    with shared_store(whole.root, read_secret(secret_file), "127.0.0.1", 0) as (_, listening):
        yield listening


def _sync(*arguments: str) -> dict[str, object]:
    result = RUNNER.invoke(app, ["sync", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout.splitlines()[-1])
    assert isinstance(answer, dict)
    return answer


def test_store_on_a_shared_disk_is_synced(tmp_path: Path, whole: ExpertStore) -> None:
    answer = _sync(str(whole.root), "--to", str(tmp_path / "cache"))
    assert answer["hash"] == whole.hash
    assert answer["folder"] == str(tmp_path / "cache" / "stores" / whole.hash)
    assert (answer["records_done"], answer["records_total"]) == (16, 16)
    assert assert_all_right(tmp_path / "cache", whole) == 16
    assert _sync(str(whole.root), "--to", str(tmp_path / "cache"))["fetched_bytes"] == {}


def test_group_and_layers_are_synced_from_a_server(
    tmp_path: Path, whole: ExpertStore, address: str, secret_file: str
) -> None:
    cache = str(tmp_path / "cache")
    common = ("--to", cache, "--from", address, "--secret-file", secret_file)
    answer = _sync(*common, "--groups", "1/4", "--layers", "2")
    expected = [key for key in whole.expert_keys() if key.layer == 2 and group_of(key, 4) == 1]
    assert answer["records_done"] == len(expected) == assert_all_right(Path(cache), whole)
    answer = _sync(*common)
    assert answer["records_done"] == 16
    assert answer["fetched_bytes"] == {address: (16 - len(expected)) * whole.record(expected[0]).nbytes}


def test_people_read_how_much_is_there_and_new(tmp_path: Path, whole: ExpertStore) -> None:
    result = RUNNER.invoke(
        app, ["sync", str(whole.root), "--to", str(tmp_path / "c")], catch_exceptions=False
    )
    assert "16 experts, 0.3 MiB, 0.3 MiB of them new" in result.output.replace("\n", "")


def test_sync_that_gets_nothing_more_says_why_and_what_is_there(tmp_path: Path, whole: ExpertStore) -> None:
    def answer(connected: object, sequence: int, record: bytes) -> None:
        raise OSError("gone")

    with FakeWeightServer(whole.root, answer) as server:
        request = SyncRequest(tmp_path, None, (("127.0.0.1", server.port),), b"0123456789abcdef-the-cluster")
        with pytest.raises(SyncStopped, match=r"0 of 16 experts are here.*closed by the peer"):
            sync(request, lambda done, total: None, patience_s=0.5)
    assert record_files(tmp_path) == []


def test_sync_with_another_secret_is_refused_in_one_line(tmp_path: Path, address: str) -> None:
    request = SyncRequest(tmp_path / "c", None, (parse_address(address),), b"x" * 32)
    with pytest.raises(SourceFailed, match="is it the same secret"):
        sync(request, lambda done, total: None)


def test_limit_below_the_group_is_refused_with_both_numbers(tmp_path: Path, whole: ExpertStore) -> None:
    with pytest.raises(CacheTooSmall, match=r"294912 bytes, above .* limit of 102400 bytes"):
        _sync(str(whole.root), "--to", str(tmp_path / "c"), "--store-cache-limit", "100KiB")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--layers", "1"), "--layers names layer 1, which has no experts"),
        (("--layers", "7"), "--layers names layer 7, which has no experts"),
        (("--store-cache-limit", "many"), "--store-cache-limit must be a size"),
    ],
)
def test_wrong_option_is_named_with_what_it_must_be(
    tmp_path: Path, whole: ExpertStore, arguments: tuple[str, ...], words: str
) -> None:
    with pytest.raises(OptionInvalid, match=re.escape(words)):
        _sync(str(whole.root), "--to", str(tmp_path / "c"), *arguments)


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":1", "host:0", "host:65536", "a b:1", "host:1x", "[::1:1"]
)
def test_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(OptionInvalid, match="must be HOST:PORT"):
        parse_address(text)


def test_address_is_a_host_and_a_port() -> None:
    assert parse_address("node-7.example:7001") == ("node-7.example", 7001)
    assert parse_address("[::1]:9") == ("::1", 9)


def test_options_that_go_together_are_asked_for(tmp_path: Path) -> None:
    for arguments in (
        ("--to", "c"),
        ("--to", "c", "--from", "h:1"),
        ("s", "--to", "c", "--secret-file", "f"),
    ):
        result = RUNNER.invoke(app, ["sync", *arguments])
        assert result.exit_code == 2, result.output


# The secret


def test_secret_is_made_private_and_once(tmp_path: Path) -> None:
    path = str(tmp_path / "secret")
    assert make_secret(path) and not make_secret(path)
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert re.fullmatch(rb"[0-9a-f]{64}", read_secret(path))
    with pytest.raises(SecretRefused, match="cannot be made: No such file or directory"):
        make_secret(str(tmp_path / "absent" / "secret"))


@pytest.mark.parametrize("content", ["", "short", "x" * 31, "two lines of some length\nthat make no secret"])
def test_secret_that_is_none_is_refused_without_showing_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "secret"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(SecretRefused, match="holds no secret") as refused:
        read_secret(str(path))
    assert not content or content not in str(refused.value)


def test_secret_that_everybody_reads_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("x" * 40)
    path.chmod(0o644)
    with pytest.raises(SecretRefused, match="chmod 600"):
        read_secret(str(path))


# The commands as processes


def test_share_and_sync_as_processes(tmp_path: Path, whole: ExpertStore) -> None:
    """Whoever shares is stopped by Ctrl-C; whoever syncs is told so in one line, and goes on with another server."""
    command = [sys.executable, "-m", "gateway.cli", "store"]
    secret = str(tmp_path / "secret")
    sharer = subprocess.Popen(
        [*command, "share", str(whole.root), "--secret-file", secret],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert sharer.stdout is not None and sharer.stderr is not None
        line = sharer.stdout.readline()
        match = re.search(r"is shared at (127\.0\.0\.1:[0-9]+) \(Ctrl-C stops it\)", line)
        assert match is not None, line + sharer.stderr.read()
        answer = _sync(
            "--to", str(tmp_path / "c"), "--from", match[1], "--secret-file", secret, "--layers", "0"
        )
        assert answer["records_done"] == 8
    finally:
        sharer.send_signal(signal.SIGINT)
        sharer.communicate(timeout=60)
    assert sharer.returncode == 0
    with pytest.raises((SourceFailed, WeightsUnavailable), match="Connection refused"):
        _sync("--to", str(tmp_path / "c"), "--from", match[1], "--secret-file", secret)
    assert _sync(str(whole.root), "--to", str(tmp_path / "c"), "--layers", "0")["fetched_bytes"] == {}
