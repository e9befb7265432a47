"""Requests for speech on their way: which of them the engine computes hidden states for first, and which are spoken.

Owns the thread that speaks. Used by `router.engine_thread`; unless said otherwise, on its thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from router.errors import QueueFull
from router.prompt_inputs import PromptInputs
from router.request import GenerationRequest, TokenEvent
from router.speech.speech_source import SpeechSource
from router.speech.speech_thread import SpeechThread
from router.speech.states import MOST_OPEN_BYTES, KeptStates, StatesCapture

RETRY_AFTER_S = 2.0


class SpeechDesk:
    """`take` announces a request; it goes through the engine where that says so, and is spoken, under its own id."""

    def __init__(
        self,
        source: SpeechSource,
        sink: Callable[[Sequence[TokenEvent]], None],
        num_doubts: Callable[[], int],
    ) -> None:
        """sink: called on the thread that speaks. num_doubts: see `KeptStates`."""
        self._source = source
        self.thread = SpeechThread(source, sink)
        self._kept = KeptStates(num_doubts)
        self._captures: dict[str, tuple[GenerationRequest, StatesCapture]] = {}
        """Of requests whose states are not all computed yet."""
        self._spoken: set[str] = set()
        self._state_bytes: dict[str, int] = {}
        """Of open requests, what their states take or will take."""

    @property
    def num_spoken(self) -> int:
        """Open requests that ask nothing of the engine (any more). On any thread."""
        return len(self._spoken)

    def check(self, request: GenerationRequest) -> StatesCapture:
        """Which states it needs. On any thread. Raises PromptInvalid; QueueFull where others have too many."""
        capture = StatesCapture(self._source.facts, request, self._source.check(request), self._kept)
        held, wanted = tuple(self._state_bytes.values()), self._bytes_of(capture)
        if wanted and held and sum(held) + wanted > MOST_OPEN_BYTES:
            raise QueueFull(len(held), RETRY_AFTER_S)
        return capture

    def take(self, request: GenerationRequest, capture: StatesCapture) -> bool:
        """Whether the engine has to compute states for it. On any thread."""
        if wanted := self._bytes_of(capture):
            self._state_bytes[request.request_id] = wanted
        if capture.is_needed:
            self._captures[request.request_id] = request, capture
        else:
            self._speak(request, capture)
        return capture.is_needed

    def asked(
        self, request: GenerationRequest, inputs: PromptInputs
    ) -> tuple[GenerationRequest, PromptInputs]:
        """What the engine is to compute. inputs: of the request's whole prompt."""
        entry = self._captures.get(request.request_id)
        return (request, inputs) if entry is None else entry[1].request(inputs)

    def divert(self, events: Sequence[TokenEvent]) -> list[TokenEvent]:
        """The engine's events without those of requests whose states it computes; what ends well is spoken now."""
        return [event for event in events if not self._is_diverted(event)]

    def cancel(self, request_id: str) -> None:
        """End a speech; unknown ids are ignored. On any thread."""
        self.thread.cancel(request_id)

    def forget(self, request_ids: Iterable[str]) -> None:
        """These have ended; unknown ids are ignored. On any thread."""
        ended = tuple(request_ids)
        self._spoken.difference_update(ended)
        for name in ended:
            self._state_bytes.pop(name, None)

    def _bytes_of(self, capture: StatesCapture) -> int:
        source = self._source
        return capture.num_states * source.thinker_VD.shape[1] * source.dtype.itemsize

    def _is_diverted(self, event: TokenEvent) -> bool:
        entry = self._captures.get(event.request_id)
        if entry is None:
            return False
        if event.finish_reason is None:
            return True
        del self._captures[event.request_id]
        if event.finish_reason != "length":  # it failed, or was cancelled
            return False
        request, capture = entry
        if not event.is_mixed:
            capture.keep()
        self._speak(request, capture)
        return True

    def _speak(self, request: GenerationRequest, capture: StatesCapture) -> None:
        self._spoken.add(request.request_id)
        self.thread.submit(request, capture.states())
