"""The command as users run it: alone, and as a job of a Ray cluster with its dashboard and token."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.processes import end_processes
from gateway.batch.job import BatchOptions, compute_here, run_batch
from gateway.batch.plan import RowDefaults
from gateway.demo.ports import free_port
from gateway.progress import LINE_INTERVAL_S, ProgressLines

REPOSITORY = Path(__file__).parent.parent.parent
SCRIPTS = Path(sys.executable).parent
START_TIMEOUT_S = 240.0


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway.cli", "batch", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"COLUMNS": "200"} | environment,
    )


def _error(*arguments: str, **environment: str) -> str:
    result = _run(*arguments, **environment)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_what_cannot_be_run_is_one_line_before_ray_is_started(stories_store: Path, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "a"}\n')
    assert "none.jsonl: No such file" in _error(str(stories_store), "none.jsonl", str(tmp_path / "out"))
    assert "no batch's output" in _error(str(stories_store), str(source), str(tmp_path))
    submitted = _error(str(stories_store), str(source), "out", RAY_JOB_CONFIG_JSON_ENV_VAR="{}")
    assert "give an absolute path" in submitted


def test_progress_lines_are_few_and_tell_rate_and_time_left() -> None:
    now, lines = 100.0, []
    progress = ProgressLines(lambda: now, lines.append, "rows")
    for done in range(100, 501, 100):
        progress.show(done, 500)
        now += LINE_INTERVAL_S / 2
    assert lines == [
        "100 of 500 rows",
        "300 of 500 rows, 40.0 rows/s, about 0.1 min left",
        "500 of 500 rows, 40.0 rows/s",
    ]


@pytest.mark.ray
def test_command_writes_the_bytes_of_a_run_without_ray(stories_store: Path, tmp_path: Path) -> None:
    prompts = [f"Once upon a time there were {n} wolves" for n in range(300)]
    columns = {"prompt": prompts, "id": pa.array(range(300)), "seed": pa.array([None, 7] * 150)}
    source, output = tmp_path / "rows.parquet", tmp_path / "out"
    pq.write_table(pa.table(columns), source)
    options = ("--max-tokens", "2", "--seed", "5", "--served-model-name", "m")
    result = _run(str(stories_store), str(source), str(output), *options)
    assert result.returncode == 0, result.stderr
    assert "300 rows in 2 parts, 0 with an error" in result.stdout
    assert "300 of 300 rows" in result.stderr
    assert "Traceback" not in result.stderr
    here = BatchOptions(
        stories_store, "m", source, tmp_path / "here", defaults=RowDefaults(seed=5, max_tokens=2)
    )
    run_batch(here, compute_here)
    assert _content(output) == _content(here.output)


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A head node on loopback with dashboard and token. Yields the environment of its users."""
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    dashboard, agent, client = free_port(), free_port(), free_port()
    environment = os.environ | {
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "SAGE_MOE_CACHE": str(tmp_path / "cache"),
    }
    temporary = f"/tmp/sage-{secrets.token_hex(4)}"  # short: sockets lie in it
    options = (
        f"--head --block --node-ip-address=127.0.0.1 --port=0 --num-cpus=2 --dashboard-host=127.0.0.1 "
        f"--include-dashboard=true --dashboard-port={dashboard} --dashboard-agent-listen-port={agent} "
        f"--ray-client-server-port={client} --min-worker-port=0 --max-worker-port=0 "
        f"--object-store-memory={256 * 2**20} --temp-dir={temporary}"
    )
    command = [str(SCRIPTS / "ray"), "start", *options.split()]
    log = tmp_path / "head.log"
    with open(log, "wb") as output:
        head = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Ray runtime started" not in log.read_text():
            assert head.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield environment
    finally:
        started = psutil.Process(head.pid).children(recursive=True)
        head.kill()  # asked to stop, it would take half a minute
        head.wait()
        end_processes(started, 0.0)
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.mark.ray
def test_batch_runs_as_a_submitted_job(cluster: dict[str, str], tmp_path: Path) -> None:
    """The documented command, with the repository as working folder and a relative input in it."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "rows.jsonl").write_text('{"prompt": "Once upon a time", "max_tokens": 4, "seed": 1}\n{}\n')
    for package in ("extraction", "experts", "router", "cluster", "gateway", "models"):
        (work / package).symlink_to(REPOSITORY / package)
    output = tmp_path / "out"
    command = ["ray", "job", "submit", "--working-dir", ".", "--", "sage-moe", "batch", "stories"]
    submitted = subprocess.run(
        [str(SCRIPTS / "ray"), *command[1:], "rows.jsonl", str(output)],
        cwd=work,
        env=cluster,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "2 rows in 1 part, 1 with an error" in submitted.stdout
    rows = pq.read_table(output).to_pylist()
    assert [row["finish_reason"] for row in rows] == ["length", None]
    assert json.loads((output / "_manifest.json").read_bytes())["rows"] == 2
    stranger = cluster | {"RAY_AUTH_MODE": "disabled"}
    refused = subprocess.run(
        [str(SCRIPTS / "ray"), "job", "list"], env=stranger, capture_output=True, text=True, timeout=60
    )
    assert refused.returncode != 0
