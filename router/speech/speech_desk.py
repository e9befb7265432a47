"""Requests for speech on their way: which of them the engine computes hidden states for first, and which are spoken.

Owns the thread that speaks. Used by `router.engine_thread`; unless said otherwise, on its thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from router.prompt_inputs import PromptInputs
from router.request import GenerationRequest, TokenEvent
from router.speech.speech_source import SpeechSource
from router.speech.speech_thread import SpeechThread
from router.speech.states import KeptStates, StatesCapture


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

    @property
    def num_spoken(self) -> int:
        """Open requests that ask nothing of the engine (any more). On any thread."""
        return len(self._spoken)

    def check(self, request: GenerationRequest) -> StatesCapture:
        """Which states it needs. On any thread. Raises PromptInvalid."""
        return StatesCapture(self._source.facts, request, self._source.check(request), self._kept)

    def take(self, request: GenerationRequest, capture: StatesCapture) -> bool:
        """Whether the engine has to compute states for it. On any thread."""
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
        self._spoken.difference_update(request_ids)

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
