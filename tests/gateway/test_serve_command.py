"""`sage-moe serve` as a user runs it: the dry run, refusals before Ray, and a service behind a key."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from typer.testing import CliRunner

from experts.errors import ExpertError
from gateway.cli import app
from gateway.errors import DeploymentFailed, GatewayError
from gateway.service.command import _in_few_lines

KEY, SECOND = "sk-canary-3141592653", "sk-canary-2718281828"
COMPLETION: dict[str, Any] = {
    "model": "tales",
    "prompt": "Once upon a time",
    "temperature": 0,
    "max_tokens": 8,
}


def test_dry_run_shows_what_would_be_started_and_no_key(
    stories_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text(KEY)
    (tmp_path / "keys").chmod(0o600)
    config = f"host: 0.0.0.0\nport: 9000\nmax-model-len: 512\napi-key-file: {tmp_path / 'keys'}\n"
    (tmp_path / "c.yaml").write_text(config)
    command = [
        "serve",
        str(stories_store),
        "--config",
        str(tmp_path / "c.yaml"),
        "--port",
        "9001",
        "--dry-run",
    ]
    printed = []
    for more in ([], ["--json"]):
        monkeypatch.setenv("SAGE_MOE_API_KEYS", SECOND)
        result = CliRunner().invoke(app, [*command, "--api-key", "sk-canary-3", *more])
        assert (result.exit_code, result.stderr) == (0, "")
        printed.append(result.stdout)
    plan, same = yaml.safe_load(printed[0]), json.loads(printed[1])
    assert plan["memory"].pop("available_bytes") > 0
    assert same["memory"].pop("available_bytes") > 0
    assert plan == same
    options = plan["options"]
    memory = plan["memory"]
    assert memory["budget_bytes"] == sum(row["budget_bytes"] for row in memory["processes"])
    assert (options["port"], options["max-model-len"], options["api-keys"]) == (9001, 512, 3)
    assert plan["http"] == {"address": "0.0.0.0", "port": 9001}
    gateway, router = plan["serve"]["applications"][0]["deployments"]
    assert (gateway["name"], router["name"]) == ("gateway", "router")
    assert gateway["num_replicas"] == 1
    assert "canary" not in "".join(printed)


def test_dry_run_shows_every_router(stories_store: Path) -> None:
    command = ["serve", str(stories_store), "--routers", "2", "--actors", "1", "--dry-run", "--json"]
    plan = json.loads(CliRunner().invoke(app, command).stdout)
    deployments = plan["serve"]["applications"][0]["deployments"]
    assert [each["name"] for each in deployments] == ["gateway", "router-0", "router-1"]
    processes = {row["process"]: row for row in plan["memory"]["processes"]}
    assert list(processes) == ["router-0", "router-1", "experts-0"]
    assert processes["router-1"]["backbone_bytes"] == processes["router-0"]["backbone_bytes"] > 0
    assert plan["memory"]["num_routers"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--host", "0.0.0.0"), "which needs an API key; give --api-key-file FILE, or bind to 127.0.0.1"),
        (("--max-model-len", "4096"), "max-model-len (4096) is above the model's context of 2048"),
        (("--kv-budget", "1"), "--kv-budget must be a size such as 512MiB or 2GiB, not '1'"),
        (("--eviction", "LRU"), "--eviction must be lfu, lru or trust, not 'LRU'"),
        (("--config", "/no/such.yaml"), "/no/such.yaml cannot be read: No such file or directory"),
        (("--expert-budget", "half", "--dry-run"), "--expert-budget must be a size such as 2GiB"),
        (("--api-key", "two words", "--dry-run"), "--api-key holds a key that is not"),
    ],
)
def test_refusal_is_one_line_before_anything_starts(
    stories_store: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = CliRunner().invoke(app, ["serve", str(stories_store), *arguments])
    assert isinstance(result.exception, GatewayError)
    assert message in str(result.exception) and "two words" not in str(result.exception)
    assert "\n" not in str(result.exception)
    assert "ray" not in result.output


def test_copy_that_holds_another_store_is_refused_before_anything_starts(
    stories_store: Path, tiny_store: Path
) -> None:
    command = ["serve", str(stories_store), "--store-copy", str(tiny_store), "--dry-run"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, ExpertError)
    assert "is no copy of" in str(result.exception)


@contextmanager
def _service(store: Path, port: int, ray_folder: str) -> Iterator[subprocess.Popen[str]]:
    """Started with a key on the command line, the worst place for it."""
    command = [sys.executable, "-m", "gateway.cli", "serve", str(store), "--port", str(port)]
    command += ["--api-key", KEY, "--served-model-name", "stories", "--served-model-name", "tales"]
    command += ["--max-num-seqs", "1", "--max-queue", "1", "--max-model-len", "1024"]
    environment = os.environ | {"SAGE_MOE_API_KEYS": SECOND, "RAY_TMPDIR": ray_folder}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=240)


def _read_until_served(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    output = ""
    while " is served at " not in output and (line := process.stdout.readline()):
        output += line
    return output


def _raw(port: int, target: str, method: str = "GET", host: str = "gateway") -> int:
    """The status for a request line as it is, which no client library would send."""
    with socket.create_connection(("127.0.0.1", port), timeout=30.0) as connection:
        request = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        return int(connection.makefile("rb").readline().split()[1])


@contextmanager
def _trickling(port: int) -> Iterator[Callable[[], bytes]]:
    """A body of which a byte a second comes, and would for a quarter of an hour. Yields what waits for its answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=30.0) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: g\r\nContent-Length: 999\r\n"
        connection.sendall(f"{head}Authorization: Bearer {KEY}\r\n\r\n ".encode())

        def answer() -> bytes:
            while not select.select([connection], [], [], 1.0)[0]:
                connection.sendall(b" ")
            return b"".join(iter(lambda: connection.recv(65536), b""))

        yield answer


@pytest.mark.ray
def test_service_behind_a_key_refuses_everybody_else_and_what_is_too_much(
    stories_store: Path, free_port: int
) -> None:
    ray_folder = tempfile.mkdtemp(prefix="r")  # short: Ray puts sockets there
    url = f"http://127.0.0.1:{free_port}"
    try:
        with _service(stories_store, free_port, ray_folder) as process:
            output = _read_until_served(process)
            assert f"stories and tales is served at {url}/v1" in output, output
            assert "better --api-key-file FILE" in output and "canary" not in output
            _check_doors(free_port)
            _check_answers(url)
            with _trickling(free_port) as answer:
                _check_overload(url)
                assert answer().startswith(b"HTTP/1.1 408 ")
            _check_processes(process.pid)
        assert not _files_with(b"canary", Path(ray_folder))
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)


def _check_doors(port: int) -> None:
    assert _raw(port, "/health") == _raw(port, "http://other/health") == 200
    for target in (
        *("/v1/models", "//v1/models", "/v1/%6dodels", "/health/../v1/models", "/health/", "/%68ealth"),
        *("/metrics", "/ready", "/sage/status", "http://other/v1/models", "/health%2f..%2fv1/models"),
        *("/-/routes", "/-/healthz"),
    ):
        for method in ("GET", "OPTIONS"):
            assert _raw(port, target, method) == 401, (method, target)
        assert _raw(port, target, host="localhost/health") == 401


def _check_answers(url: str) -> None:
    for key in (KEY, SECOND):
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60.0) as client:
            names = [card["id"] for card in client.get("/v1/models").raise_for_status().json()["data"]]
            assert names == ["stories", "tales"]
            answer = client.post("/v1/completions", json=COMPLETION).raise_for_status().json()
            assert answer["model"] == "stories"
            too_long = client.post("/v1/completions", json=COMPLETION | {"max_tokens": 1024})
            assert "context is 1024" in too_long.json()["error"]["message"]


def _check_overload(url: str) -> None:
    """Beside the one that trickles, for eight seconds, there is room for one, and the next is refused at once."""
    headers = {"Authorization": f"Bearer {KEY}"}
    long = COMPLETION | {"max_tokens": 900, "stream": True, "seed": 1, "temperature": 1}
    client = httpx.Client(base_url=url, headers=headers, timeout=60.0)
    with client, client.stream("POST", "/v1/completions", json=long) as stream:
        assert stream.status_code == 200
        refused = client.post("/v1/completions", json=COMPLETION)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["code"] == "queue_full"
        assert client.get("/ready").status_code == 200


def _check_processes(pid: int) -> None:
    """No key on a command line or in the environment of what the service started."""
    process = psutil.Process(pid)
    assert not any("canary" in word for word in process.cmdline())
    children = process.children(recursive=True)
    assert len(children) > 3
    for child in children:
        assert "canary" not in str(child.cmdline()) + str(child.environ()), child.name()


def _files_with(word: bytes, folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.suffix == ".log" for path in files)
    return [path for path in files if word in path.read_bytes()]


def test_dry_run_names_experts_in_few_words_where_people_read_it() -> None:
    found = {"router_experts": {"model/0": [0, 1, 2, 4]}, "actors": [], "keep": ["native"], "port": 8000}
    assert _in_few_lines(found) == found | {"router_experts": {"model/0": "0-2, 4"}}


def test_a_replica_that_was_killed_while_it_started_is_told_of_in_words() -> None:
    reason = "The deployment failed to start 1 times in a row. See controller logs. Error:\nActorDiedError()"
    assert "was killed while it started" in str(DeploymentFailed(reason))
