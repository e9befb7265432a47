"""The engine on a device, which is simulated here: nothing mixes with host memory, and docs/exactness.md holds.

tests/router/test_gpu_engine.py asks the same of a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.device_tier import TieredCache
from extraction.extract import extract
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts
from router.batcher import BatchLimits
from router.loading import EngineOptions
from router.means_keeper import StandInOptions
from router.request import GenerationRequest, SamplingParams
from router.routing_choice import RoutingChoice
from router.trust_options import TrustOptions
from tests.checkpoints import write_tiny
from tests.engines import Outcome, assert_same_bits, open_engine, pause_prompts, run_to_end, small_engine
from tests.simulated_device import DEVICE, Readings, simulated

JOIN_AT = (0, 2, 1, 0)
STORES: dict[str, tuple[str, dict[str, Any], QuantisedParts | None]] = {
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": [1], "num_hidden_layers": 3}, None),
    "qwen2_moe": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
        None,
    ),
    "olmoe": ("olmoe", {"clip_qkv": 0.7, "attention_bias": True}, None),
    "all int4": (
        "qwen3_moe",
        {"moe_intermediate_size": 50},
        QuantisedParts(*[Quantization(scheme="int4", group_size=32)] * 3),
    ),
}


@pytest.fixture(scope="module", params=STORES)
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, sizes, parts = STORES[request.param]
    folder = tmp_path_factory.mktemp("device")
    checkpoint = write_tiny(family, folder / "checkpoint", **sizes)
    extract(checkpoint, folder / "store", **({} if parts is None else {"quantised": parts}))
    return folder / "store"


@pytest.fixture
def device() -> Iterator[Readings]:
    with simulated() as readings:
        yield readings


def _requests(**routing: Any) -> list[GenerationRequest]:
    choice = {"routing": RoutingChoice(**routing)} if routing else {}
    return [
        GenerationRequest(
            f"r{index}",
            tuple(range(3, 3 + length)),
            SamplingParams(max_tokens=(6, 3)[index % 2], temperature=(0.0, 0.8)[index % 2], seed=index),
            num_logprobs=(None, 2)[index % 2],
            num_prompt_logprobs=(1, None)[index % 2],
            **choice,
        )
        for index, length in enumerate((5, 70, 1, 130))
    ]


def _options(dtype: str = "float32", **changes: Any) -> EngineOptions:
    return EngineOptions(dtype=dtype, device=DEVICE, **changes)


def _run(root: Path, options: EngineOptions, join_at: tuple[int, ...] = JOIN_AT) -> Outcome:
    loaded = open_engine(root, options)
    outcome = run_to_end(loaded.engine, _requests(), join_at)
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


def test_device_computes_what_the_cpu_does_within_rounding(root: Path, device: Readings) -> None:
    expected, found = _run(root, EngineOptions(dtype="float32")), _run(root, _options())
    assert found.tokens == expected.tokens
    for name, rows in expected.logits.items():
        worst = (torch.stack(found.logits[name]) - torch.stack(rows)).abs().max()
        assert worst < 1e-4 * torch.stack(rows).abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_chunks_and_budgets_change_no_bit(root: Path, device: Readings, dtype: str) -> None:
    alone = _alone(root, dtype)
    assert_same_bits(_run(root, _options(dtype)), alone)
    assert_same_bits(_run(root, _options(dtype, limits=BatchLimits(max_batch_tokens=23))), alone)
    for device_experts, host_experts in ((1, 1), (5, 2), (3, 40)):
        loaded = open_engine(root, _options(dtype))
        cache = loaded.worker.cache
        assert isinstance(cache, TieredCache)
        one = cache.group_bytes // len(loaded.store.expert_keys())
        stored = loaded.store.record(loaded.store.expert_keys()[0]).nbytes
        loaded.close()
        budgets = {"expert_budget_bytes": device_experts * one, "host_budget_bytes": host_experts * stored}
        assert_same_bits(_run(root, _options(dtype, **budgets)), alone)


def test_prompts_that_pause_and_sequences_that_are_swapped_keep_their_bits(
    tiny_store: Path, device: Readings
) -> None:
    alone = _alone(tiny_store, "float32")
    loaded = open_engine(tiny_store, _options())
    growing = [
        replace(r, prompt_ids=tuple(range(60)), sampling=replace(r.sampling, max_tokens=10))
        for r in _requests()
    ]
    expected = run_to_end(loaded.engine, growing)
    engine = small_engine(loaded, 5, BatchLimits(admission_reserve=0), num_swap_blocks=4)
    assert_same_bits(run_to_end(engine, growing, JOIN_AT), expected)
    assert engine.stats.preemptions > 0
    pause_prompts(loaded.engine)
    assert_same_bits(run_to_end(loaded.engine, _requests(), JOIN_AT), alone)
    loaded.close()


def test_one_reading_back_a_layer_and_one_a_step(tiny_store: Path, device: Readings) -> None:
    loaded = open_engine(tiny_store, _options(limits=BatchLimits(is_paced=False)))
    device.done.clear()
    plain = [replace(request, num_prompt_logprobs=None) for request in _requests()]
    run_to_end(loaded.engine, plain, JOIN_AT)
    num_moe, num_vocabulary = len(loaded.config.moe_layers), loaded.config.vocab_size
    layers = [shape for _, shape in device.done if shape[-1] == loaded.config.num_experts]
    logits = [shape for _, shape in device.done if shape[-1] == num_vocabulary]
    steps = loaded.engine.stats.steps
    assert (len(layers), len(logits)) == (num_moe * steps, steps)
    assert len(device.done) == len(layers) + len(logits)
    loaded.close()


@pytest.mark.parametrize("policy", ["native", "snarc"])
def test_other_routing_trust_stand_ins_and_prefetch_keep_to_their_side(
    tiny_store: Path, device: Readings, tmp_path: Path, policy: str
) -> None:
    """With every part that looks at hidden states and at experts' rows."""
    options = _options(
        prefetch=True,
        trust=TrustOptions(str(tmp_path)),
        stand_ins=StandInOptions(),
    )
    loaded = open_engine(tiny_store, options)
    requests = _requests(policy=policy, effort="crisis", is_explained=True)
    outcome = run_to_end(loaded.engine, requests, JOIN_AT)
    assert set(outcome.reasons.values()) == {"length"}
    loaded.close()


def test_class_names_the_device_and_its_products(tiny_store: Path, device: Readings) -> None:
    loaded = open_engine(tiny_store, _options("bfloat16"))
    assert loaded.numerics_class.startswith(f"{DEVICE.type}/{DEVICE.type}/bfloat16/torch-")
    assert loaded.numerics_class == f"{loaded.worker.numerics_class}/blocks64-1/norm-{loaded.kernel.norm}"
    assert loaded.numerics_class.split("/")[4].startswith("blocks64-")
    assert loaded.engine.pool.keys.device == DEVICE
    loaded.close()


def test_simulation_refuses_what_a_device_would(device: Readings) -> None:
    """Else the tests above could not fail."""
    here, there = torch.ones(3, 3), torch.ones(3, 3).to(DEVICE)
    with pytest.raises(AssertionError, match="mixes"):
        here @ there
    with pytest.raises(AssertionError, match="data_ptr"):
        there.data_ptr()
    assert there.device == DEVICE and (there + 1).device == DEVICE and not there.is_cpu
    assert torch.zeros(2, device=DEVICE).device == DEVICE and there.new_empty(2).device == DEVICE
    assert there.cpu().device.type == "cpu" and device.done == [("cpu", (3, 3))]
