"""Runs an engine in a thread of its own and passes requests in and events out.

Nothing of Torch runs on the caller's thread. `submit` and `cancel` may be called from any thread; the sink is
called on the engine's thread, or on the one that speaks, and must return at once.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from router.engine import Engine
from router.errors import (
    EngineStopped,
    PromptInvalid,
    QueueFull,
    RequestTooLong,
    RouterError,
)
from router.grammar import GrammarState
from router.grammar_thread import GrammarThread
from router.media.encoder import MediaEncoder
from router.media.encoding_thread import EncodingThread
from router.prompt_inputs import NO_INPUTS, PromptInputs
from router.request import GenerationRequest, TokenEvent
from router.speech.speech_desk import SpeechDesk
from router.speech.speech_source import SpeechSource
from router.speech.speech_thread import SpeechStatus
from router.speech.states import StatesCapture

logger = logging.getLogger(__name__)

MOST_WAITING_WITH_MEDIA = 4
"""So many requests are encoded ahead of their turn: what stands for an image takes five times its pixels."""

Sink = Callable[[Sequence[TokenEvent]], None]


@dataclass(frozen=True)
class EngineHealth:
    """Facts for a readiness decision."""

    is_alive: bool
    has_work: bool
    seconds_since_step: float
    num_waiting: int
    num_running: int
    speech_stalled_s: float = 0.0
    """Since speeches last went on; 0 where there are none, or what speaks is being read."""


@dataclass(frozen=True)
class _Submit:
    request: GenerationRequest
    inputs: PromptInputs


@dataclass(frozen=True)
class _Prepared:
    """A request whose media were encoded and whose grammar was compiled, or why they were not."""

    request: GenerationRequest
    outcome: PromptInputs | RouterError
    grammar: GrammarState | None = None


@dataclass(frozen=True)
class _Cancel:
    request_id: str


class EngineThread:
    """Owns an engine from `start` to `stop`."""

    def __init__(
        self,
        engine: Engine,
        sink: Sink,
        encoder: MediaEncoder | None = None,
        speech: SpeechSource | None = None,
    ) -> None:
        """encoder: of requests with media; without one they are refused, and those for speech without `speech`."""
        self.engine = engine
        self._sink = sink
        self._commands: queue.SimpleQueue[_Submit | _Prepared | _Cancel | None] = queue.SimpleQueue()
        engine.is_called = lambda: not self._commands.empty()
        self._encoding: EncodingThread | None = None
        if encoder is not None:
            self._encoding = EncodingThread(encoder, self._is_preparing, self._has_room, self._take_encoded)
        self._speech: SpeechDesk | None = None
        if speech is not None:
            directory = engine.backbone.directory
            self._speech = SpeechDesk(speech, self._emit_spoken, lambda: directory.num_quarantined)
        self._grammars = GrammarThread(engine.begin_grammar, self._is_preparing, self._take_compiled)
        self._preparing: set[str] = set()
        """Open requests that wait for their media or their grammar."""
        self._encoded: set[str] = set()
        """Of these, those that the engine's thread will find next."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._open: set[str] = set()
        self._admission = threading.Lock()
        """Guards `_open` and `_failure`, so that no request slips in after the last have been told of a failure."""
        self._failure: str | None = None
        self._is_reading = True
        """Whether there may be experts to read before anybody asks for them."""
        self._busy_since = time.monotonic()

    def start(self) -> None:
        if self._encoding is not None:
            self._encoding.start()
        if self._speech is not None:
            self._speech.thread.start()
        self._grammars.start()
        self._thread.start()

    def stop(self) -> None:
        """End after the step in progress; requests that are not done get no further event."""
        with self._admission:
            self._failure = self._failure or "it was shut down"
        self._commands.put(None)
        self._thread.join()
        self._preparing.clear()
        if self._encoding is not None:
            self._encoding.stop()
        self._grammars.stop()
        if self._speech is not None:
            self._speech.thread.stop()

    @property
    def speech(self) -> SpeechStatus | None:
        """None where replies are not spoken."""
        return None if self._speech is None else self._speech.thread.status()

    @property
    def num_open(self) -> int:
        """Requests submitted and not ended."""
        return len(self._open)

    def submit(self, request: GenerationRequest, inputs: PromptInputs = NO_INPUTS) -> None:
        """Queue a request; its events go to the sink. One with media or a grammar joins the engine when these are
        encoded and compiled, one for speech is spoken beside it.

        Raises QueueFull, RequestTooLong, PromptInvalid or EngineStopped at once, on the caller's thread; ValueError for
        a used id.
        """
        if request.media and self._encoding is None:
            raise PromptInvalid("this router takes no images and no sound")
        capture = self._check(request)
        with self._admission:
            if self._failure is not None or not self._thread.is_alive():
                raise EngineStopped(self._failure or "it was not started")
            if request.request_id in self._open:
                raise ValueError(f"request id {request.request_id!r} is in use")
            if self.num_open >= self.engine.limits.max_open:
                raise QueueFull(self.num_open, retry_after_s=1.0)
            if not self._is_asked:
                self._busy_since = time.monotonic()
            self._open.add(request.request_id)
            if capture is not None and self._speech is not None and not self._speech.take(request, capture):
                return
            if request.media and self._encoding is not None:
                self._preparing.add(request.request_id)
                self._encoding.submit(request)
            elif request.sampling.grammar is not None:
                self._preparing.add(request.request_id)
                self._grammars.submit(request, inputs)
            else:
                self._commands.put(_Submit(request, inputs))

    def _check(self, request: GenerationRequest) -> StatesCapture | None:
        """On the caller's thread. A request for speech has bounds of its own."""
        if request.speech is None:
            total = len(request.prompt_ids) + request.sampling.max_tokens
            if total > self.engine.max_tokens_per_sequence:
                raise RequestTooLong(total, self.engine.max_tokens_per_sequence)
            return None
        if self._speech is None:
            raise PromptInvalid("this router does not speak")
        return self._speech.check(request)

    def cancel(self, request_id: str) -> None:
        """End a request before the next step; it gets a last event with reason "cancelled"."""
        if self._speech is not None:  # a speech at once, whatever the engine is computing
            self._speech.cancel(request_id)
        self._commands.put(_Cancel(request_id))

    @property
    def _is_asked(self) -> bool:
        """Whether the engine itself has something to do, now or next."""
        num_elsewhere = len(self._preparing) + (0 if self._speech is None else self._speech.num_spoken)
        return self.num_open > num_elsewhere

    def health(self) -> EngineHealth:
        engine, num_preparing, speech = self.engine, len(self._preparing), self._speech
        is_asked = self._is_asked  # before it is looked since when
        since = max(engine.stats.last_step_at, self._busy_since)
        return EngineHealth(
            self._thread.is_alive() and self._failure is None,
            is_asked,
            time.monotonic() - since,
            engine.num_waiting + num_preparing,
            engine.num_running,
            0.0 if speech is None else speech.thread.stalled_s,
        )

    def _run(self) -> None:
        try:
            while self._drain():
                self._emit(self.engine.step())
        except Exception as error:  # the last line of defence: report it, then refuse all work
            logger.exception("the engine failed")
            self._fail_all(type(error).__name__)

    def _drain(self) -> bool:
        """Carry out waiting commands; while there is no work, read what the first requests will ask for, then block.
        Returns False when told to stop."""
        while True:
            try:
                goes_on = self._carry_out(
                    self._commands.get(block=not (self.engine.has_work or self._is_reading))
                )
            except queue.Empty:
                if self.engine.has_work:
                    return True
                self._is_reading = self.engine.backbone.directory.load_more()
                continue
            if not goes_on:
                return False

    def _carry_out(self, command: _Submit | _Prepared | _Cancel | None) -> bool:
        """False where it was the last. Apart, so that no request is held while there is no other."""
        if command is None:
            return False
        if isinstance(command, _Submit):
            self._submit_now(command.request, command.inputs)
        elif isinstance(command, _Prepared):
            self._submit_prepared(command)
        elif self._end(command.request_id):
            self._emit([TokenEvent(command.request_id, (), "cancelled")])
        elif self._speech is not None:  # its states may have been computed meanwhile
            self._speech.cancel(command.request_id)
        return True

    def _submit_now(
        self, request: GenerationRequest, inputs: PromptInputs, grammar: GrammarState | None = None
    ) -> None:
        try:
            if self._speech is not None:
                request, inputs = self._speech.asked(request, inputs)
            self.engine.submit(request, inputs, grammar)
        except (RouterError, ValueError) as error:
            self._emit([TokenEvent(request.request_id, (), "error", str(error))])

    def _submit_prepared(self, command: _Prepared) -> None:
        name = command.request.request_id
        if name in self._preparing:  # it was not cancelled meanwhile
            if not self.engine.has_work:
                self._busy_since = time.monotonic()
            self._preparing.discard(name)
            if isinstance(command.outcome, RouterError):
                self._emit([TokenEvent(name, (), "error", str(command.outcome))])
            else:
                self._submit_now(command.request, command.outcome, command.grammar)
        self._encoded.discard(name)

    def _end(self, name: str) -> bool:
        """Whether it was there."""
        if name in self._preparing:
            self._preparing.discard(name)
            return True
        return self.engine.cancel(name)

    def _is_preparing(self, name: str) -> bool:
        """On the threads that encode and compile."""
        return name in self._preparing

    def _has_room(self) -> bool:
        """On the encoding thread, which a raised error would end."""
        try:
            return len(self._encoded) + self.engine.num_waiting_with_media < MOST_WAITING_WITH_MEDIA
        except RuntimeError:  # the queue changed while it was counted; it is asked again
            return False

    def _take_encoded(self, request: GenerationRequest, outcome: PromptInputs | RouterError) -> None:
        """On the encoding thread."""
        self._encoded.add(request.request_id)
        if isinstance(outcome, PromptInputs) and request.sampling.grammar is not None:
            self._grammars.submit(request, outcome)
        else:
            self._commands.put(_Prepared(request, outcome))

    def _take_compiled(
        self, request: GenerationRequest, outcome: PromptInputs | RouterError, grammar: GrammarState | None
    ) -> None:
        """On the thread for grammars."""
        self._commands.put(_Prepared(request, outcome, grammar))

    def _fail_all(self, failure: str) -> None:
        """Refuse all work from now on, and tell every open request, those still in the command queue too."""
        with self._admission:
            self._failure = failure
            names = sorted(self._open)
        if self._speech is not None:
            for name in names:
                self._speech.cancel(name)
        self._emit([TokenEvent(name, (), "error", "the engine failed", is_resumable=True) for name in names])

    def _emit_spoken(self, events: Sequence[TokenEvent]) -> None:
        """On the thread that speaks. Who was told of a failure of the engine hears no more."""
        self._tell([event for event in events if event.request_id in self._open])

    def _emit(self, events: Sequence[TokenEvent]) -> None:
        """On the engine's thread."""
        self._tell(events if self._speech is None else self._speech.divert(events))

    def _tell(self, events: Sequence[TokenEvent]) -> None:
        ended = [event.request_id for event in events if event.finish_reason is not None]
        if ended:
            with self._admission:  # in this order: what is spoken is never taken for the engine's
                self._open.difference_update(ended)
                if self._speech is not None:
                    self._speech.forget(ended)
        if events:
            self._sink(events)
