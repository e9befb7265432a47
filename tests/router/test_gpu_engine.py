"""The engine on a GPU, where there is one: the same bits within CUDA's class, and the CPU's answers within rounding.

tests/router/test_device_engine.py holds the same code on machines without one.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experts.device_tier import TieredCache
from extraction.extract import extract
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts
from router.batcher import BatchLimits
from router.loading import EngineOptions
from router.request import GenerationRequest, SamplingParams
from tests.engines import Outcome, assert_same_bits, open_engine, run_to_end, small_engine
from tests.gpu import GPU

pytestmark = GPU
DEVICE = torch.device("cuda", 0)
LENGTHS = (5, 70, 1, 130, 300)
JOIN_AT = (0, 2, 1, 0, 3)


def _requests() -> list[GenerationRequest]:
    return [
        GenerationRequest(
            f"r{index}",
            tuple((7 * i + index) % 500 + 3 for i in range(length)),
            SamplingParams(max_tokens=(16, 5)[index % 2], temperature=(0.0, 0.8)[index % 2], seed=index),
            num_logprobs=(None, 2)[index % 2],
            num_prompt_logprobs=(1, None)[index % 2],
        )
        for index, length in enumerate(LENGTHS)
    ]


def _options(dtype: str, **changes: object) -> EngineOptions:
    return replace(EngineOptions(dtype=dtype, device=DEVICE), **changes)


def _run(root: Path, options: EngineOptions) -> Outcome:
    loaded = open_engine(root, options)
    outcome = run_to_end(loaded.engine, _requests(), JOIN_AT)
    loaded.close()
    return outcome


def _alone(root: Path, dtype: str) -> Outcome:
    loaded = open_engine(root, _options(dtype))
    whole = Outcome()
    for request in _requests():
        outcome = run_to_end(loaded.engine, [request])
        for name in ("tokens", "logits", "logprobs", "prompt_logprobs"):
            getattr(whole, name).update(getattr(outcome, name))
    loaded.close()
    return whole


@pytest.fixture(scope="module", params=["bfloat16", "int8", "int4"])
def root(
    request: pytest.FixtureRequest, stories_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param == "bfloat16":
        return stories_store
    part = Quantization(scheme=request.param, group_size=32 if request.param == "int4" else None)
    folder = tmp_path_factory.mktemp("gpu") / "store"
    extract(
        Path(__file__).parents[2] / "models" / "stories-moe",
        folder,
        quantised=QuantisedParts(part, part, part),
    )
    return folder


def test_gpu_computes_what_the_cpu_does_within_rounding(root: Path) -> None:
    greedy = [GenerationRequest("r", tuple(range(5, 45)), SamplingParams(max_tokens=32, temperature=0.0))]
    outcomes = []
    for device in (torch.device("cpu"), DEVICE):
        loaded = open_engine(root, EngineOptions(dtype="float32", device=device))
        outcomes.append(run_to_end(loaded.engine, greedy))
        loaded.close()
    expected, found = outcomes
    assert found.tokens == expected.tokens
    rows = torch.stack(expected.logits["r"])
    assert (torch.stack(found.logits["r"]) - rows).abs().max() < 1e-4 * rows.abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_chunks_and_budgets_change_no_bit(root: Path, dtype: str) -> None:
    alone = _alone(root, dtype)
    assert_same_bits(_run(root, _options(dtype)), alone)
    assert_same_bits(_run(root, _options(dtype, limits=BatchLimits(max_batch_tokens=23))), alone)
    loaded = open_engine(root, _options(dtype))
    cache = loaded.worker.cache
    assert isinstance(cache, TieredCache)
    keys = loaded.store.expert_keys()
    one, stored = cache.group_bytes // len(keys), loaded.store.record(keys[0]).nbytes
    loaded.close()
    for on_device, on_host in ((1, 1), (9, 4), (100, 384)):
        budgets = {"expert_budget_bytes": on_device * one, "host_budget_bytes": on_host * stored}
        assert_same_bits(_run(root, _options(dtype, **budgets)), alone)


def test_swapped_sequences_keep_their_bits(stories_store: Path) -> None:
    loaded = open_engine(stories_store, _options("bfloat16"))
    growing = [replace(request, prompt_ids=tuple(range(60))) for request in _requests()]
    growing = [replace(request, sampling=replace(request.sampling, max_tokens=10)) for request in growing]
    expected = run_to_end(loaded.engine, growing)
    engine = small_engine(loaded, 6, BatchLimits(admission_reserve=0), num_swap_blocks=5)
    assert_same_bits(run_to_end(engine, growing, JOIN_AT), expected)
    assert engine.stats.preemptions > 0
    loaded.close()


def test_decoding_waits_for_the_gpu_once_a_layer_and_once_a_step(stories_store: Path) -> None:
    loaded = open_engine(stories_store, _options("bfloat16"))
    engine = loaded.engine
    engine.submit(GenerationRequest("r", (3, 4, 5), SamplingParams(max_tokens=40, temperature=0.0)))
    for _ in range(30):  # by then most experts are there
        engine.step()
    loaded.worker.load_all()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        engine.cancel("r")
        loaded.close()
    waits = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
    assert len(waits) <= len(loaded.config.moe_layers) + 1, waits


def test_class_names_capability_and_libraries(stories_store: Path) -> None:
    loaded = open_engine(stories_store, _options("bfloat16"))
    kind, arithmetic, dtype, library, products, own, norm = loaded.numerics_class.split("/")
    loaded.close()
    facts = torch.cuda.get_device_properties(DEVICE)
    assert (kind, dtype) == ("cuda", "bfloat16")
    assert arithmetic == f"sm{facts.major}{facts.minor}x{facts.multi_processor_count}"
    assert library.startswith(f"torch-{torch.__version__}-cublas-")
    assert products.startswith("blocks") and own.startswith("blocks") and norm.startswith("norm-")
