"""What does a call cost beside its bare connection: choosing among replicas, checking the answer, auditing a share?

One token's eight experts of a full-width layer (2048 x 768, bfloat16), and 512 tokens' rows in one call, asked of a
server in another process, which computes them. "connection" sends and hears on one connection; "directory" does it
through a RemoteDirectory with one owner, "replicas" with two that any row may go to, "audits" with one in a thousand
answers computed again here. Contenders alternate call by call. Apart from these, the check for values that are not
finite is timed alone, as a share of the call. Ratios are to "connection" in the same run.

Usage: python -m benchmarks.bench_directory [--rounds N] [--keep]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from benchmarks.bench_transport import other_process
from benchmarks.random_store import QWEN3_30B_A3B, RandomStore
from benchmarks.report import finish, spread
from experts.asking import are_finite
from experts.call import ExpertCall
from experts.connection import ExpertConnection
from experts.handshake import ServiceInfo
from experts.numerics import calibrate
from experts.remote_directory import DirectoryOptions, RemoteDirectory
from experts.roster import Endpoint, Roster
from experts.server import ExpertServer
from experts.worker import ExpertWorker
from extraction.manifest import ExpertKey

WIDTH, EXPERT_WIDTH, NUM_EXPERTS, K = 2048, 768, 16, 8
SECRET = b"a secret for this benchmark only"
DTYPE = torch.bfloat16
TOKENS = (1, 512)
FINITE_CHECK = "finite check"
COMPONENT = "model"
ALL_KEYS = tuple(ExpertKey(COMPONENT, 0, expert) for expert in range(NUM_EXPERTS))
CONFIG = {**QWEN3_30B_A3B, "num_hidden_layers": 1, "num_experts": NUM_EXPERTS}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200, help="calls of each contender and size")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        ports = [stack.enter_context(other_process(_serve)) for _ in range(2)]
        worker = make_worker()
        stack.callback(worker.close)
        contenders = make_contenders(stack, worker, ports)
        results = {}
        for num_tokens in TOKENS:
            call = make_call(num_tokens)
            rounds = options.rounds if num_tokens == 1 else max(5, options.rounds // 20)
            results[f"{num_tokens} tokens"] = compare(measure(contenders, call, rounds))
    for size, figures in results.items():
        print(size)
        for name, figure in figures.items():
            ratio = f"{figure['ratio']:.4f} of the connection's"
            print(f"  {name:12} {figure['median']:10.1f} us   {ratio}")
    config = {"width": WIDTH, "expert_width": EXPERT_WIDTH, "experts": NUM_EXPERTS, "k": K, "unit": "us"}
    finish("bench_directory", config, results, is_kept=options.keep)


def make_contenders(
    stack: ExitStack, worker: ExpertWorker, ports: list[int]
) -> dict[str, Callable[[ExpertCall], Tensor]]:
    endpoints = {
        f"experts-{i}": Endpoint(f"experts-{i}", "127.0.0.1", port, 1) for i, port in enumerate(ports)
    }
    names = tuple(endpoints)
    link = ExpertConnection(endpoints[names[0]], secret=SECRET)
    stack.callback(link.close)

    def ask(call: ExpertCall) -> Tensor:
        link.tend()
        link.start(call, timeout_s=60.0)
        return link.finish()

    def directory(owners: tuple[str, ...], audit_share: float = 0.0) -> Callable[[ExpertCall], Tensor]:
        roster = Roster(1, endpoints, dict.fromkeys(ALL_KEYS, owners))
        made = RemoteDirectory(
            worker, roster, SECRET, options=DirectoryOptions(60.0, audit_share=audit_share)
        )
        stack.callback(made.close)
        return made.run

    return {
        "connection": ask,
        "directory": directory(names[:1]),
        "replicas": directory(names),
        "audits": directory(names[:1], audit_share=1e-3),
    }


def make_worker() -> ExpertWorker:
    store = RandomStore(CONFIG, DTYPE)
    kernel = calibrate([(2 * EXPERT_WIDTH, WIDTH), (WIDTH, EXPERT_WIDTH)], DTYPE)
    worker = ExpertWorker(store, kernel, DTYPE, widths={COMPONENT: WIDTH})
    worker.load_all()
    return worker


def make_call(num_tokens: int) -> ExpertCall:
    """Each token goes to K experts; all of them are used alike."""
    chance = torch.Generator().manual_seed(0)
    tokens_TD = torch.randn(num_tokens, WIDTH, generator=chance).to(DTYPE)
    chosen = [[(token + rank) % NUM_EXPERTS for rank in range(K)] for token in range(num_tokens)]
    rows = {e: [t for t, experts in enumerate(chosen) if e in experts] for e in range(NUM_EXPERTS)}
    used = tuple(expert for expert, tokens in rows.items() if tokens)
    counts = tuple(len(rows[expert]) for expert in used)
    return ExpertCall(COMPONENT, 0, used, counts, tuple(t for e in used for t in rows[e]), tokens_TD, "bench")


def measure(
    contenders: dict[str, Callable[[ExpertCall], Tensor]], call: ExpertCall, rounds: int
) -> dict[str, list[float]]:
    """Microseconds of every call, in turn; the first tenth is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in (*contenders, FINITE_CHECK)}
    warm_up = max(2, rounds // 10)
    for number in range(warm_up + rounds):
        for name, run in contenders.items():
            started = time.perf_counter()
            rows_RD = run(call)
            ended = time.perf_counter()
            are_finite(rows_RD)
            checked = time.perf_counter()
            if number >= warm_up:
                samples[name].append((ended - started) * 1e6)
                samples[FINITE_CHECK].append((checked - ended) * 1e6)
    return samples


def compare(samples: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Spreads, with the ratio of the medians to that of the bare connection."""
    figures = {name: spread(values) for name, values in samples.items()}
    bare = figures["connection"]["median"]
    return {name: {**figure, "ratio": figure["median"] / bare} for name, figure in figures.items()}


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    worker = make_worker()
    info = ServiceInfo(WIDTH, DTYPE, worker.numerics_class, (COMPONENT,))
    server = ExpertServer(worker.compute, info, secret=SECRET, incarnation=1)
    server.start()
    pipe.send(server.port)
    pipe.recv()
    server.stop()
    worker.close()


if __name__ == "__main__":
    main()
