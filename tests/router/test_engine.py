"""The engine's life: joining, leaving, running out of memory, failing, and what a prompt may bring beside ids."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experts.call import ExpertCall
from experts.directory import LocalDirectory
from experts.errors import ExpertCorrupt
from experts.worker import ExpertWorker
from router.attention import BLOCK_POSITIONS
from router.batcher import BatchLimits
from router.decoder_layer import MANY_ROWS
from router.errors import PromptInvalid, QueueFull, RequestTooLong
from router.kv_cache import BlockAllocator, KvPool
from router.loading import EngineOptions, LoadedEngine
from router.prompt_inputs import InputRows, PromptInputs
from router.request import GenerationRequest, SamplingParams
from router.step_batch import Half, Span, StepBatch
from router.weights import Layer
from tests.engines import (
    Outcome,
    RecordingEngine,
    SmallestPace,
    assert_nothing_held,
    assert_same_bits,
    open_engine,
    pause_prompts,
    run_to_end,
    small_engine,
)

WIDTH = 64
SMALL_STEPS = BatchLimits(max_batch_tokens=16, admission_reserve=1)


class FaultyDirectory(LocalDirectory):
    """Fails the call with this number, counted down; negative never."""

    calls_to_failure = -1

    def table(self, component: str, layer: int) -> None:
        """So that every call comes to `run`."""

    def run(self, call: ExpertCall) -> torch.Tensor:
        self.calls_to_failure -= 1
        if self.calls_to_failure == 0:
            raise ExpertCorrupt("('model', 0, 3)", "experts.bin", 64, "the bytes were altered")
        return super().run(call)


@pytest.fixture(scope="module")
def loaded(tiny_store: Path) -> Iterator[LoadedEngine]:
    def connect(worker: ExpertWorker) -> FaultyDirectory:
        return FaultyDirectory(worker)

    loaded = open_engine(tiny_store, EngineOptions(dtype="float32"), connect)
    yield loaded
    loaded.close()


def _request(name: str, length: int, max_tokens: int = 8, **sampling: object) -> GenerationRequest:
    """A prompt that depends on name and length only. Sampled, so that wrong logits show in the tokens."""
    chance = random.Random(f"{name} {length}")
    params = {"temperature": 1.0, "seed": length, "max_tokens": max_tokens} | sampling
    prompt = tuple(chance.randrange(500) for _ in range(length))
    return GenerationRequest(name, prompt, SamplingParams(**params))  # type: ignore[arg-type]


def _alone(loaded: LoadedEngine, *requests: GenerationRequest) -> Outcome:
    """Each request by itself, without any pressure."""
    whole = Outcome()
    for request in requests:
        outcome = run_to_end(small_engine(loaded, 8), [request])
        whole.tokens |= outcome.tokens
        whole.logits |= outcome.logits
    return whole


def _finish(engine: RecordingEngine) -> Outcome:
    for _ in range(2000):
        if not engine.has_work:
            assert_nothing_held(engine)
            return engine.outcome
        engine.step()
        engine.allocator.check()
    raise AssertionError("not done")


def _swap_out_youngest(loaded: LoadedEngine) -> tuple[RecordingEngine, GenerationRequest]:
    """Step until the younger of two sequences lies in host memory. Returns the engine and the older's request."""
    engine = small_engine(loaded, 3, BatchLimits(admission_reserve=1), num_swap_blocks=2)
    old = _request("old", BLOCK_POSITIONS - 3, 12)
    for request in (old, _request("victim", BLOCK_POSITIONS - 4, 40)):
        engine.submit(request)
    while not engine.swapped_bytes:
        engine.step()
    return engine, old


@pytest.mark.parametrize("phase", ["waiting", "prefill", "decode"])
def test_cancelled_request_frees_its_blocks_and_disturbs_nobody(loaded: LoadedEngine, phase: str) -> None:
    engine = small_engine(loaded, 8, SMALL_STEPS)
    other, victim = _request("other", 5, 20), _request("victim", 70, 30)
    engine.submit(other)
    engine.submit(victim)
    for _ in range(0 if phase == "waiting" else 2):
        engine.step()
    while phase == "decode" and "victim" not in engine.outcome.tokens:
        engine.step()
    drawn = len(engine.outcome.tokens.get("victim", ()))
    assert (drawn > 0) == (phase == "decode")
    assert engine.cancel("victim")
    engine.allocator.check()
    assert not engine.allocator.holds("victim")
    assert not engine.cancel("victim")
    _finish(engine)
    engine.outcome.tokens.pop("victim", None)
    assert_same_bits(engine.outcome, _alone(loaded, other))


def test_cancelled_swapped_request_frees_host_memory(loaded: LoadedEngine) -> None:
    engine, old = _swap_out_youngest(loaded)
    assert engine.cancel("victim")
    assert engine.swapped_bytes == 0
    _finish(engine)
    engine.outcome.tokens.pop("victim")
    assert_same_bits(engine.outcome, _alone(loaded, old))


def test_swapped_request_comes_back_where_it_was(loaded: LoadedEngine) -> None:
    engine, old = _swap_out_youngest(loaded)
    _finish(engine)
    assert_same_bits(engine.outcome, _alone(loaded, old, _request("victim", BLOCK_POSITIONS - 4, 40)))
    assert engine.stats.prompt_tokens == 2 * BLOCK_POSITIONS - 7, "nothing was computed twice"


def test_sequence_preempted_before_its_first_chunk_starts_over(loaded: LoadedEngine) -> None:
    """It holds blocks but no keys yet, because older sequences took the whole step."""
    engine = small_engine(loaded, 3, BatchLimits(max_batch_tokens=1, admission_reserve=1), num_swap_blocks=3)
    requests = [_request("old", 1, 2 * BLOCK_POSITIONS), _request("young", BLOCK_POSITIONS + 6, 4)]
    outcome = run_to_end(engine, requests)
    assert engine.stats.preemptions == 1
    assert_same_bits(outcome, _alone(loaded, *requests))


@pytest.mark.parametrize("seed", range(3))
def test_sequences_that_join_and_leave_at_any_step_get_their_own_bits(
    loaded: LoadedEngine, seed: int
) -> None:
    chance = random.Random(seed)
    limits = BatchLimits(chance.choice((3, 16, 64)), max_running=4, admission_reserve=chance.choice((1, 64)))
    engine = small_engine(loaded, 5, limits, num_swap_blocks=chance.choice((0, 2, 9)))
    requests = [
        _request(f"s{number}", chance.randint(1, 140), chance.randint(1, 40), top_k=number % 3)
        for number in range(12)
    ]
    cancelled = set()
    for request in requests:
        engine.submit(request)
        for _ in range(chance.randint(0, 9)):
            engine.step()
            engine.allocator.check()
        victim = chance.choice(requests).request_id
        if chance.random() < 0.3 and engine.cancel(victim):
            cancelled.add(victim)
    _finish(engine)
    kept = [request for request in requests if request.request_id not in cancelled]
    for name in cancelled:
        engine.outcome.tokens.pop(name, None)
    assert set(engine.outcome.reasons) == {request.request_id for request in kept}
    assert_same_bits(engine.outcome, _alone(loaded, *kept))


def _faulty(loaded: LoadedEngine) -> FaultyDirectory:
    assert isinstance(loaded.directory, FaultyDirectory)
    return loaded.directory


@pytest.mark.parametrize("failing_call", [1, 2])
def test_expert_error_ends_the_requests_of_its_step_only(loaded: LoadedEngine, failing_call: int) -> None:
    """The second MoE layer fails as the first does: its step has by then written keys of the first."""
    engine = small_engine(loaded, 6, BatchLimits(max_batch_tokens=16, max_running=3, admission_reserve=1))
    engine.submit(_request("first", 40))
    engine.step()
    engine.submit(_request("short", 8))
    engine.submit(_request("unborn", 9))  # admitted, but the chunks of the other two fill the step
    engine.submit(_request("waiting", 20))
    _faulty(loaded).calls_to_failure = failing_call
    events = engine.step()
    ends = [(event.request_id, event.finish_reason) for event in events]
    assert ends == [("first", "error"), ("short", "error")]
    assert events[0].error is not None
    assert "experts.bin" not in events[0].error
    assert engine.stats.failed == 2
    outcome = _finish(engine)
    del outcome.tokens["first"], outcome.tokens["short"]
    assert_same_bits(outcome, _alone(loaded, _request("unborn", 9), _request("waiting", 20)))
    assert not engine.pool.keys.isnan().any()


def test_blocks_of_a_failed_request_are_scrubbed(loaded: LoadedEngine) -> None:
    engine = small_engine(loaded, 2)
    engine.submit(_request("first", 40))
    _faulty(loaded).calls_to_failure = 2
    assert engine.step()[0].finish_reason == "error"
    assert not engine.pool.keys.any()
    assert not engine.pool.values.any()


def _poisoned(length: int, index: int) -> tuple[GenerationRequest, PromptInputs]:
    return _request("poisoned", length), PromptInputs(
        (InputRows(index, torch.full((1, WIDTH), float("nan"))),)
    )


def test_non_finite_logits_end_their_request_only(loaded: LoadedEngine) -> None:
    engine = small_engine(loaded, 4)
    healthy = _request("healthy", 11)
    engine.submit(healthy)
    engine.submit(*_poisoned(30, 4))
    assert _finish(engine).reasons == {"healthy": "length", "poisoned": "error"}
    for name in ("tokens", "logits"):
        getattr(engine.outcome, name).pop("poisoned", None)
    assert_same_bits(engine.outcome, _alone(loaded, healthy))


def test_non_finite_keys_of_a_cancelled_prompt_do_not_reach_the_next_request(loaded: LoadedEngine) -> None:
    """No logits were computed yet, so nobody has noticed."""
    engine = small_engine(loaded, 2, SMALL_STEPS)
    engine.submit(*_poisoned(100, 4))
    engine.step()
    engine.cancel("poisoned")
    healthy = _request("healthy", BLOCK_POSITIONS + 6, 4)  # takes both blocks and writes part of each
    engine.submit(healthy)
    assert_same_bits(_finish(engine), _alone(loaded, healthy))


def test_non_finite_keys_of_a_preempted_prompt_do_not_reach_other_requests(loaded: LoadedEngine) -> None:
    engine = small_engine(loaded, 3, SMALL_STEPS, num_swap_blocks=3)
    healthy = _request("healthy", BLOCK_POSITIONS - 6, 40)
    engine.submit(healthy)
    for _ in range(4):
        engine.step()
    engine.submit(*_poisoned(2 * BLOCK_POSITIONS - 2, 0))
    outcome = _finish(engine)
    assert engine.stats.preemptions == 1
    assert outcome.reasons["poisoned"] == "error"
    del outcome.tokens["poisoned"]
    assert_same_bits(outcome, _alone(loaded, healthy))


def test_stop_id_ends_the_answer_and_is_reported(loaded: LoadedEngine) -> None:
    tokens = _alone(loaded, _request("r", 9, 12)).tokens["r"]
    stop = tokens[5]
    outcome = run_to_end(small_engine(loaded, 2), [_request("r", 9, 12, stop_token_ids=(stop, 511))])
    assert outcome.tokens["r"] == tokens[: tokens.index(stop) + 1]
    assert outcome.reasons["r"] == "stop"


def test_answer_has_exactly_max_tokens(loaded: LoadedEngine) -> None:
    for max_tokens in (1, 2, 7):
        outcome = run_to_end(small_engine(loaded, 2), [_request("r", 9, max_tokens)])
        assert len(outcome.tokens["r"]) == max_tokens
        assert outcome.reasons["r"] == "length"


def test_request_may_fill_the_context_and_not_one_token_more(loaded: LoadedEngine) -> None:
    context = loaded.config.max_position_embeddings
    engine = small_engine(loaded, 9)
    with pytest.raises(RequestTooLong, match=f"{context + 1} tokens; at most {context} fit"):
        engine.submit(_request("long", context - 3, 4))
    outcome = run_to_end(engine, [_request("full", context - 4, 4)])
    assert len(outcome.tokens["full"]) == 4


def test_single_sequence_may_fill_the_whole_cache_and_not_one_token_more(loaded: LoadedEngine) -> None:
    engine = small_engine(loaded, 2, BatchLimits(admission_reserve=1))
    whole = 2 * BLOCK_POSITIONS
    with pytest.raises(RequestTooLong, match=f"at most {whole} fit"):
        engine.submit(_request("long", whole - 9, 10))
    request = _request("full", BLOCK_POSITIONS - 1, BLOCK_POSITIONS + 1)
    assert_same_bits(run_to_end(engine, [request]), _alone(loaded, request))
    assert engine.stats.preemptions == 0


def test_one_request_more_than_may_be_open_is_refused(loaded: LoadedEngine) -> None:
    engine = small_engine(loaded, 4, BatchLimits(max_running=2, max_waiting=3))
    for number in range(5):
        engine.submit(_request(f"r{number}", 3))
    with pytest.raises(QueueFull, match="5 requests are open already"):
        engine.submit(_request("r5", 3))
    engine.cancel("r4")
    engine.submit(_request("r5", 3))
    assert len(_finish(engine).reasons) == 5


def test_used_id_is_refused(loaded: LoadedEngine) -> None:
    engine = small_engine(loaded, 2)
    engine.submit(_request("r", 3))
    with pytest.raises(ValueError, match="'r' is in use"):
        engine.submit(_request("r", 4))


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (GenerationRequest("r", ()), "no tokens"),
        (GenerationRequest("r", (1, 512)), "token id 512"),
        (GenerationRequest("r", (-1,)), "token id -1"),
        (GenerationRequest("r", (1,), generated_ids=(600,)), "token id 600"),
        (GenerationRequest("r", (1,), SamplingParams(max_tokens=2), (5, 6)), "leaves nothing"),
    ],
)
def test_prompt_that_cannot_be_computed_is_refused(
    loaded: LoadedEngine, request_: GenerationRequest, reason: str
) -> None:
    with pytest.raises(PromptInvalid, match=reason):
        small_engine(loaded, 2).submit(request_)


@pytest.mark.parametrize(
    "inputs",
    [
        PromptInputs((InputRows(4, torch.zeros(2, WIDTH)),)),
        PromptInputs((InputRows(0, torch.zeros(1, WIDTH + 1)),)),
        PromptInputs(positions_3P=torch.zeros(3, 4, dtype=torch.int64)),
        PromptInputs(injections={3: (InputRows(0, torch.zeros(1, WIDTH)),)}),
        PromptInputs(injections={0: (InputRows(-1, torch.zeros(1, WIDTH)),)}),
        PromptInputs(capture_layers=(3,)),
    ],
)
def test_inputs_outside_prompt_or_model_are_refused(loaded: LoadedEngine, inputs: PromptInputs) -> None:
    with pytest.raises(PromptInvalid):
        small_engine(loaded, 2).submit(_request("r", 5), inputs)


def _with_inputs(
    loaded: LoadedEngine, request: GenerationRequest, inputs: PromptInputs, limits: BatchLimits | None = None
) -> Outcome:
    engine = small_engine(loaded, 8, limits)
    engine.submit(_request("neighbour", 7))
    engine.submit(request, inputs)
    outcome = _finish(engine)
    del outcome.tokens["neighbour"], outcome.logits["neighbour"]
    return outcome


def test_embeddings_in_place_of_ids_equal_the_ids_own(loaded: LoadedEngine) -> None:
    request = _request("r", 80)
    table = loaded.engine.backbone.embeddings_VD
    ids = torch.tensor(request.prompt_ids)
    given = [range(1), range(14, 41), range(79, 80)]  # alone, over the ends of chunks, at the prompt's end
    inputs = PromptInputs(tuple(InputRows(run.start, table[ids[run.start : run.stop]]) for run in given))
    masked = tuple(0 if any(i in run for run in given) else token for i, token in enumerate(ids.tolist()))
    changed = GenerationRequest("r", masked, request.sampling)
    for limits in (None, SMALL_STEPS):
        assert_same_bits(_with_inputs(loaded, changed, inputs, limits), _alone(loaded, request))


def test_three_equal_position_rows_equal_the_default(loaded: LoadedEngine) -> None:
    request = _request("r", 80)
    inputs = PromptInputs(positions_3P=torch.arange(80).expand(3, -1))
    for limits in (None, SMALL_STEPS):
        assert_same_bits(_with_inputs(loaded, request, inputs, limits), _alone(loaded, request))


def test_captured_states_and_injections_do_not_depend_on_chunks(loaded: LoadedEngine) -> None:
    request = _request("r", 70, 3)
    ones = torch.ones(1, WIDTH)
    added = {0: (InputRows(3, ones), InputRows(66, -ones)), 1: (InputRows(10, ones.expand(30, -1) / 2),)}

    def run(limits: BatchLimits | None) -> tuple[Outcome, torch.Tensor]:
        seen = torch.full((2, 72, WIDTH), float("nan"))

        def keep(layer: int, first: int, hidden: torch.Tensor) -> None:
            seen[layer // 2, first : first + len(hidden)] = hidden

        inputs = PromptInputs(injections=added, capture_layers=(0, 2), on_capture=keep)
        return _with_inputs(loaded, request, inputs, limits), seen

    whole, seen = run(None)
    chunked, seen_in_chunks = run(SMALL_STEPS)
    assert_same_bits(chunked, whole)
    assert not seen.isnan().any()
    assert torch.equal(seen_in_chunks, seen)
    assert not torch.equal(whole.logits["r"][0], _alone(loaded, request).logits["r"][0])


def test_resumed_prompt_with_positions_continues_behind_the_largest(loaded: LoadedEngine) -> None:
    """The answer's positions go on from the largest given one, whether tokens were sent before or not."""
    request = _request("r", 20, 10)
    inputs = PromptInputs(positions_3P=torch.arange(20).expand(3, -1) // 2)
    whole = _with_inputs(loaded, request, inputs)
    sent = tuple(whole.tokens["r"][:4])
    resumed = _with_inputs(loaded, GenerationRequest("r", request.prompt_ids, request.sampling, sent), inputs)
    spelled_out = PromptInputs(
        positions_3P=torch.tensor([*(i // 2 for i in range(20)), *range(10, 14)]).expand(3, -1)
    )
    as_prompt = _with_inputs(loaded, GenerationRequest("r", (*request.prompt_ids, *sent)), spelled_out)
    assert torch.equal(as_prompt.logits["r"][0], whole.logits["r"][4])
    assert list(sent) + resumed.tokens["r"] == whole.tokens["r"]
    assert torch.equal(torch.stack(resumed.logits["r"]), torch.stack(whole.logits["r"][4:]))


def test_sequences_forked_from_one_prompt_equal_separate_ones(loaded: LoadedEngine) -> None:
    """The prompt's blocks are shared; only the block that is written to is copied."""
    backbone = loaded.engine.backbone
    prompt = _request("r", BLOCK_POSITIONS + 20).prompt_ids
    pool, allocator = KvPool(loaded.config, 6, loaded.dtype), BlockAllocator(6)

    def step(pool: KvPool, spans: list[Span], ids: list[int]) -> torch.Tensor:
        rows = tuple(sum(span.count for span in spans[: i + 1]) - 1 for i in range(len(spans)))
        positions = torch.cat([torch.arange(s.first, s.first + s.count) for s in spans]).expand(3, -1)
        return backbone.forward(StepBatch(tuple(spans), torch.tensor(ids), positions, rows), pool).logits_LV

    allocator.allocate("parent", len(prompt))
    step(pool, [Span(allocator.table("parent"), 0, len(prompt))], list(prompt))
    names, nexts = ["parent", "a", "b"], [5, 6, 7]
    for child in names[1:]:
        allocator.fork("parent", child)
    for name in names:
        allocator.extend(name, len(prompt) + 1)
        pool.copy(allocator.unshare(name, len(prompt), len(prompt) + 1))
    assert allocator.num_used == 4, "one shared block and a last one each"
    spans = [Span(allocator.table(name), len(prompt), 1) for name in names]
    forked = step(pool, spans, nexts)
    for index, token in enumerate(nexts):
        fresh = KvPool(loaded.config, 3, loaded.dtype)
        span = Span((2, 1), 0, len(prompt) + 1)
        assert torch.equal(step(fresh, [span], [*prompt, token])[0], forked[index])
    assert len(allocator.free("parent")) == 1, "the shared block is still held"
    allocator.check()


def test_hundreds_of_requests_leave_nothing_behind(loaded: LoadedEngine) -> None:
    engine = small_engine(loaded, 4, BatchLimits(max_running=4, admission_reserve=1), num_swap_blocks=2)
    for number in range(400):
        engine.submit(_request(f"r{number}", 1 + number % 5, 1 + number % 2))
        if number % 7 == 0:
            engine.cancel(f"r{number}")
        engine.step()
        engine.outcome = Outcome()
    _finish(engine)
    held = {name: value for name, value in vars(engine).items() if isinstance(value, dict | list | set)}
    assert not any(held.values()), held


def _beside_a_stream(
    loaded: LoadedEngine, num_blocks: int = 12, limits: BatchLimits | None = None, **swap: int
) -> RecordingEngine:
    """An engine with one stream that runs, whose prompts pause wherever they can."""
    engine = small_engine(loaded, num_blocks, limits, **swap)
    pause_prompts(engine)
    engine.submit(_request("stream", 5, 60))
    engine.step()
    return engine


def _only(outcome: Outcome, *names: str) -> Outcome:
    return Outcome({n: outcome.tokens[n] for n in names}, {n: outcome.logits[n] for n in names})


def test_stream_gets_a_token_in_every_step_beside_a_prompt_that_pauses(
    loaded: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits are those of each alone. 24 of 70 tokens are in a pass, which pauses before the second half of the layer
    without experts, which cannot pause in the middle with a library's products."""
    engine = _beside_a_stream(loaded)
    pause_prompts(engine, within_halves=False)

    def is_divisible(layer: Layer, half: Half) -> bool:
        return half == "attention" or layer.moe is not None

    monkeypatch.setattr(engine.backbone.arithmetic, "is_divisible", is_divisible)
    prompt = _request("prompt", 70, 5)
    engine.submit(prompt)
    steps = 0
    while "prompt" not in engine.outcome.tokens:
        before = len(engine.outcome.tokens["stream"])
        engine.step()
        steps += 1
        assert len(engine.outcome.tokens["stream"]) == before + 1
    assert steps == 3 * 2
    _finish(engine)
    assert_same_bits(engine.outcome, _alone(loaded, _request("stream", 5, 60), prompt))


@pytest.mark.parametrize("has_stream", [False, True])
def test_short_prompts_overtake_a_long_one_with_the_bits_of_each_alone(
    loaded: LoadedEngine, has_stream: bool
) -> None:
    """Twice: one that comes while the long one's pass is on its way, and one more while that is."""
    engine = _beside_a_stream(loaded) if has_stream else small_engine(loaded, 12)
    pause_prompts(engine, overtaking=12)
    requests = [_request("long", 90, 4), _request("short", 9, 5), _request("shortest", 7, 3)]
    for request in requests:
        engine.submit(request)
        engine.step()
    while "long" not in engine.outcome.tokens:
        assert len(list(engine._passes)) <= 2
        engine.step()
    assert all(len(engine.outcome.tokens[name]) > 1 for name in ("short", "shortest"))
    streams = [_request("stream", 5, 60)] if has_stream else []
    assert_same_bits(_finish(engine), _alone(loaded, *streams, *requests))


def test_short_prompts_without_end_let_the_pass_that_they_overtake_go_on(loaded: LoadedEngine) -> None:
    class Fair(SmallestPace):
        def most_overtaking(self, num_rows: int, layers_left: int, overtaken_s: float = 0.0) -> int:
            return 0 if overtaken_s > 0 else 12

    engine = small_engine(loaded, 12)
    pause_prompts(engine, overtaking=12)
    engine.pace = Fair(loaded.config.num_layers)
    engine.submit(_request("long", 20, 1))
    engine.step()
    for number in range(300):
        engine.submit(_request(f"short {number}", 9, 1))
        engine.step()
        if "long" in engine.outcome.tokens:
            break
    assert len(engine.outcome.tokens) > 1 and len(engine.outcome.tokens["long"]) == 1


def test_prompt_that_is_no_shorter_waits_for_the_pass(loaded: LoadedEngine) -> None:
    engine = small_engine(loaded, 12)
    pause_prompts(engine, overtaking=12)
    requests = [_request("first", 20, 2), _request("second", 13, 2)]
    for request in requests:
        engine.submit(request)
        engine.step()
    while "first" not in engine.outcome.tokens:
        assert "second" not in engine.outcome.tokens
        engine.step()
    assert_same_bits(_finish(engine), _alone(loaded, *requests))


def test_overtaken_pass_may_lose_its_request(loaded: LoadedEngine) -> None:
    engine = _beside_a_stream(loaded)
    pause_prompts(engine, overtaking=12)
    used = engine.allocator.num_used
    for name, length in (("long", 90), ("short", 9)):
        engine.submit(_request(name, length, 3))
        engine.step()
    assert [step.num_tokens for step in engine._passes] == [24, 9]
    engine.cancel("long")
    assert [step.num_tokens for step in engine._passes] == [9]
    outcome = _finish(engine)
    assert engine.allocator.num_used == 0 < used
    assert_same_bits(outcome, _alone(loaded, _request("stream", 5, 60), _request("short", 9, 3)))


def test_long_prompt_alone_goes_on_until_somebody_comes(loaded: LoadedEngine) -> None:
    engine = small_engine(loaded, 12)
    pause_prompts(engine)
    engine.submit(_request("prompt", 20, 1))
    engine.is_called = lambda: True
    engine.step()
    (step,) = engine._passes
    assert step.forward.num_done == 0 and step.forward.is_in_layer, "half a layer, since none was timed"
    engine.is_called = lambda: False
    engine.step()
    assert not engine._passes and len(engine.outcome.tokens["prompt"]) == 1


def test_pass_ends_at_once_when_its_streams_have_ended(loaded: LoadedEngine) -> None:
    engine = _beside_a_stream(loaded)
    engine.submit(_request("prompt", 20, 2))
    engine.step()
    engine.cancel("stream")
    engine.step()
    assert len(engine.outcome.tokens["prompt"]) == 1
    assert_same_bits(_only(_finish(engine), "prompt"), _alone(loaded, _request("prompt", 20, 2)))


def test_request_cancelled_in_a_pass_keeps_its_blocks_to_the_pass_s_end(loaded: LoadedEngine) -> None:
    """The pass still writes to them: whoever got them at once would find another's keys."""
    engine = _beside_a_stream(loaded, 4, BatchLimits(admission_reserve=1))
    engine.submit(_request("victim", 20, 4))
    engine.submit(_request("stays", 12, 4))
    engine.step()
    used = engine.allocator.num_used
    assert engine.cancel("victim") and not engine.allocator.holds("victim")
    assert engine.allocator.num_used == used
    engine.submit(_request("victim", 30, 4))  # its name may be used again
    outcome = _finish(engine)
    expected = _alone(loaded, _request("stream", 5, 60), _request("stays", 12, 4), _request("victim", 30, 4))
    assert_same_bits(outcome, expected)


def test_pass_whose_requests_are_all_cancelled_frees_at_once(loaded: LoadedEngine) -> None:
    engine = _beside_a_stream(loaded)
    used = engine.allocator.num_used
    engine.submit(_request("a", 8))
    engine.submit(_request("b", 8))
    engine.step()
    for name in ("a", "b"):
        engine.cancel(name)
    assert engine.allocator.num_used == used
    outcome = _finish(engine)
    assert_same_bits(outcome, _alone(loaded, _request("stream", 5, 60)))


def test_preempted_request_in_a_pass_begins_it_again(loaded: LoadedEngine) -> None:
    engine = small_engine(loaded, 3, BatchLimits(admission_reserve=1), num_swap_blocks=2)
    pause_prompts(engine)
    stream, prompt = _request("stream", BLOCK_POSITIONS - 2, 60), _request("prompt", BLOCK_POSITIONS + 40, 5)
    engine.submit(stream)
    engine.step()
    engine.submit(prompt)
    outcome = _finish(engine)
    assert engine.stats.preemptions == 1
    assert_same_bits(outcome, _alone(loaded, stream, prompt))


def test_expert_error_in_a_pass_leaves_the_streams_alone(loaded: LoadedEngine) -> None:
    engine = _beside_a_stream(loaded)
    pause_prompts(engine, within_halves=False)
    engine.submit(_request("prompt", 20))
    _faulty(loaded).calls_to_failure = len(loaded.config.moe_layers) + 1  # the first after the stream's
    reasons: dict[str, str | None] = {}
    while not reasons:
        reasons = {e.request_id: e.finish_reason for e in engine.step() if e.finish_reason is not None}
    assert reasons == {"prompt": "error"}
    outcome = _finish(engine)
    assert_same_bits(_only(outcome, "stream"), _alone(loaded, _request("stream", 5, 60)))


def test_prompt_with_inputs_may_pause(loaded: LoadedEngine) -> None:
    seen = torch.full((30, WIDTH), float("nan"))

    def keep(layer: int, first: int, hidden: torch.Tensor) -> None:
        seen[first : first + len(hidden)] = hidden

    inputs = PromptInputs(
        injections={0: (InputRows(3, torch.ones(1, WIDTH)),)}, capture_layers=(2,), on_capture=keep
    )
    engine = _beside_a_stream(loaded)
    engine.submit(_request("r", 28, 3), inputs)
    outcome = _only(_finish(engine), "r")
    paused = seen.clone()
    whole = _with_inputs(loaded, _request("r", 28, 3), inputs)
    assert_same_bits(outcome, whole)
    assert torch.equal(paused, seen) and not seen.isnan().any()


def test_long_prompt_computes_with_the_threads_of_prompts_and_the_same_bits(
    loaded: LoadedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loaded.kernel.product != "native":
        pytest.skip("a library's products are proven with the usual number of threads only")
    threads: set[tuple[bool, int]] = set()
    run = FaultyDirectory.run

    def watched(self: FaultyDirectory, call: ExpertCall) -> torch.Tensor:
        threads.add((len(call.tokens_TD) >= MANY_ROWS, torch.get_num_threads()))
        return run(self, call)

    request = _request("long", MANY_ROWS + 40)
    before = torch.get_num_threads()
    in_chunks = run_to_end(small_engine(loaded, 8, BatchLimits(max_batch_tokens=50)), [request])
    monkeypatch.setattr(FaultyDirectory, "run", watched)
    monkeypatch.setattr(loaded.engine.backbone.arithmetic, "prompt_threads", before + 1)
    whole = run_to_end(small_engine(loaded, 8), [request])
    assert_same_bits(whole, in_chunks)
    assert threads == {(True, before + 1), (False, before)}
    assert torch.get_num_threads() == before
