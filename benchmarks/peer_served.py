"""The same engine behind HTTP and Ray Serve, as a contender of `bench_peers`: `sage-moe serve` in processes of its own.

Streams are connections of one client that shares the cores with the service, as a client on the same machine does.
Tokens are not told over HTTP; answers are compared by their text.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile

import httpx
import psutil

from benchmarks.peer_run import Facts, Generated, Prompts
from benchmarks.sse_client import Answer, stream_completion

HOST = "127.0.0.1"
MODEL = "peer"
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 300.0


class ServiceNotReady(Exception):
    """The service ended or did not become ready; carries the end of what it printed."""

    def __init__(self, output: str) -> None:
        super().__init__(output)
        self.output = output

    def __str__(self) -> str:
        return f"the service did not become ready: {self.output}"


class ServedContender:
    """No expert actors: the router computes all experts, the default on one machine."""

    def __init__(self, store: Path) -> None:
        """Returns when the service is ready. Raises ServiceNotReady."""
        self.port = _free_port()
        self._log = TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        command = [sys.executable, "-m", "gateway.cli", "serve", str(store), "--port", str(self.port)]
        command += ["--served-model-name", MODEL, "--expert-budget", "100%"]
        self.started_at = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
        )
        if not self._wait_ready():
            self.close()
            self._log.seek(0)
            raise ServiceNotReady(self._log.read()[-2000:])
        self.ready_s = time.monotonic() - self.started_at

    def facts(self) -> Facts:
        """What it reads is what the engine in process reads."""
        status = httpx.get(f"http://{HOST}:{self.port}/sage/status", timeout=30.0).raise_for_status().json()
        setting = {
            "ready_s": round(self.ready_s, 1),
            "numerics_class": status["router"]["numerics_class"],
        }
        return Facts("sage-moe served", version("sage-moe"), 0, 0, setting)

    def generate(self, prompts: Prompts, num_tokens: int) -> Generated:
        answers = asyncio.run(self._stream_all(prompts, num_tokens))
        return Generated(
            [[] for _ in prompts],
            sum(answer.num_tokens for answer in answers),
            [answer.first_s for answer in answers],
            [answer.last_s for answer in answers],
            text=[answer.text for answer in answers],
        )

    def top_logprobs(self, prompt: Sequence[int], count: int) -> list[tuple[int, float]]:
        """Not told by token over HTTP; compare texts instead."""
        return []

    def memory(self) -> dict[str, int]:
        """Of all its processes together; what several of them share counts once (proportional set size)."""
        root = psutil.Process(self._process.pid)
        processes = [root, *root.children(recursive=True)]
        return {"proportional_now": sum(_pss(process) for process in processes), "processes": len(processes)}

    def close(self) -> None:
        """Asked first, then ended with everything below it."""
        if self._process.poll() is None:
            below = psutil.Process(self._process.pid).children(recursive=True)
            self._process.send_signal(signal.SIGTERM)  # which a background job does not ignore
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
                for process in below:
                    if process.is_running():
                        process.kill()

    async def _stream_all(self, prompts: Prompts, num_tokens: int) -> list[Answer]:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return await asyncio.gather(*(self._stream(prompt, num_tokens) for prompt in prompts))

    async def _stream(self, prompt: Sequence[int], num_tokens: int) -> Answer:
        body = {
            "model": MODEL,
            "prompt": list(prompt),
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        return await stream_completion(HOST, self.port, body)

    def _wait_ready(self) -> bool:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"http://{HOST}:{self.port}/ready", timeout=10.0).status_code == 200:
                    return True
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        return False


def _pss(process: psutil.Process) -> int:
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
