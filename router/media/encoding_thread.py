"""Encodes the media of requests in a thread of its own, one request after another, beside the engine's. Owners take
turns.

Called by `router.engine_thread`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from router.errors import MediaFailed, MediaUnwanted, RouterError
from router.media.encoder import MediaEncoder
from router.owner_queue import OwnerQueue
from router.prompt_inputs import PromptInputs
from router.request import GenerationRequest
from router.side_thread import SideThread

logger = logging.getLogger(__name__)

ROOM_INTERVAL_S = 0.02
"""Between two questions whether there is room; shorter than a prompt with an image takes."""

Encoded = Callable[[GenerationRequest, PromptInputs | RouterError], None]
"""Told of every request that was still wanted: what the engine is to be given, or why there is nothing."""


class EncodingThread:
    """Runs an encoder from `start` to `stop`."""

    def __init__(
        self,
        encoder: MediaEncoder,
        is_wanted: Callable[[str], bool],
        has_room: Callable[[], bool],
        on_encoded: Encoded,
    ) -> None:
        """is_wanted: whether a request, by its id, was not cancelled. has_room: whether another one may be encoded now,
        asked until it is. All three are called on this thread."""
        self._encoder, self._on_encoded = encoder, on_encoded
        self._is_wanted, self._has_room = is_wanted, has_room
        self._is_stopping = threading.Event()
        self._requests = OwnerQueue[GenerationRequest]()
        self._thread = SideThread(self._run, "media")

    def start(self) -> None:
        """Before threads that compute, as `SideThread.start`."""
        self._thread.start()

    def stop(self) -> None:
        """End after the request in progress."""
        self._is_stopping.set()
        self._requests.close()
        self._thread.join()

    def submit(self, request: GenerationRequest) -> None:
        self._requests.put(request.owner, request)

    def _run(self) -> None:
        while self._serve(self._requests.get()):  # which holds no request while it waits for another
            pass

    def _serve(self, request: GenerationRequest | None) -> bool:
        """False where it was the last."""
        if request is None:
            return False
        while not self._has_room() and not self._is_stopping.wait(ROOM_INTERVAL_S):
            pass
        if self._is_wanted(request.request_id):
            with suppress(MediaUnwanted):
                self._on_encoded(request, self._encode(request))
        return True

    def _encode(self, request: GenerationRequest) -> PromptInputs | RouterError:
        try:
            return self._encoder.inputs_for(request, partial(self._is_wanted, request.request_id))
        except MediaUnwanted:
            raise
        except RouterError as error:
            return error
        except Exception as error:  # whatever it is, it ends one request and not this thread
            # What stands in it, an allocator's words or a file's place, is for the log.
            logger.exception("request %s: its media cannot be encoded", request.request_id)
            return MediaFailed(type(error).__name__)
