"""How soon is a service ready after its command was typed, and which processes take how much CPU until then?

Starts `sage-moe serve` with expert actors, waits until it says that it serves, and interrupts it, again and again,
while the processes below the command are looked at. Ray counts as up when its node starts the first process that is to
work for us. With `--beside` another checkout's command is started in turn, by the same interpreter; of the ratios
between the two the machine's other work is no part.

    python -m benchmarks.bench_start [STORE] [--actors 2] [--rounds 5] [--beside CHECKOUT] [--keep]
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.report import finish, spread
from cluster.processes import descendants, end_processes

HERE = Path(__file__).parent.parent
LOOK_S = 0.05
PATIENCE_S = 120.0
SIGN = b"is served at"
KINDS = {
    "ray::ServeReplica:sage-moe:router": "router",
    "ray::ServeReplica:sage-moe:gateway": "gateway",
    "ray::ServeController": "Serve's controller",
    "ray::ExpertActor": "expert actors",
    "ray::Supervisor": "supervisor",
    "ray::IDLE": "workers without work",
    "ray::": "Ray's own",
    "/ray/": "Ray's own",
}
"""By what a command line has in it; the first that fits."""
WORKERS = ("router", "gateway", "Serve's controller", "expert actors", "supervisor", "workers without work")


@dataclass(frozen=True)
class Start:
    """Seconds from the command on, and CPU seconds of all processes of a kind."""

    ray_up_s: float
    ready_s: float
    cpu_s: dict[str, float]


def kind_of(command: Sequence[str]) -> str:
    words = " ".join(command)
    return next((kind for sign, kind in KINDS.items() if sign in words), "others")


def start_once(checkout: Path, store: Path, num_actors: int) -> Start:
    """Raises RuntimeError where it is not ready in time."""
    command = [sys.executable, "-m", "gateway.cli", "serve", str(store)]
    command += ["--actors", str(num_actors), "--port", str(free_port())]
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONUNBUFFERED": "1"}
    begun_s, begun_at = time.monotonic(), time.time()
    process = subprocess.Popen(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    seen: dict[psutil.Process, tuple[str, float]] = {}
    said = b""
    try:
        while SIGN not in said:
            if process.poll() is not None or time.monotonic() > begun_s + PATIENCE_S:
                raise RuntimeError(f"not ready, exit code {process.poll()}: {' '.join(command)}")
            look(process.pid, seen)
            time.sleep(LOOK_S)
            said += process.stdout.read() or b""
        ready_s = time.monotonic() - begun_s
        look(process.pid, seen)
        own = psutil.Process(process.pid)
        late_s = own.create_time() - begun_at  # psutil's clock may be off by a constant
        born = [
            other.create_time() - begun_at - late_s for other, (kind, _) in seen.items() if kind in WORKERS
        ]
    finally:
        stop(process)
    cpu_s: defaultdict[str, float] = defaultdict(float)
    for kind, seconds in seen.values():
        cpu_s[kind] += seconds
    return Start(min(born), ready_s, dict(cpu_s))


def look(pid: int, seen: dict[psutil.Process, tuple[str, float]]) -> None:
    """Note the CPU seconds of the command and all below it."""
    command = psutil.Process(pid)
    for process in (command, *command.children(recursive=True)):
        try:
            times = process.cpu_times()
            kind = "the command" if process == command else kind_of(process.cmdline())
        except psutil.Error:  # it has ended
            continue
        seen[process] = kind, times.user + times.system


def stop(process: subprocess.Popen[bytes]) -> None:
    """In order, and whatever is left by force."""
    started = descendants()
    process.send_signal(signal.SIGINT)
    try:
        process.wait(60.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    end_processes([other for other in started if other.pid != process.pid], 2.0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(
    checkouts: dict[str, Path], store: Path, num_actors: int, num_rounds: int
) -> dict[str, list[Start]]:
    """After one start each that is not counted: the first reads everything from disk."""
    starts: dict[str, list[Start]] = {name: [] for name in checkouts}
    for number in range(num_rounds + 1):
        for name, checkout in checkouts.items():
            start = start_once(checkout, store, num_actors)
            if number:
                starts[name].append(start)
            print(f"{name}: Ray up {start.ray_up_s:.2f} s, ready {start.ready_s:.2f} s", flush=True)
    return starts


def summary(starts: Sequence[Start]) -> dict[str, Any]:
    kinds = sorted({kind for start in starts for kind in start.cpu_s})
    return {
        "ray_up_s": spread([start.ray_up_s for start in starts]),
        "ready_s": spread([start.ready_s for start in starts]),
        "ready_after_ray_s": spread([start.ready_s - start.ray_up_s for start in starts]),
        "cpu_s": spread([sum(start.cpu_s.values()) for start in starts]),
        "cpu_s_by_kind": {
            kind: statistics.median(start.cpu_s.get(kind, 0.0) for start in starts) for kind in kinds
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("store", nargs="?", type=Path, default=HERE / ".stores" / "stories")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beside", type=Path, help="another checkout, started in turn")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    checkouts = {"here": HERE} | ({"beside": options.beside.resolve()} if options.beside else {})
    starts = measure(checkouts, options.store.resolve(), options.actors, options.rounds)
    config = {"store": options.store.name, "actors": options.actors, "rounds": options.rounds}
    results = {name: summary(each) for name, each in starts.items()}
    finish("bench_start", config, results, is_kept=options.keep)


if __name__ == "__main__":
    main()
