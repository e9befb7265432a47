"""`transformers` as a contender of `bench_peers` and `bench_device`: its own model, each task with the way of computing
experts that was fastest for it.

Which ways there are is the library's to say (`experts_implementation`). The first task of a shape tries all of them on
itself, prompts and tokens apart, and the answers name what was chosen. A batch of prompts of equal length needs no
padding, so nothing is computed in vain. Not tried: `torch.compile` with a static cache.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.device_rates import wait_for
from benchmarks.peer_run import Facts, Generated, Prompts
from experts.devices import CPU

logger = logging.getLogger(__name__)

WAYS = ("eager", "grouped_mm", "batched_mm")
MAX_BATCHED_ROWS = 16
"""`batched_mm` copies a row's experts: more rows would not fit, and are slow long before that."""
TRIED_TOKENS = 4


@dataclass(frozen=True)
class Ways:
    """What is used for one shape of task."""

    prompt: str
    token: str


class TransformersContender:
    """Loaded by `AutoModelForCausalLM`, attention by `sdpa`, the cache that grows."""

    def __init__(self, checkpoint: Path, num_threads: int, device: torch.device = CPU) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(num_threads)
        self._device = device
        model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self.model = model.eval().to(device)
        self._chosen: dict[tuple[int, int], Ways] = {}

    def facts(self) -> Facts:
        import transformers

        config = self.model.config
        share = config.num_experts_per_tok / config.num_experts
        is_tied = bool(config.tie_word_embeddings)
        head_bytes = self.model.lm_head.weight.nbytes
        total = head_bytes
        for name, parameter in self.model.named_parameters():
            if ".experts." in name:
                total += round(parameter.nbytes * share)
            elif not name.startswith("lm_head.") and "embed_tokens" not in name:
                total += parameter.nbytes
        setting = {"threads": torch.get_num_threads(), "tied": is_tied}
        return Facts("transformers", transformers.__version__, total, head_bytes, setting)

    def generate(self, prompts: Prompts, num_tokens: int) -> Generated:
        ids_SP = torch.tensor([list(prompt) for prompt in prompts], device=self._device)
        shape = (ids_SP.shape[0], ids_SP.shape[1])
        if shape not in self._chosen:
            self._chosen[shape] = self._choose(ids_SP, has_tokens=num_tokens > 1)
        return self._generate(ids_SP, num_tokens, self._chosen[shape])

    def top_logprobs(self, prompt: Sequence[int], count: int) -> list[tuple[int, float]]:
        self.model.set_experts_implementation("eager")
        with torch.inference_mode():
            logits_V = self.model(
                input_ids=torch.tensor([list(prompt)], device=self._device), logits_to_keep=1
            ).logits[0, -1]
        values, tokens = torch.log_softmax(logits_V.float(), dim=-1).topk(count)
        return list(zip(tokens.tolist(), values.tolist(), strict=True))

    def close(self) -> None:
        """Nothing is open."""

    def _choose(self, ids_SP: Tensor, *, has_tokens: bool) -> Ways:
        prompt_s: dict[str, float] = {}
        token_s: dict[str, float] = {}
        for way in WAYS:
            is_batched = way == "batched_mm"
            if is_batched and ids_SP.shape[0] > MAX_BATCHED_ROWS:
                continue
            prompt_way = "eager" if is_batched and ids_SP.numel() > MAX_BATCHED_ROWS else way
            try:
                tried = self._generate(ids_SP, 1 + TRIED_TOKENS * has_tokens, Ways(prompt_way, way))
            except (RuntimeError, ValueError, NotImplementedError) as error:
                logger.warning("%s cannot be used: %s", way, error)
                continue
            prompt_s[prompt_way] = min(tried.prefill_s, prompt_s.get(prompt_way, float("inf")))
            token_s[way] = max(tried.last_s) - tried.prefill_s
        return Ways(min(prompt_s, key=prompt_s.__getitem__), min(token_s, key=token_s.__getitem__))

    @torch.inference_mode()
    def _generate(self, ids_SP: Tensor, num_tokens: int, ways: Ways) -> Generated:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        self.model.set_experts_implementation(ways.prompt)
        started = perf_counter()
        next_S1 = self._next(ids_SP, cache)
        wait_for(self._device)
        first_s = perf_counter() - started
        columns = [next_S1]
        self.model.set_experts_implementation(ways.token)
        for _ in range(num_tokens - 1):
            next_S1 = self._next(next_S1, cache)
            columns.append(next_S1)
        wait_for(self._device)
        last_s = perf_counter() - started
        tokens = torch.cat(columns, dim=1).tolist()
        num_streams = len(tokens)
        note = f"{ways.prompt} for prompts, {ways.token} for tokens"
        return Generated(
            tokens, num_streams * num_tokens, [first_s] * num_streams, [last_s] * num_streams, note
        )

    def _next(self, ids_ST: Tensor, cache: Any) -> Tensor:
        logits = self.model(input_ids=ids_ST, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        best: Tensor = logits[:, -1].argmax(dim=-1, keepdim=True)
        return best
