"""Holds the cells of docs/exactness.md: within a numerics class nothing but the request decides its bits.

Every test compares with the same requests computed alone, in one chunk, with all experts resident in the router's
process: tokens and every row of logits, bit for bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.remote_directory import RemoteDirectory
from experts.roster import Roster
from experts.store import ExpertStore
from extraction.extract import extract
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts
from router.batcher import BatchLimits
from router.kv_cache import blocks_for
from router.loading import EngineOptions
from router.model_config import read_model_config
from router.request import GenerationRequest, SamplingParams
from router.step_routing import RoutingWatcher
from tests.checkpoints import write_tiny
from tests.engines import Outcome, assert_same_bits, open_engine, pause_prompts, run_to_end, small_engine
from tests.expert_servers import PATIENT, SECRET, expert_servers

SWITCHES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "num_hidden_layers": 4,
        "mlp_only_layers": [1],
        "max_position_embeddings": 128,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 3,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    },
    "olmoe": {
        "clip_qkv": 0.7,
        "attention_bias": True,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mixtral": {
        "sliding_window": 70,
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen3_omni_moe": {"attention_bias": True},
}
"""Families beside Qwen3-MoE, each with switches that could tie a row's bits to its neighbours."""
INT8 = Quantization(scheme="int8", group_size=None)
INT4 = Quantization(scheme="int4", group_size=32)
QUANTISED: dict[str, tuple[QuantisedParts, str, dict[str, Any]]] = {
    "int8": (QuantisedParts(INT8), "qwen3_moe", {"moe_intermediate_size": 35}),
    "int4": (QuantisedParts(INT4), "qwen3_moe", {"moe_intermediate_size": 50}),
    "all int8": (
        QuantisedParts(INT8, INT8, INT8),
        "qwen3_moe",
        {"hidden_size": 52, "intermediate_size": 38, "mlp_only_layers": [0], "tie_word_embeddings": True},
    ),
    "all int4": (
        QuantisedParts(INT4, INT4, INT4),
        "qwen2_moe",
        {"shared_expert_intermediate_size": 50, "intermediate_size": 41, "mlp_only_layers": [0]},
    ),
}
"""Matrices of sizes that the kernels do not take as they are; dense layers, a shared expert, a tied head."""
LENGTHS = (1, 3, 17, 63, 64, 65, 130, 200)
FEW_LENGTHS = (1, 64, 63, 130, 200)
"""For the other families: they share all but their switches with Qwen3-MoE."""
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.25,
    "logit_bias": ((7, 2.5), (9, -100.0)),
    "min_tokens": 5,
    "stop_token_ids": (0, 11),
}
JOIN_AT = (0, 3, 1, 0, 7, 2, 2, 0)


def _requests(vocab_size: int, lengths: Sequence[int]) -> list[GenerationRequest]:
    """Prompts around block boundaries and of one token, greedy and sampled, some with logprobs and penalties."""
    chance = random.Random(11)
    return [
        GenerationRequest(
            f"r{index}",
            tuple(chance.randrange(vocab_size) for _ in range(length)),
            SamplingParams(
                max_tokens=(8, 16, 3, 12)[index % 4],
                temperature=(0.0, 0.8, 1.0)[index % 3],
                top_k=(0, 40)[index % 2],
                seed=index,
                **(PENALTIES if index % 2 else {}),
            ),
            num_logprobs=(None, 3)[index % 2],
            num_prompt_logprobs=(2, None, 0)[index % 3],
        )
        for index, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["stories", "tiny", *SWITCHES, *QUANTISED])
def root(
    request: pytest.FixtureRequest,
    stories_store: Path,
    tiny_store: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    name = str(request.param)
    if name in SWITCHES:
        folder = tmp_path_factory.mktemp(name)
        extract(write_tiny(name, folder / "checkpoint", **SWITCHES[name]), folder / "store")
        return folder / "store"
    if name in QUANTISED:
        parts, family, sizes = QUANTISED[name]
        folder = tmp_path_factory.mktemp("quantised")
        extract(write_tiny(family, folder / "checkpoint", **sizes), folder / "store", quantised=parts)
        return folder / "store"
    return {"stories": stories_store, "tiny": tiny_store}[name]


@pytest.fixture(scope="module")
def requests(root: Path) -> list[GenerationRequest]:
    store = ExpertStore.open(root)
    config = read_model_config(store.served.config)
    has_few = store.manifest.family in SWITCHES or store.manifest.quantization is not None
    lengths = FEW_LENGTHS if has_few else LENGTHS
    store.close()
    longest = config.max_position_embeddings - 30
    return _requests(config.vocab_size, [length for length in lengths if length <= longest])


@pytest.fixture(scope="module")
def reference(root: Path, dtype: str, requests: list[GenerationRequest]) -> Outcome:
    """Each request alone, its prompt in one chunk, experts in this process."""
    loaded = open_engine(root, EngineOptions(dtype=dtype))
    whole = Outcome()
    for request in requests:
        outcome = run_to_end(loaded.engine, [request])
        whole.tokens |= outcome.tokens
        whole.logits |= outcome.logits
        whole.logprobs |= outcome.logprobs
        whole.prompt_logprobs |= outcome.prompt_logprobs
    loaded.close()
    return whole


def _check(root: Path, options: EngineOptions, requests: list[GenerationRequest], reference: Outcome) -> None:
    """Run batched under these options and compare."""
    loaded = open_engine(root, options)
    assert_same_bits(run_to_end(loaded.engine, requests, JOIN_AT), reference)
    loaded.close()


def test_batched_equals_alone(
    root: Path, dtype: str, requests: list[GenerationRequest], reference: Outcome
) -> None:
    _check(root, EngineOptions(dtype=dtype), requests, reference)


@pytest.mark.parametrize("chunk", [5, 64])
def test_chunked_prefill_equals_whole(
    root: Path, dtype: str, requests: list[GenerationRequest], reference: Outcome, chunk: int
) -> None:
    limits = BatchLimits(max_batch_tokens=chunk)
    _check(root, EngineOptions(dtype=dtype, limits=limits), requests, reference)


@pytest.mark.parametrize("overtaking", [0, 70])
@pytest.mark.parametrize("budget_bytes", [None, 1 << 18])
def test_prefill_that_pauses_equals_whole(
    root: Path,
    dtype: str,
    requests: list[GenerationRequest],
    reference: Outcome,
    budget_bytes: int | None,
    overtaking: int,
) -> None:
    """Under a budget a layer's experts are computed one after another, with steps of the streams between them.
    overtaking: rows of prompts that overtake a pass."""
    loaded = open_engine(root, EngineOptions(dtype=dtype, expert_budget_bytes=budget_bytes))
    pause_prompts(loaded.engine, overtaking=overtaking)
    assert_same_bits(run_to_end(loaded.engine, requests, JOIN_AT), reference)
    loaded.close()


@pytest.mark.parametrize("experts_in_budget", [1, 5])
def test_any_expert_budget_equals_unlimited(
    root: Path, dtype: str, requests: list[GenerationRequest], reference: Outcome, experts_in_budget: int
) -> None:
    loaded = open_engine(root, EngineOptions(dtype=dtype))
    loaded.worker.load_all()
    expert_bytes = loaded.worker.resident_bytes // loaded.worker.num_resident
    loaded.close()
    budget = EngineOptions(dtype=dtype, expert_budget_bytes=experts_in_budget * expert_bytes)
    _check(root, budget, requests, reference)


def test_expert_budget_that_changes_while_requests_run_equals_unlimited(
    root: Path, dtype: str, requests: list[GenerationRequest], reference: Outcome
) -> None:
    """As by the capacity state, and worse: another after every layer, down to one expert and up again."""
    loaded = open_engine(root, EngineOptions(dtype=dtype, expert_budget_bytes=1 << 30, is_resizable=True))
    chance = random.Random(5)

    class Resizer(RoutingWatcher):
        def watch(self, *layer: object, **more: object) -> None:
            loaded.worker.set_budget(int(loaded.worker.group_bytes * chance.choice((0, 0.1, 0.3, 1))))

    loaded.engine.watchers = (*loaded.engine.watchers, Resizer())
    assert_same_bits(run_to_end(loaded.engine, requests, JOIN_AT), reference)
    loaded.close()


@pytest.mark.parametrize("how", ["swap", "recompute"])
def test_preemption_equals_undisturbed(
    root: Path, dtype: str, requests: list[GenerationRequest], reference: Outcome, how: str
) -> None:
    """All at once, with so few blocks that growing sequences push out the youngest."""
    loaded = open_engine(root, EngineOptions(dtype=dtype))
    limits = BatchLimits(admission_reserve=1)
    engine = small_engine(loaded, 4, limits, num_swap_blocks=5 if how == "swap" else 0)
    assert_same_bits(run_to_end(engine, requests), reference)
    loaded.close()
    assert engine.stats.preemptions > 0


@pytest.fixture
def serve_experts() -> Iterator[Callable[[Path, str, int], Roster]]:
    """Starts expert servers in this process and gives the roster that lists them."""
    with ExitStack() as stack:

        def start(root: Path, dtype: str, num_actors: int) -> Roster:
            return stack.enter_context(expert_servers(root, num_actors, dtype))

        yield start


@pytest.mark.parametrize("is_paused", [False, True])
@pytest.mark.parametrize("num_actors", [1, 2, 3])
def test_remote_experts_equal_local(
    root: Path,
    dtype: str,
    requests: list[GenerationRequest],
    reference: Outcome,
    serve_experts: Callable[[Path, str, int], Roster],
    num_actors: int,
    is_paused: bool,
) -> None:
    """is_paused: prompts beside streams ask for a few experts at a time."""
    roster = serve_experts(root, dtype, num_actors)
    loaded = open_engine(
        root,
        EngineOptions(dtype=dtype),
        lambda worker: RemoteDirectory(worker, roster, SECRET, limits=PATIENT),
    )
    if is_paused:
        pause_prompts(loaded.engine)
    assert_same_bits(run_to_end(loaded.engine, requests, JOIN_AT), reference)
    stats = loaded.directory.stats()
    loaded.close()
    assert (stats.local_rows, stats.failovers) == (0, 0)
    assert stats.remote_rows > 0


def test_experts_partly_remote_and_partly_lost_equal_local(
    root: Path,
    dtype: str,
    requests: list[GenerationRequest],
    reference: Outcome,
    serve_experts: Callable[[Path, str, int], Roster],
) -> None:
    """One of three actors was never reachable; its experts are computed in the router's process."""
    roster = serve_experts(root, dtype, 3)
    reachable = {name: endpoint for name, endpoint in roster.endpoints.items() if name != "experts-1"}
    roster = Roster(1, reachable, roster.owners)
    loaded = open_engine(
        root,
        EngineOptions(dtype=dtype),
        lambda worker: RemoteDirectory(worker, roster, SECRET, limits=PATIENT),
    )
    assert_same_bits(run_to_end(loaded.engine, requests, JOIN_AT), reference)
    stats = loaded.directory.stats()
    loaded.close()
    assert stats.local_rows > 0 and stats.remote_rows > 0


def test_resumed_request_continues_with_the_same_tokens(
    root: Path, dtype: str, requests: list[GenerationRequest], reference: Outcome
) -> None:
    """The rest of an answer, asked for anew with the tokens already sent, as after the loss of a router."""
    request = requests[1]
    whole = reference.tokens[request.request_id]
    num_sent = min(11, len(whole) - 1)  # a stop token may have ended it
    sent = tuple(whole[:num_sent])
    resumed = replace(request, generated_ids=sent)
    assert request.sampling.has_penalties
    loaded = open_engine(root, EngineOptions(dtype=dtype))
    outcome = run_to_end(loaded.engine, [resumed])
    loaded.close()
    assert list(sent) + outcome.tokens[request.request_id] == reference.tokens[request.request_id]
    assert torch.equal(outcome.logits[request.request_id][0], reference.logits[request.request_id][num_sent])
    assert outcome.logprobs[request.request_id] == reference.logprobs[request.request_id][num_sent:]


def test_resumed_request_keeps_its_minimum_length(root: Path, dtype: str) -> None:
    """Stop tokens are held back by the answer's position, and penalties count what was generated before."""
    sampling = SamplingParams(12, 0.0, frequency_penalty=1.5, min_tokens=8, stop_token_ids=tuple(range(200)))
    request = GenerationRequest("r", (3, 5, 8), sampling)
    loaded = open_engine(root, EngineOptions(dtype=dtype))
    whole = run_to_end(loaded.engine, [request]).tokens["r"]
    assert all(token >= 200 for token in whole[:8])
    for num_sent in (1, 7, 8):
        rest = run_to_end(loaded.engine, [replace(request, generated_ids=tuple(whole[:num_sent]))])
        assert rest.tokens["r"] == whole[num_sent:]
    loaded.close()


def test_choices_that_share_a_prompt_equal_single_requests(root: Path, dtype: str) -> None:
    """With so few blocks that choices are preempted, and beside a request of another group."""
    loaded = open_engine(root, EngineOptions(dtype=dtype))
    length = 190 if loaded.engine.max_tokens_per_sequence > 210 else 61
    choices = [
        GenerationRequest(
            f"c{choice}",
            tuple((7 * i + length) % 200 for i in range(length)),
            SamplingParams(max_tokens=(9, 20, 13, 1)[choice], seed=5, choice=choice, presence_penalty=0.5),
            num_logprobs=1,
            num_prompt_logprobs=1 if choice == 0 else None,
            group="g",
        )
        for choice in range(4)
    ]
    other = GenerationRequest("other", (4,) * length, SamplingParams(max_tokens=4, seed=9), group="h")
    alone = Outcome()
    for request in [*choices, other]:
        outcome = run_to_end(loaded.engine, [replace(request, group=None)])
        alone.tokens |= outcome.tokens
        alone.logits |= outcome.logits
        alone.logprobs |= outcome.logprobs
        alone.prompt_logprobs |= outcome.prompt_logprobs
    engine = small_engine(
        loaded, 3 * blocks_for(length + 1), BatchLimits(admission_reserve=1), num_swap_blocks=2
    )
    assert_same_bits(run_to_end(engine, [choices[2], other, *choices[:2], choices[3]]), alone)
    loaded.close()
    assert engine.stats.preemptions > 0


def test_found_prefix_equals_computing_it(root: Path, dtype: str) -> None:
    """Prompts that begin alike, one of them with an answer in it, at once and after each other, with little room."""
    loaded = open_engine(root, EngineOptions(dtype=dtype))
    depends_on_length = loaded.config.rope.depends_on_length
    assert (loaded.engine.kv.scope is None) == depends_on_length
    text = tuple((11 * i + i // 7) % 200 for i in range(220))
    longest = min(200, loaded.engine.max_tokens_per_sequence - 20)
    requests = [
        GenerationRequest(
            f"r{index}",
            (*text[: min(length, longest - 9)], *text[200 : 200 + index]),
            SamplingParams(max_tokens=(12, 3, 7)[index % 3], temperature=(0.0, 1.0)[index % 2], seed=index),
            num_logprobs=1,
        )
        for index, length in enumerate((150, 64, 65, 128, 190, 129, 64, 180))
    ]
    reference = Outcome()
    scope, loaded.engine.kv.scope = loaded.engine.kv.scope, None
    for request in requests:
        outcome = run_to_end(loaded.engine, [request])
        reference.tokens |= outcome.tokens
        reference.logits |= outcome.logits
        reference.logprobs |= outcome.logprobs
    for num_blocks in (5, 30):
        engine = small_engine(loaded, num_blocks, BatchLimits(admission_reserve=1), num_swap_blocks=2)
        engine.kv.scope = scope
        assert_same_bits(run_to_end(engine, requests, (0, 1, 3, 6, 9, 30, 31, 32)), reference)
        assert (engine.kv.num_hit_positions > 0) != depends_on_length
    loaded.close()
