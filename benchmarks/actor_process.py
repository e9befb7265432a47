"""An expert actor as a process of its own, without Ray: the same class, started and killed as a benchmark wants."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter

from cluster.resources import process_environment
from experts.actor import ActorSpec, ExpertActor
from experts.actor_report import ActorPulse
from experts.eviction import DEFAULT_EVICTION
from experts.roster import Endpoint
from experts.store import ExpertStore
from extraction.manifest import ExpertKey
from router.loading import stored_dtype
from router.model_config import read_model_config

SECRET = b"a secret for benchmarks, 32 bytes"
START_TIMEOUT_S = 300.0
PULSE = "pulse"


class ActorProcess:
    """Started when it is made; `wait` returns when it takes calls."""

    def __init__(self, spec: ActorSpec) -> None:
        before = dict(os.environ)
        os.environ.update(process_environment(spec.num_threads))  # read when the child imports its libraries
        try:
            context = multiprocessing.get_context("spawn")
            self._answer, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(spec, theirs), daemon=True)
            self._began = perf_counter()
            self._process.start()
            theirs.close()
        finally:
            os.environ.clear()
            os.environ.update(before)
        self.start_s = float("nan")
        """Until it took calls; known after `wait`."""

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def wait(self) -> Endpoint:
        """Raises TimeoutError, or EOFError when the process ended."""
        if not self._answer.poll(START_TIMEOUT_S):
            raise TimeoutError(f"an actor did not start in {START_TIMEOUT_S:.0f} s")
        endpoint: Endpoint = self._answer.recv()
        self.start_s = perf_counter() - self._began
        return endpoint

    def pulse(self) -> ActorPulse:
        """How it does, as it tells a supervisor. Raises EOFError when the process has ended."""
        self._answer.send(PULSE)
        pulse: ActorPulse = self._answer.recv()
        return pulse

    def kill(self) -> None:
        """SIGKILL; does nothing to a process that has ended."""
        self._process.kill()
        self._process.join()


def _serve(spec: ActorSpec, answer: Connection) -> None:
    actor = ExpertActor(spec)
    answer.send(actor.endpoint())
    try:
        while answer.recv() == PULSE:
            answer.send(actor.pulse())
    except (EOFError, OSError):  # whoever started it is gone
        pass
    actor.stop()


def actor_spec(
    root: Path, name: str, group: Sequence[ExpertKey], num_threads: int, spin_s: float
) -> ActorSpec:
    """What an actor for a group of the store at `root` is made from, without a bound on its memory."""
    store = ExpertStore.open(root)
    config, dtype = read_model_config(store.served.config), stored_dtype(store)
    store.close()
    return ActorSpec(
        name=name,
        incarnation=1,
        store_root=str(root),
        dtype=dtype,
        group=tuple(group),
        width=config.hidden_size,
        expert_width=config.expert_width,
        budget_bytes=None,
        eviction=DEFAULT_EVICTION,
        num_threads=num_threads,
        host="127.0.0.1",
        spin_s=spin_s,
        secret=SECRET,
    )
