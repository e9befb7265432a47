"""llama.cpp as a contender of `bench_peers`, through the C interface that `llama-cpp-python` carries.

Streams are sequences of one batch, as its own server has them. Greedy choice is an argmax of the logits that it hands
out. Needs the extra `bench`; a GGUF file comes from `benchmarks.peer_gguf`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.peer_gguf import gguf_bytes
from benchmarks.peer_run import Facts, Generated, Prompts

MAX_STREAMS = 64
BATCH_TOKENS = 2048
"""Rows of one call; the library cuts them into pieces of 512 (`n_ubatch`), its default."""


class LlamaContender:
    """A GGUF file, mapped; kernels repacked where the library does so by itself; 2,048 positions and more a stream."""

    def __init__(self, path: Path, num_threads: int, context: int) -> None:
        """context: positions of all streams together; one stream may take no more than `context // MAX_STREAMS` of
        them, unless it is alone."""
        import llama_cpp

        self._lib: Any = llama_cpp
        self._path = path
        llama_cpp.llama_backend_init()
        self._log = llama_cpp.llama_log_callback(_silent)  # kept: the library holds the pointer only
        llama_cpp.llama_log_set(self._log, None)
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._threads, self._context_tokens = num_threads, context
        self._contexts: dict[int, Any] = {}
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._vocab_size: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def facts(self) -> Facts:
        total, head = gguf_bytes(self._path)
        setting = {
            "file": self._path.name,
            "threads": self._threads,
            "system": self._lib.llama_print_system_info().decode(),
        }
        return Facts("llama.cpp", f"llama-cpp-python {self._lib.__version__}", total, head, setting)

    def generate(self, prompts: Prompts, num_tokens: int) -> Generated:
        context = self._context(len(prompts))
        num_streams = len(prompts)
        tokens: list[list[int]] = [[] for _ in prompts]
        first_s, last_s = [0.0] * num_streams, [0.0] * num_streams
        started = perf_counter()
        rows = [
            (stream, position, token, position == len(prompt) - 1)
            for stream, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for first in range(0, len(rows), BATCH_TOKENS):
            for stream, token in self._decode(context, rows[first : first + BATCH_TOKENS]):
                tokens[stream].append(token)
                first_s[stream] = last_s[stream] = perf_counter() - started
        for step in range(num_tokens - 1):
            rows = [(s, len(prompts[s]) + step, tokens[s][-1], True) for s in range(num_streams)]
            for stream, token in self._decode(context, rows):
                tokens[stream].append(token)
                last_s[stream] = perf_counter() - started
        return Generated(tokens, num_streams * num_tokens, first_s, last_s)

    def top_logprobs(self, prompt: Sequence[int], count: int) -> list[tuple[int, float]]:
        context = self._context(1)
        self._decode(context, [(0, i, token, i == len(prompt) - 1) for i, token in enumerate(prompt)])
        logits_V = self._logits(context, len(prompt) - 1).astype(np.float64)
        logprobs_V = logits_V - logits_V.max()
        logprobs_V -= np.log(np.exp(logprobs_V).sum())
        best = np.argsort(-logprobs_V, kind="stable")[:count]
        return [(int(token), float(logprobs_V[token])) for token in best]

    def close(self) -> None:
        self._free_contexts()
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_model_free(self._model)

    def _context(self, num_streams: int) -> Any:
        """An empty context for that many streams; the last one is kept, emptied."""
        if num_streams not in self._contexts:
            self._free_contexts()
            params = self._lib.llama_context_default_params()
            params.n_ctx = self._context_tokens
            params.n_batch = BATCH_TOKENS
            params.n_seq_max = num_streams
            params.n_threads = params.n_threads_batch = self._threads
            context = self._lib.llama_init_from_model(self._model, params)
            if not context:
                raise RuntimeError(f"llama.cpp makes no context for {num_streams} streams")
            self._contexts[num_streams] = context
        context = self._contexts[num_streams]
        self._lib.llama_memory_clear(self._lib.llama_get_memory(context), True)
        return context

    def _free_contexts(self) -> None:
        while self._contexts:
            self._lib.llama_free(self._contexts.popitem()[1])

    def _decode(self, context: Any, rows: Sequence[tuple[int, int, int, bool]]) -> list[tuple[int, int]]:
        """rows: stream, position, token, whether its next token is wanted. Returns (stream, next token)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (stream, position, token, is_wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, is_wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, stream
        code = self._lib.llama_decode(context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        return [
            (stream, int(self._logits(context, i).argmax()))
            for i, (stream, _, _, is_wanted) in enumerate(rows)
            if is_wanted
        ]

    def _logits(self, context: Any, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        pointer = self._lib.llama_get_logits_ith(context, row)
        logits_V: np.ndarray[Any, np.dtype[np.float32]] = np.ctypeslib.as_array(
            pointer, shape=(self._vocab_size,)
        )
        return logits_V


def _silent(level: int, text: bytes, data: Any) -> None:
    """llama.cpp's own log is not ours."""
