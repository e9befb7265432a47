"""How long does one token's round trip to an expert actor take, against a Ray actor call and a plain socket?

One row out (2048 x bfloat16, 4 KB) and eight rows back (32 KB), between two processes of this machine. Nothing is
computed: the other side answers with rows that it has ready. Our data plane's figure has framing and checks in it;
the plain socket sends as many bytes and looks at none of them. "data_plane" sleeps while it waits, as where cores are
fewer than processes; "data_plane_spin" looks for bytes for a while first, as where each process has a core. Contenders
alternate in blocks of calls.

Usage: python -m benchmarks.bench_transport [--rounds N] [--keep]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from benchmarks.report import finish, spread
from cluster.resources import SPIN_S, start_ray
from experts.call import ExpertCall
from experts.channel import TransportLimits
from experts.connection import ExpertConnection
from experts.frame import HEADER_BYTES
from experts.handshake import ServiceInfo
from experts.roster import Endpoint
from experts.server import ExpertServer

WIDTH = 2048
NUM_ROWS = 8
CALL_BYTES, ANSWER_BYTES = HEADER_BYTES + 2 * WIDTH, HEADER_BYTES + 2 * WIDTH * NUM_ROWS
CALLS_PER_BLOCK = 200
WARM_UP_BLOCKS = 2
SECRET = b"a secret for this benchmark only"
GOAL_US = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="blocks of each contender")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        contenders = {
            "data_plane": stack.enter_context(data_plane(0.0)),
            "data_plane_spin": stack.enter_context(data_plane(SPIN_S)),
            "plain_socket": stack.enter_context(plain_socket()),
            "ray_actor_call": stack.enter_context(ray_actor()),
        }
        samples = measure(contenders, options.rounds)
    results = {name: spread(values) for name, values in samples.items()}
    for name, result in results.items():
        print(f"{name:15} {result['median']:8.1f} us   (5th {result['p5']:.1f}, 95th {result['p95']:.1f})")
    ratio = results["data_plane_spin"]["median"] / results["ray_actor_call"]["median"]
    print(f"data plane: {ratio:.3f} of a Ray actor call; goal {GOAL_US:.0f} us")
    config = {
        "unit": "us",
        "bytes_out": 2 * WIDTH,
        "bytes_back": 2 * WIDTH * NUM_ROWS,
        "rounds": options.rounds,
        "calls_per_block": CALLS_PER_BLOCK,
    }
    finish("bench_transport", config, results, is_kept=options.keep)


def measure(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of every call, block by block in turn; the first blocks are not counted."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for block in range(WARM_UP_BLOCKS + rounds):
        for name, call in contenders.items():
            for _ in range(CALLS_PER_BLOCK):
                started = time.perf_counter()
                call()
                elapsed = time.perf_counter() - started
                if block >= WARM_UP_BLOCKS:
                    samples[name].append(elapsed * 1e6)
    return samples


@contextmanager
def other_process(target: Callable[[Connection], None]) -> Iterator[int]:
    """A spawned process that reports its port and runs until it is told to end."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there,), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        here.send(None)
        process.join(10.0)
        process.kill()


@contextmanager
def data_plane(spin_s: float) -> Iterator[Callable[[], object]]:
    with other_process(partial(_serve_rows, spin_s)) as port:
        endpoint, limits = Endpoint("bench", "127.0.0.1", port, 1), TransportLimits(spin_s=spin_s)
        connection = ExpertConnection(endpoint, secret=SECRET, limits=limits)
        tokens_TD = torch.randn(1, WIDTH).bfloat16()
        call = ExpertCall(
            "model", 0, tuple(range(NUM_ROWS)), (1,) * NUM_ROWS, (0,) * NUM_ROWS, tokens_TD, "bench"
        )

        def round_trip() -> torch.Tensor:
            connection.start(call, timeout_s=10.0)
            return connection.finish()

        assert round_trip().shape == (NUM_ROWS, WIDTH)
        yield round_trip
        connection.close()


def _serve_rows(spin_s: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    rows_RD = torch.randn(NUM_ROWS, WIDTH).bfloat16()
    info = ServiceInfo(WIDTH, torch.bfloat16, "bench", ("model",))
    limits = TransportLimits(spin_s=spin_s)
    server = ExpertServer(lambda call: rows_RD, info, secret=SECRET, incarnation=1, limits=limits)
    server.start()
    pipe.send(server.port)
    pipe.recv()
    server.stop()


@contextmanager
def plain_socket() -> Iterator[Callable[[], object]]:
    with other_process(_serve_bytes) as port, socket.create_connection(("127.0.0.1", port)) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        question, answer = os.urandom(CALL_BYTES), memoryview(bytearray(ANSWER_BYTES))

        def round_trip() -> None:
            link.sendall(question)
            _receive_exactly(link, answer)

        yield round_trip


def _serve_bytes(pipe: Connection) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(listener.getsockname()[1])
    link, _ = listener.accept()
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    question, answer = memoryview(bytearray(CALL_BYTES)), os.urandom(ANSWER_BYTES)
    while _receive_exactly(link, question):
        link.sendall(answer)


def _receive_exactly(link: socket.socket, view: memoryview) -> bool:
    filled = 0
    while filled < len(view):
        count = link.recv_into(view[filled:])
        if not count:
            return False
        filled += count
    return True


@contextmanager
def ray_actor() -> Iterator[Callable[[], object]]:
    start_ray(num_cpus=1)
    import ray

    class Answerer:
        def __init__(self) -> None:
            self.rows = np.zeros((NUM_ROWS, WIDTH), np.uint16)

        def answer(self, tokens: np.ndarray) -> np.ndarray:
            return self.rows

    actor: Any = ray.remote(Answerer).options(num_cpus=0).remote()
    tokens = np.zeros((1, WIDTH), np.uint16)
    try:
        yield lambda: ray.get(actor.answer.remote(tokens))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
