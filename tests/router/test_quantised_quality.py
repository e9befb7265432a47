"""What quantised experts cost in perplexity, on a few pages: enough to see that nothing is broken."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from extraction.extract import extract
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts
from gateway.text.tokenizer import TextTokenizer
from router.loading import EngineOptions
from router.request import GenerationRequest, SamplingParams
from tests.conftest import REPOSITORY
from tests.engines import open_engine, run_to_end

TEXT = (REPOSITORY / "benchmarks" / "texts" / "brown-fairy-book.txt").read_text(encoding="utf-8")[
    20_000:25_500
]
"""Long enough that gates of equal logits, which bfloat16 often gives and each numerics class breaks in its own way, do
not weigh more than the codes do."""


def perplexity(root: Path, text: str) -> float:
    """Of all tokens but the first, in one window."""
    ids = tuple(TextTokenizer.from_folder(root).encode(text))
    loaded = open_engine(root, EngineOptions())
    request = GenerationRequest("r", ids, SamplingParams(max_tokens=1, temperature=0), num_prompt_logprobs=0)
    told = run_to_end(loaded.engine, [request]).prompt_logprobs["r"]
    loaded.close()
    logprobs = [entry.logprob for entry in told if entry is not None]
    return math.exp(-sum(logprobs) / len(logprobs))


@pytest.fixture(scope="module")
def published(stories_store: Path) -> float:
    return perplexity(stories_store, TEXT)


@pytest.mark.parametrize(
    ("scheme", "group_size", "most", "size"),
    [
        ("int8", None, 0.005, 0.57),
        ("int4", 32, 0.05, 0.34),
        ("int4", 64, 0.05, 0.31),
        ("int4", 128, 0.05, 0.29),
    ],
)
def test_quantised_experts_cost_little_and_take_less(
    published: float,
    stories_store: Path,
    stories_checkpoint: Path,
    tmp_path: Path,
    scheme: str,
    group_size: int | None,
    most: float,
    size: float,
) -> None:
    """Codes in a wrong order, or scales of other rows, cost far more than this. size: of the experts' files, records
    of 40 KB padded to 4096 bytes."""
    store = tmp_path / "store"
    quantization = Quantization.model_validate({"scheme": scheme, "group_size": group_size})
    extract(stories_checkpoint, store, quantised=QuantisedParts(quantization))
    assert abs(perplexity(store, TEXT) / published - 1) < most
    assert _expert_bytes(store) < size * _expert_bytes(stories_store)


@pytest.mark.parametrize(("scheme", "group_size", "most"), [("int8", None, 0.01), ("int4", 32, 0.1)])
def test_everything_quantised_costs_little(
    published: float,
    stories_checkpoint: Path,
    tmp_path: Path,
    scheme: str,
    group_size: int | None,
    most: float,
) -> None:
    part = Quantization.model_validate({"scheme": scheme, "group_size": group_size})
    extract(stories_checkpoint, tmp_path / "store", quantised=QuantisedParts(part, part, part))
    assert abs(perplexity(tmp_path / "store", TEXT) / published - 1) < most


def _expert_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in (root / "experts").iterdir())
