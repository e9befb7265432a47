"""One contender of `bench_budget`, in a process of its own: computes a given text token by token and says what it
took.

`budget` is the engine as it serves, with a budget for experts; `mapped` computes the same with every expert's
matrices mapped from the store's files, paged in by the kernel; `offload` is `benchmarks.peers_offload`; `empty`
computes nothing and shows what a process takes before it holds experts. Started by `bench_budget`, inside a memory
group where there is one.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.one_sequence import OneSequence
from benchmarks.slice_routing import HiddenShape, token_walk
from experts.call import ExpertCall
from experts.directory import ExpertDirectory, LocalDirectory
from experts.ffn import ExpertWeights, compute_experts, view_expert
from experts.store import ExpertStore
from experts.worker import ExpertWorker, WorkerStats
from extraction.manifest import ExpertKey
from router.loading import EngineOptions, LoadedEngine, load_engine

KV_BUDGET_BYTES = 1 << 26
SHOWN_VALUES = 64


@dataclass(frozen=True)
class Task:
    """What a contender is asked to do."""

    kind: str
    store: str
    checkpoint: str
    budget_bytes: int | None
    warmup: int
    """Tokens that are not counted."""
    counted: int
    seed: int
    prefetch: bool = False
    """Of a budget: whether experts are read ahead by the next layer's gate."""


@dataclass
class Report:
    """What it took; the counted tokens only."""

    step_s: list[float] = field(default_factory=list)
    """Each token up to the last layer, without the head."""
    head_s: list[float] = field(default_factory=list)
    misses: int = 0
    hits: int = 0
    prefetched: int = 0
    prefetched_used: int = 0
    bytes_read: int = 0
    """Of experts, by the worker; 0 where the kernel pages them in."""
    anonymous_bytes: int = 0
    """Resident at the end, without what is mapped from files."""
    hidden_sha256: str = ""
    """Of the last token's hidden state: equal where the contenders computed the same bits."""
    hidden_values: list[float] = field(default_factory=list)
    """Its first values."""


class MappedExperts(LocalDirectory):
    """A plain mmap of the same records: what a token does not need costs nothing, what it needs is paged in."""

    def __init__(self, worker: ExpertWorker, store: ExpertStore) -> None:
        super().__init__(worker)
        self._store = store
        self._files: dict[str, mmap.mmap] = {}

    def table(self, component: str, layer: int) -> None:
        """So that every call comes to `run`."""

    def run(self, call: ExpertCall) -> Tensor:
        weights = [self._view(ExpertKey(call.component, call.layer, expert)) for expert in call.experts]
        return compute_experts(call, weights, self.worker._kernel)

    def _view(self, key: ExpertKey) -> ExpertWeights:
        record = self._store.record(key)
        part = record.parts[0]
        raw = torch.frombuffer(
            self._map(part.file), dtype=torch.uint8, count=record.nbytes, offset=part.offset
        )
        return view_expert(raw, self.worker.dtype, self.worker.widths[key.component])

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._files:
            with open(self._store.root / file, "rb") as opened:
                # Copy on write, which never happens: torch wants memory that it could write to.
                self._files[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._files[file]


def run_task(task: Task) -> Report:
    """Compute the text's tokens one after another."""
    if task.kind == "offload":
        from benchmarks.peers_offload import offloaded_contender

        step, head, vocab_size, width = offloaded_contender(Path(task.checkpoint))
        return _measure(task, step, head, vocab_size, width, None)
    loaded = _load(task)
    try:
        if task.kind == "empty":
            return Report(anonymous_bytes=anonymous_bytes())
        backbone = loaded.engine.backbone
        text = OneSequence(backbone, task.warmup + task.counted)
        vocab_size, width = loaded.config.vocab_size, loaded.config.hidden_size
        worker = loaded.worker if task.kind == "budget" else None
        return _measure(
            task, lambda ids_T: text.step(ids_T).scored_RD, backbone.logits, vocab_size, width, worker
        )
    finally:
        loaded.close()


def _load(task: Task) -> LoadedEngine:
    store = ExpertStore.open(Path(task.store))

    def connect(worker: ExpertWorker) -> ExpertDirectory:
        return MappedExperts(worker, store) if task.kind == "mapped" else LocalDirectory(worker)

    options = EngineOptions(
        kv_budget_bytes=KV_BUDGET_BYTES, expert_budget_bytes=task.budget_bytes, prefetch=task.prefetch
    )
    loaded = load_engine(store, options, connect)
    if task.kind == "budget":
        for key in store.expert_keys():
            store.read_expert(key)  # every record's hash is checked once, at its first use
        loaded.worker.load_all()
    return loaded


def _measure(
    task: Task,
    step: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
    width: int,
    worker: ExpertWorker | None,
) -> Report:
    generator = torch.Generator().manual_seed(task.seed)
    topics = HiddenShape(width).num_topics
    ids = token_walk(task.warmup + task.counted, vocab_size, topics, generator)
    report = Report()
    before = WorkerStats()
    for number, token in enumerate(torch.split(ids, 1)):
        if number == task.warmup and worker is not None:
            before = replace(worker.stats)
        started = perf_counter()
        hidden_1D = step(token)
        stepped = perf_counter()
        head(hidden_1D)
        if number >= task.warmup:
            report.step_s.append(stepped - started)
            report.head_s.append(perf_counter() - stepped)
    if worker is not None:
        stats = worker.stats
        for name in ("misses", "hits", "bytes_read", "prefetched", "prefetched_used"):
            setattr(report, name, getattr(stats, name) - getattr(before, name))
    report.anonymous_bytes = anonymous_bytes()
    hidden_D = hidden_1D.detach().float().flatten()
    report.hidden_sha256 = hashlib.sha256(hidden_D.numpy().data).hexdigest()
    report.hidden_values = hidden_D[:SHOWN_VALUES].tolist()
    return report


def anonymous_bytes() -> int:
    """Resident bytes of this process that no file on disk backs: heap and mappings, private or shared."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def main() -> None:
    """The task is the only argument, as JSON; the report is the last line."""
    print(json.dumps(asdict(run_task(Task(**json.loads(sys.argv[1]))))))


if __name__ == "__main__":
    main()
