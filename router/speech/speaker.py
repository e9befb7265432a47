"""Speaks: the talker and its code predictor, a frame for each of several speeches a step.

Like the engine of the text, it knows nothing of threads, HTTP or Ray; a speech's codes depend on nothing but its
request (docs/exactness.md): not on others beside it, on the budget of the talker's experts, on how its prompt was cut,
or on where it was resumed. What frames sound like is `router.speech.vocoder`'s. Not safe for several threads.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from experts.errors import ExpertError
from router.errors import RequestTooLong
from router.kv_cache import BlockAllocator, KvPool, blocks_for
from router.media.facts import ImageFacts
from router.prompt_inputs import InputRows
from router.request import FinishReason, GenerationRequest
from router.speech.drawing import draw_first, draw_other, is_finite
from router.speech.facts import SpeechFacts
from router.speech.inputs import TalkerInputs, check_speech, check_states, speech_positions
from router.speech.parts import SpeechParts
from router.speech.speech import Frame, Speech
from router.speech.wish import NUM_CODES
from router.step_batch import Span, StepBatch

logger = logging.getLogger(__name__)

EXPERT_FAILED = "an expert could not be computed"
NOT_FINITE = "the model produced non-finite numbers"


@dataclass(frozen=True)
class SpeakerLimits:
    """How much is computed and held at a time. Changes speed only."""

    most_running: int = 8
    """Speeches that get a frame a step; the others wait for their turn."""
    prompt_rows: int = 256
    """Of prompts, computed in one step beside the frames of others."""


@dataclass(frozen=True)
class Spoken:
    """What a step gave one speech: a frame, the end, or both."""

    request_id: str
    frame: Frame = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    """Safe to show to a client. Set only when `finish_reason` is "error"."""


@dataclass
class SpeakerStats:
    """Counters since the start."""

    steps: int = 0
    frames: int = 0
    prompt_rows: int = 0
    preemptions: int = 0
    failed: int = 0
    phase_seconds: dict[str, float] = field(default_factory=lambda: {"talker": 0.0, "code_predictor": 0.0})


class Speaker:
    """Runs steps over the talker and its cache."""

    def __init__(
        self,
        facts: SpeechFacts,
        parts: SpeechParts,
        pool: KvPool,
        limits: SpeakerLimits,
        images: ImageFacts | None = None,
    ) -> None:
        """Use `router.speech.opening.open_speaker`. images: how they are cut, where the model sees."""
        self.facts, self.parts, self.pool = facts, parts, pool
        self.limits = limits
        self.stats = SpeakerStats()
        self.allocator = BlockAllocator(pool.keys.shape[1])
        self._images = images
        self._waiting: OrderedDict[str, Speech] = OrderedDict()
        self._running: OrderedDict[str, Speech] = OrderedDict()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def most_positions(self) -> int:
        """Of one speech, its prompt and frames together."""
        capacity = (self.allocator.num_blocks - 1) * self.pool.keys.shape[3]
        return min(self.parts.talker.config.max_position_embeddings, capacity)

    def add(self, request: GenerationRequest, hidden_HD: Tensor | None = None) -> None:
        """Queue a request for speech. hidden_HD: states of the text's decoder after `facts.accept_layer` layers at
        `TalkerPrompt.media_indices`, in order; needed where there are any. Behind a long prompt there may be room for
        fewer frames than are asked for; such a speech ends by its length there.

        Raises PromptInvalid, RequestTooLong where there is no room for one; ValueError for a used id.
        """
        if request.request_id in self._waiting or request.request_id in self._running:
            raise ValueError(f"request id {request.request_id!r} is in use")
        prompt = check_speech(self.facts, request, self.parts.thinker_VD.shape[0])
        check_states(prompt, hidden_HD)
        room = self.most_positions - prompt.num_positions
        num_frames = len(request.generated_ids) // NUM_CODES
        if room <= num_frames:  # it would wait for ever, and all behind it
            raise RequestTooLong(prompt.num_positions + num_frames + 1, self.most_positions)
        sampling = replace(request.sampling, max_tokens=min(request.sampling.max_tokens, room))
        request = replace(request, sampling=sampling)
        inputs = TalkerInputs(self.parts, prompt, request.prompt_ids, hidden_HD)
        speech = Speech(request, inputs, speech_positions(request, prompt, self._images))
        self._waiting[speech.name] = speech

    def close(self) -> None:
        self.parts.close()

    def remove(self, request_id: str) -> bool:
        """End a speech. Returns False when it is not known (any more)."""
        if self._waiting.pop(request_id, None) is not None:
            return True
        speech = self._running.get(request_id)
        if speech is None:
            return False
        self._free(speech)
        return True

    @torch.inference_mode()
    def step(self) -> list[Spoken]:
        """Compute the next frame of every running speech whose prompt is done, and some rows of other prompts."""
        self._admit()
        chunks = self._plan()
        if not chunks:
            return []
        self.stats.steps += 1
        started = time.perf_counter()
        try:
            done, logits_LV, hidden_LD = self._talk(chunks)
        except ExpertError as error:
            logger.error("%d speeches end: %s", len(chunks), error)
            return [self._fail(speech, EXPERT_FAILED) for speech, _ in chunks]
        talked = time.perf_counter()
        self.stats.phase_seconds["talker"] += talked - started
        events = self._draw(done, logits_LV, hidden_LD) if done else []
        self.stats.phase_seconds["code_predictor"] += time.perf_counter() - talked
        return events

    def _admit(self) -> None:
        """In the order in which they came, those for whose known positions and one block more there is room."""
        while self._waiting and len(self._running) < self.limits.most_running:
            speech = next(iter(self._waiting.values()))
            needed = blocks_for(speech.num_known)
            if needed + (1 if self._running else 0) > self.allocator.num_free:
                return
            self.allocator.allocate(speech.name, speech.num_known)
            self._running[speech.name] = self._waiting.pop(speech.name)

    def _plan(self) -> list[tuple[Speech, int]]:
        """Who computes how many rows, oldest first; room for them is made."""
        chunks: list[tuple[Speech, int]] = []
        left = self.limits.prompt_rows
        for speech in tuple(self._running.values()):
            missing = speech.num_missing
            count = 1 if missing == 1 else min(missing, left)
            if count and speech.name in self._running and self._make_room(speech, count):
                left -= count if missing > 1 else 0
                chunks.append((speech, count))
        return chunks

    def _make_room(self, speech: Speech, count: int) -> bool:
        """Cover the next positions, at the cost of the youngest. False where that is the speech itself."""
        end = speech.num_computed + count
        while self.allocator.missing(speech.name, end) > self.allocator.num_free:
            youngest = next(reversed(self._running.values()))
            self._preempt(youngest)
            if youngest is speech:
                return False
        self.allocator.extend(speech.name, end)
        return True

    def _preempt(self, speech: Speech) -> None:
        """Its frames are computed again when there is room: they follow from what is known."""
        self._free(speech)
        speech.begin_anew()
        self._waiting[speech.name] = speech
        self._waiting.move_to_end(speech.name, last=False)
        self.stats.preemptions += 1

    def _talk(self, chunks: Sequence[tuple[Speech, int]]) -> tuple[list[Speech], Tensor, Tensor]:
        """One pass of the talker. Returns the speeches that a frame can be drawn for, and of each its logits and its
        last hidden state, normed."""
        talker = self.parts.talker
        done = [speech for speech, count in chunks if count == speech.num_missing]
        output = talker.forward(self._batch(chunks), self.pool)
        for speech, count in chunks:
            self.stats.prompt_rows += speech.advance(count)
        hidden_LD = output.scored_RD
        return done, output.logits_LV, talker.arithmetic.norm(hidden_LD, talker.norm_D) if done else hidden_LD

    def _batch(self, chunks: Sequence[tuple[Speech, int]]) -> StepBatch:
        """Every row has inputs of its own in place of a token's embedding."""
        spans, rows, positions = [], [], []
        last_rows: list[int] = []
        num_rows = 0
        for speech, count in chunks:
            first = speech.num_computed
            spans.append(Span(self.allocator.table(speech.name), first, count))
            rows.append(self._inputs(speech, first, count))
            positions.append(speech.positions(first, count))
            num_rows += count
            if count == speech.num_missing:
                last_rows.append(num_rows - 1)
        return StepBatch(
            tuple(spans),
            torch.zeros(num_rows, dtype=torch.int64),
            torch.cat(positions, dim=1),
            tuple(last_rows),
            (InputRows(0, torch.cat(rows)),),
            trace=chunks[0][0].name[:64],
            scored_rows=tuple(last_rows),
        )

    def _inputs(self, speech: Speech, first: int, count: int) -> Tensor:
        """(count, D) of the talker's positions from `first` on."""
        prompt_RD, numbers = speech.inputs.prompt(first, count), speech.frames_at(first, count)
        if not numbers:
            return prompt_RD
        frames = speech.frames[numbers.start : numbers.stop]
        return torch.cat((prompt_RD, self.parts.embed_frames(frames) + speech.inputs.beside(numbers)))

    def _draw(self, done: Sequence[Speech], logits_LV: Tensor, hidden_LD: Tensor) -> list[Spoken]:
        """The next frame of each, or its end."""
        events: list[Spoken] = []
        rows: list[int] = []
        firsts: list[int] = []
        for row, speech in enumerate(done):
            if not is_finite(logits_LV[row]):
                events.append(self._fail(speech, NOT_FINITE))
                continue
            sampling, number = speech.request.sampling, len(speech.frames)
            code = draw_first(logits_LV[row], sampling, speech.history, self.facts.codec, number)
            if code == self.facts.codec.end:
                self.remove(speech.name)
                events.append(Spoken(speech.name, (), "stop"))
            else:
                rows.append(row)
                firsts.append(code)
        if rows:
            speaking = [done[row] for row in rows]
            events += self._complete(speaking, firsts, hidden_LD[rows])
        return events

    def _complete(self, speaking: Sequence[Speech], firsts: Sequence[int], hidden_BD: Tensor) -> list[Spoken]:
        """Draw the rest of the frames that begin with these codes."""
        failed: set[int] = set()

        def draw_code(row: int, number: int, logits_V: Tensor) -> int:
            if not is_finite(logits_V):
                failed.add(row)
                return 0
            speech = speaking[row]
            return draw_other(logits_V, speech.request.sampling, len(speech.frames), number)

        first_BD = self.parts.talker.embeddings_VD[torch.tensor(firsts)]
        others = self.parts.predictor.draw(hidden_BD, first_BD, draw_code)
        if failed:
            self.parts.predictor.scrub()
        events = []
        for row, (speech, first) in enumerate(zip(speaking, firsts, strict=True)):
            if row in failed:
                events.append(self._fail(speech, NOT_FINITE))
            else:
                events.append(self._say(speech, (first, *others[row])))
        return events

    def _say(self, speech: Speech, frame: Frame) -> Spoken:
        assert len(frame) == NUM_CODES
        speech.append(frame)
        self.stats.frames += 1
        if not speech.is_complete:
            return Spoken(speech.name, frame)
        self.remove(speech.name)
        return Spoken(speech.name, frame, "length")

    def _fail(self, speech: Speech, message: str) -> Spoken:
        logger.error("speech %s: %s", speech.name, message)
        self._free(speech, must_scrub=True)
        self.stats.failed += 1
        return Spoken(speech.name, (), "error", message)

    def _free(self, speech: Speech, *, must_scrub: bool = False) -> None:
        """Take a running one's blocks; those that may hold numbers that are not finite are cleared."""
        del self._running[speech.name]
        freed = self.allocator.free(speech.name)
        if must_scrub or not speech.has_drawn:
            self.pool.scrub(freed)
