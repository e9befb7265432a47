"""Prompts with media hold the contract of docs/exactness.md: nothing but the request decides their bits.

The reference is each request computed alone, its prompt in one chunk, all experts in this process, its media encoded
for it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experts.numerics import computing_threads
from experts.remote_directory import RemoteDirectory
from experts.store import ExpertStore
from router.attention import BLOCK_POSITIONS
from router.batcher import BatchLimits
from router.loading import EngineOptions, LoadedEngine
from router.media.encoder import MediaEncoder
from router.prefix_keys import PrefixScope
from router.request import GenerationRequest, SamplingParams
from tests.engines import Outcome, assert_same_bits, open_engine, pause_prompts, run_to_end, small_engine
from tests.expert_servers import PATIENT, SECRET, expert_servers
from tests.omni import Part, image, request, sound
from tests.simulated_device import DEVICE, simulated

TEXT = tuple(range(20, 52))
PROMPTS: tuple[tuple[Part, ...], ...] = (
    (TEXT, image(72, 72), TEXT),
    (sound(3.1), TEXT, image(24, 120, 1), TEXT, image(40, 16, 2)),
    (TEXT * 3,),
    (image(8, 8), sound(1.7, 1)),
)
JOIN_AT = (0, 2, 1, 3)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def loaded(omni_store: Path, dtype: str) -> Iterator[LoadedEngine]:
    loaded = open_engine(omni_store, EngineOptions(dtype=dtype, has_media=True, prefix_cache=False))
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def requests(loaded: LoadedEngine) -> list[GenerationRequest]:
    made = []
    for number, parts in enumerate(PROMPTS):
        sampling = SamplingParams(max_tokens=9 + number, temperature=(0.0, 0.9)[number % 2], seed=number)
        asked = request(loaded, *parts, name=f"r{number}", num_logprobs=1)
        made.append(replace(asked, sampling=sampling))
    return made


@pytest.fixture(scope="module")
def reference(loaded: LoadedEngine, requests: list[GenerationRequest]) -> Outcome:
    return _alone(loaded, requests)


def _alone(loaded: LoadedEngine, requests: Sequence[GenerationRequest]) -> Outcome:
    whole = Outcome()
    for asked in requests:
        outcome = run_to_end(small_engine(loaded, 16), [asked], encoder=_anew(loaded))
        for part in ("tokens", "logits", "logprobs"):
            getattr(whole, part).update(getattr(outcome, part))
    return whole


def _anew(loaded: LoadedEngine) -> MediaEncoder:
    """Towers that have encoded nothing."""
    return MediaEncoder(loaded.store, loaded.config, loaded.kernel, loaded.dtype)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("is_paused", [False, True])
def test_chunks_and_neighbours_change_no_bit(
    loaded: LoadedEngine,
    requests: list[GenerationRequest],
    reference: Outcome,
    chunk: int,
    is_paused: bool,
) -> None:
    engine = small_engine(loaded, 24, BatchLimits(max_batch_tokens=max(chunk, 4)))
    if is_paused:
        pause_prompts(engine)
    assert_same_bits(run_to_end(engine, requests, JOIN_AT, loaded.media), reference)


@pytest.mark.parametrize("num_swap_blocks", [0, 8])
def test_preempted_prompts_change_no_bit(
    loaded: LoadedEngine, requests: list[GenerationRequest], reference: Outcome, num_swap_blocks: int
) -> None:
    engine = small_engine(loaded, 4, BatchLimits(admission_reserve=1), num_swap_blocks=num_swap_blocks)
    longer = [replace(r, sampling=replace(r.sampling, max_tokens=60)) for r in requests]
    alone = _alone(loaded, longer)
    assert_same_bits(run_to_end(engine, longer, encoder=loaded.media), alone)
    assert engine.stats.preemptions > 0
    for name, tokens in reference.tokens.items():
        assert alone.tokens[name][: len(tokens)] == tokens


@pytest.mark.parametrize("num_experts", [1, 5])
def test_expert_budgets_change_no_bit(
    omni_store: Path, dtype: str, requests: list[GenerationRequest], reference: Outcome, num_experts: int
) -> None:
    store = ExpertStore.open(omni_store)
    budget = num_experts * store.record(store.expert_keys("thinker")[0]).nbytes
    store.close()
    if dtype == "bfloat16":
        budget //= 2
    loaded = open_engine(omni_store, EngineOptions(dtype=dtype, has_media=True, expert_budget_bytes=budget))
    assert_same_bits(run_to_end(loaded.engine, requests, JOIN_AT, loaded.media), reference)
    loaded.close()


def test_experts_of_actors_change_no_bit(
    omni_store: Path, dtype: str, requests: list[GenerationRequest], reference: Outcome
) -> None:
    with ExitStack() as stack:
        roster = stack.enter_context(expert_servers(omni_store, 2, dtype))
        loaded = open_engine(
            omni_store,
            EngineOptions(dtype=dtype, has_media=True),
            lambda worker: RemoteDirectory(worker, roster, SECRET, limits=PATIENT),
        )
        assert_same_bits(run_to_end(loaded.engine, requests, JOIN_AT, loaded.media), reference)
        assert loaded.directory.stats().local_rows == 0
        loaded.close()


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_change_no_bit_of_what_is_encoded(
    loaded: LoadedEngine, requests: list[GenerationRequest], num_threads: int
) -> None:
    assert loaded.media is not None
    if loaded.kernel.product != "native":
        pytest.skip("a library's products are proven for some sizes only")
    with computing_threads(num_threads):
        for asked in requests:
            anew, before = _anew(loaded).inputs_for(asked), loaded.media.inputs_for(asked)
            for ours, theirs in zip(anew.embeddings, before.embeddings, strict=True):
                assert torch.equal(ours.rows_ND, theirs.rows_ND)
            for layer, runs in before.injections.items():
                for ours, theirs in zip(anew.injections[layer], runs, strict=True):
                    assert torch.equal(ours.rows_ND, theirs.rows_ND)


@pytest.mark.parametrize("num_sent", [1, 5])
def test_resumed_answer_goes_on_with_the_same_tokens(
    loaded: LoadedEngine, requests: list[GenerationRequest], reference: Outcome, num_sent: int
) -> None:
    resumed = [
        replace(asked, generated_ids=tuple(reference.tokens[asked.request_id][:num_sent]))
        for asked in requests
    ]
    outcome = run_to_end(small_engine(loaded, 16), resumed, encoder=_anew(loaded))
    for asked in requests:
        name = asked.request_id
        assert outcome.tokens[name] == reference.tokens[name][num_sent:]
        assert torch.equal(torch.stack(outcome.logits[name]), torch.stack(reference.logits[name][num_sent:]))


def test_choices_of_one_prompt_share_it_and_change_no_bit(loaded: LoadedEngine) -> None:
    choices = [
        replace(
            request(loaded, *PROMPTS[1], name=f"c{choice}", group="g", num_logprobs=0),
            sampling=SamplingParams(max_tokens=8, seed=3, choice=choice),
        )
        for choice in range(3)
    ]
    alone = _alone(loaded, [replace(asked, group=None) for asked in choices])
    engine = small_engine(loaded, 16)
    assert_same_bits(run_to_end(engine, choices, encoder=loaded.media), alone)
    assert engine.stats.prompt_tokens < 2 * len(choices[0].prompt_ids)


def _found(loaded: LoadedEngine, *asked: GenerationRequest) -> tuple[int, Outcome]:
    """How many positions the last of them found, and what came of it."""
    engine = small_engine(loaded, 24)
    engine.kv.scope = PrefixScope("store", "class", 2)
    for one in asked[:-1]:
        run_to_end(engine, [one], encoder=loaded.media)
    before = engine.kv.num_hit_positions
    outcome = run_to_end(engine, [asked[-1]], encoder=loaded.media)
    return engine.kv.num_hit_positions - before, outcome


def test_prefix_with_the_same_image_is_found_and_changes_no_bit(loaded: LoadedEngine) -> None:
    seen = (TEXT, image(72, 72), TEXT)
    first, second = (request(loaded, *seen, end, name="r") for end in ((1, 2, 3), (4, 5, 6)))
    num_found, outcome = _found(loaded, first, second)
    assert num_found == len(first.prompt_ids) // BLOCK_POSITIONS * BLOCK_POSITIONS
    assert_same_bits(outcome, run_to_end(small_engine(loaded, 16), [second], encoder=loaded.media))


@pytest.mark.parametrize(
    "other",
    [
        (TEXT * 2, image(72, 72, seed=1), TEXT),
        (TEXT * 2, image(24, 216), TEXT),
        (TEXT * 2, image(216, 24), TEXT),
    ],
)
def test_prefix_with_another_image_is_found_up_to_it(loaded: LoadedEngine, other: tuple[Part, ...]) -> None:
    first = request(loaded, TEXT * 2, image(72, 72), TEXT, name="r")
    second = request(loaded, *other, name="r")
    assert first.prompt_ids == second.prompt_ids
    num_found, outcome = _found(loaded, first, second)
    assert num_found == len(TEXT * 2)
    assert_same_bits(outcome, run_to_end(small_engine(loaded, 16), [second], encoder=loaded.media))


def test_tokens_of_media_without_media_find_nothing_of_theirs(loaded: LoadedEngine) -> None:
    first = request(loaded, image(72, 72), TEXT * 3, name="r")
    assert _found(loaded, first, replace(first, media=()))[0] == 0


def test_decoder_on_a_device_takes_what_the_cpu_encoded(
    omni_store: Path, dtype: str, requests: list[GenerationRequest]
) -> None:
    """Simulated. In chunks and alone it has the same bits; which ones is the device's business."""
    with simulated():
        loaded = open_engine(omni_store, EngineOptions(dtype=dtype, device=DEVICE, has_media=True))
        alone = _alone(loaded, requests)
        engine = small_engine(loaded, 24, BatchLimits(max_batch_tokens=16))
        assert_same_bits(run_to_end(engine, requests, JOIN_AT, _anew(loaded)), alone)
        loaded.close()
