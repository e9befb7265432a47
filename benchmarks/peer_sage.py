"""The engine of this repository as a contender of `bench_peers`: in this process, as `sage-moe generate` runs it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from itertools import count
from pathlib import Path
from time import perf_counter

import torch

from benchmarks.peer_run import Facts, Generated, Prompts
from experts.store import ExpertStore
from router.loading import EngineOptions, LoadedEngine, load_engine
from router.request import GenerationRequest, SamplingParams, TokenEvent

KV_BUDGET_BYTES = 1 << 28
"""Enough for every task here; the default would take a gigabyte that the other contenders' weights need."""


DEFAULTS = EngineOptions(kv_budget_bytes=KV_BUDGET_BYTES)


class SageContender:
    """Every option but the cache's size at its default, all experts in memory."""

    def __init__(self, store: Path, num_threads: int, options: EngineOptions = DEFAULTS) -> None:
        self.loaded: LoadedEngine = load_engine(ExpertStore.open(store), options)
        # The engine chooses one thread for few rows of tiny experts; more than was agreed it may not have.
        torch.set_num_threads(min(num_threads, torch.get_num_threads()))
        arithmetic = self.loaded.engine.backbone.arithmetic
        arithmetic.prompt_threads = min(num_threads, arithmetic.prompt_threads)
        self.loaded.worker.load_all()
        self._numbers = count()

    def facts(self) -> Facts:
        loaded = self.loaded
        backbone, config = loaded.engine.backbone, loaded.config
        experts_per_layer = config.experts_per_token / config.num_experts
        head_bytes = backbone.head_VD.nbytes
        layers = sum(layer.nbytes for layer in backbone.layers)
        experts = round(loaded.worker.resident_bytes * experts_per_layer)
        return Facts(
            "sage-moe",
            version("sage-moe"),
            layers + experts + head_bytes,
            head_bytes,
            {"numerics_class": loaded.numerics_class, "threads": torch.get_num_threads()},
        )

    def generate(self, prompts: Prompts, num_tokens: int) -> Generated:
        engine = self.loaded.engine
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)
        started = perf_counter()
        index_of = {}
        for index, prompt in enumerate(prompts):
            index_of[name := f"peer-{next(self._numbers)}"] = index
            engine.submit(GenerationRequest(name, tuple(prompt), sampling))
        tokens: list[list[int]] = [[] for _ in prompts]
        first_s, last_s = [0.0] * len(prompts), [0.0] * len(prompts)
        while engine.has_work:
            events = engine.step()
            now = perf_counter() - started
            for event in events:
                index = index_of[event.request_id]
                _check(event)
                first_s[index] = now if not tokens[index] else first_s[index]
                last_s[index] = now
                tokens[index].extend(event.token_ids)
        return Generated(tokens, sum(map(len, tokens)), first_s, last_s)

    def top_logprobs(self, prompt: Sequence[int], count: int) -> list[tuple[int, float]]:
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        name = f"peer-{next(self._numbers)}"
        engine = self.loaded.engine
        engine.submit(GenerationRequest(name, tuple(prompt), sampling, num_logprobs=count))
        while True:
            for event in engine.step():
                _check(event)
                return list(event.logprobs[0].top)

    def close(self) -> None:
        self.loaded.close()


def _check(event: TokenEvent) -> None:
    if event.error:
        raise RuntimeError(event.error)
