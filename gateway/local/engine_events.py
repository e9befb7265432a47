"""Events of one request at an engine's thread in this process. Called by `gateway.local.speech` and
`gateway.chat.local`."""

from __future__ import annotations

import queue
from collections.abc import Generator, Sequence

from gateway.errors import GenerationFailed
from router.engine_thread import EngineThread
from router.request import GenerationRequest, TokenEvent

Events = queue.SimpleQueue[Sequence[TokenEvent]]
"""That the thread puts in, and nobody else takes."""


def events_of(
    thread: EngineThread, events: Events, request: GenerationRequest
) -> Generator[TokenEvent, None, None]:
    """Until one with a finish reason. Closing the generator ends the work.

    Raises GenerationFailed, or what the thread raises for a request that it does not take.
    """
    thread.submit(request)
    is_done = False
    try:
        while not is_done:
            for event in events.get():
                if event.request_id != request.request_id:
                    continue  # of an answer that was stopped
                is_done = event.finish_reason is not None
                if event.finish_reason == "error":
                    raise GenerationFailed(event.error or "the engine gave no reason")
                yield event
    finally:
        if not is_done:
            thread.cancel(request.request_id)
