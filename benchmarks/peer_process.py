"""A contender of `bench_peers` in a process of its own, and the handle by which it is asked.

Contenders stay in memory and take turns, so that all meet the same minutes of a shared machine; one that is not asked
waits on a pipe. Requests and answers are lines of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, Literal

from benchmarks.peer_run import Contender, Facts, Generated, Prompts, peak_bytes

Kind = Literal["sage-moe", "served", "transformers", "llama.cpp"]


class ContenderFailed(Exception):
    """A contender's process ended."""

    def __init__(self, name: str, output: str) -> None:
        super().__init__(name, output)
        self.name, self.output = name, output

    def __str__(self) -> str:
        return f"{self.name} ended: {self.output}"


@dataclass(frozen=True)
class ContenderSpec:
    """Which program, on which files."""

    name: str
    """By which results call it."""
    kind: Kind
    path: str
    """A store, a checkpoint or a GGUF file."""
    num_threads: int
    context_tokens: int
    """Positions of all streams together, where they must be known ahead."""
    products: str | None = None
    """Of the engine: whose matrix products, where not the best ones (`SAGE_MOE_PRODUCTS`)."""

    @property
    def environment(self) -> dict[str, str]:
        found = {"OMP_NUM_THREADS": str(self.num_threads)}
        return found if self.products is None else found | {"SAGE_MOE_PRODUCTS": self.products}


def open_contender(spec: ContenderSpec) -> Contender:
    """Load it into this process."""
    path = Path(spec.path)
    if spec.kind == "sage-moe":
        from benchmarks.peer_sage import SageContender

        return SageContender(path, spec.num_threads)
    if spec.kind == "served":
        from benchmarks.peer_served import ServedContender

        return ServedContender(path)
    if spec.kind == "transformers":
        from benchmarks.peer_transformers import TransformersContender

        return TransformersContender(path, spec.num_threads)
    from benchmarks.peer_llama import LlamaContender

    return LlamaContender(path, spec.num_threads, spec.context_tokens)


class ContenderProcess:
    """The same questions as of a `Contender`, and its memory. A context manager: the process ends with it."""

    def __init__(self, spec: ContenderSpec) -> None:
        """Returns when the weights are in memory. Raises ContenderFailed."""
        self.spec = spec
        self._errors = TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peer_process", json.dumps(asdict(spec))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | spec.environment,
        )
        self.facts = Facts(**self._read())

    def __enter__(self) -> ContenderProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(90.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def generate(self, prompts: Prompts, num_tokens: int) -> Generated:
        return Generated(**self._ask("generate", prompts, num_tokens))

    def top_logprobs(self, prompt: Sequence[int], count: int) -> dict[int, float]:
        return {int(token): float(logprob) for token, logprob in self._ask("top_logprobs", prompt, count)}

    def memory(self) -> dict[str, int]:
        found: dict[str, int] = self._ask("memory")
        return found

    def _ask(self, question: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([question, *arguments]) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise ContenderFailed(self.spec.name, self._errors.read()[-2000:])
        return json.loads(line)


def main() -> None:
    """The spec is the only argument, as JSON. Ends when nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    contender = open_contender(ContenderSpec(**json.loads(sys.argv[1])))
    try:
        _answer(answers, asdict(contender.facts()))
        for line in sys.stdin:
            question, *arguments = json.loads(line)
            if question == "generate":
                _answer(answers, asdict(contender.generate(*arguments)))
            elif question == "memory":
                _answer(answers, getattr(contender, "memory", peak_bytes)())
            else:
                _answer(answers, contender.top_logprobs(*arguments))
    finally:
        contender.close()


def _answer(answers: Any, value: Any) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
