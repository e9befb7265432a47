"""Compiles requests' grammars in a thread of its own, one after another, beside the engine's. Owners take turns.

Called by `router.engine_thread`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from router.errors import GrammarFailed, RouterError
from router.grammar import GrammarState
from router.owner_queue import OwnerQueue
from router.prompt_inputs import PromptInputs
from router.request import GenerationRequest

logger = logging.getLogger(__name__)

Begin = Callable[[GenerationRequest], GrammarState | None]
"""Compiles. Raises RouterError."""
Compiled = Callable[[GenerationRequest, PromptInputs | RouterError, GrammarState | None], None]
"""Told of every request: its inputs and its grammar, or why there is none. One that is no longer wanted has none."""


class GrammarThread:
    """Runs from `start` to `stop`."""

    def __init__(self, begin: Begin, is_wanted: Callable[[str], bool], on_compiled: Compiled) -> None:
        """is_wanted: whether a request, by its id, was not cancelled. All three are called on this thread."""
        self._begin, self._is_wanted, self._on_compiled = begin, is_wanted, on_compiled
        self._requests = OwnerQueue[tuple[GenerationRequest, PromptInputs]]()
        self._thread = threading.Thread(target=self._run, name="grammars", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the request in progress."""
        self._requests.close()
        self._thread.join()

    def submit(self, request: GenerationRequest, inputs: PromptInputs) -> None:
        """inputs: what the engine is to be given beside the grammar."""
        self._requests.put(request.owner, (request, inputs))

    def _run(self) -> None:
        while (item := self._requests.get()) is not None:
            request, inputs = item
            self._on_compiled(request, *self._compile(request, inputs))
            del item, request, inputs  # which holds none while it waits for another

    def _compile(
        self, request: GenerationRequest, inputs: PromptInputs
    ) -> tuple[PromptInputs | RouterError, GrammarState | None]:
        if not self._is_wanted(request.request_id):
            return inputs, None
        try:
            return inputs, self._begin(request)
        except RouterError as error:
            return error, None
        except Exception:  # whatever it is, it ends one request and not this thread
            logger.exception("request %s: its grammar cannot be compiled", request.request_id)
            return GrammarFailed("it cannot be compiled"), None
