"""Speaks replies in a thread of its own, several at a time, beside the engine's thread.

What speaks is read when the first speech is asked for; until it is there, speeches wait. Called by
`router.engine_thread`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from router.errors import RouterError, SpeechFailed
from router.request import GenerationRequest, TokenEvent
from router.side_thread import SideThread
from router.speech.speech_engine import SpeechEngine
from router.speech.speech_source import SpeechSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Submit:
    request: GenerationRequest
    hidden_HD: Tensor | None


@dataclass(frozen=True)
class _Cancel:
    request_id: str


@dataclass(frozen=True)
class SpeechStatus:
    """Plain numbers for status and metrics; counters begin anew when what speaks is read again."""

    is_loaded: bool
    resident_bytes: int
    """Weights, experts, keys and values."""
    running: int
    waiting: int
    frames: int
    samples: int
    failed: int
    seconds: dict[str, float]
    """By phase: talker, code_predictor, sound."""


class SpeechThread:
    """Runs a speech engine from `start` to `stop`."""

    def __init__(self, source: SpeechSource, sink: Callable[[Sequence[TokenEvent]], None]) -> None:
        """sink: called on this thread."""
        self.source, self._sink = source, sink
        self._engine: SpeechEngine | None = None
        self._commands: queue.SimpleQueue[_Submit | _Cancel | None] = queue.SimpleQueue()
        self._thread = SideThread(self._run, "speech")
        self._is_stopping = threading.Event()
        self._is_loading = False
        self._is_reading = True
        """Whether there may be experts to read before anybody asks for them."""
        self._progressed_at = time.monotonic()

    def start(self) -> None:
        """Before threads that compute, as `SideThread.start`."""
        self._thread.start()

    def stop(self) -> None:
        """End after the step in progress, or what is being read; speeches that are not done get no further event."""
        self._is_stopping.set()
        self._commands.put(None)
        self._thread.join()

    def submit(self, request: GenerationRequest, hidden_HD: Tensor | None = None) -> None:
        """Queue a speech that `SpeechSource.check` has let pass; its events go to the sink. hidden_HD: see
        `Speaker.add`."""
        self._commands.put(_Submit(request, hidden_HD))

    def cancel(self, request_id: str) -> None:
        """End a speech before the next step; unknown ids are ignored."""
        self._commands.put(_Cancel(request_id))

    @property
    def stalled_s(self) -> float:
        """Seconds since a step or a layer was done; 0 where there is nothing to do, or weights are being read."""
        engine = self._engine
        if engine is None or not engine.has_work or self._is_loading:
            return 0.0
        return time.monotonic() - max(self._progressed_at, engine.progressed_at)

    def status(self) -> SpeechStatus:
        """On any thread."""
        engine = self._engine
        if engine is None:
            return SpeechStatus(False, 0, 0, 0, 0, 0, 0, {})
        speaker, stats = engine.speaker, engine.speaker.stats
        return SpeechStatus(
            True,
            engine.nbytes,
            speaker.num_running,
            speaker.num_waiting,
            stats.frames,
            engine.stats.samples,
            engine.stats.failed,
            {**stats.phase_seconds, "sound": engine.stats.seconds},
        )

    def _run(self) -> None:
        while self._drain():
            self._step()
        self._close()

    def _drain(self) -> bool:
        """Carry out waiting commands; while there is no work, read what the next speech will need, then wait. False
        where told to stop."""
        while True:
            engine = self._engine
            try:
                command = self._commands.get(
                    block=engine is None or not (engine.has_work or self._is_reading)
                )
            except queue.Empty:
                assert engine is not None
                if engine.has_work:
                    return True
                self._is_reading = engine.load_more()
                continue
            if command is None or self._is_stopping.is_set():  # nothing is read for who waits in between
                return False
            self._carry_out(command)

    def _carry_out(self, command: _Submit | _Cancel) -> None:
        """Apart, so that no request is held while there is no other."""
        if isinstance(command, _Submit):
            self._add(command.request, command.hidden_HD)
        elif self._engine is not None and self._engine.remove(command.request_id):
            self._sink([TokenEvent(command.request_id, (), "cancelled")])

    def _add(self, request: GenerationRequest, hidden_HD: Tensor | None) -> None:
        try:
            engine = self._engine = self._engine or self._load()
            if not engine.has_work:
                self._progressed_at = time.monotonic()
            engine.add(request, hidden_HD)
        except (RouterError, ValueError) as error:
            self._sink([TokenEvent(request.request_id, (), "error", str(error))])
        except Exception as error:  # whatever it is, it ends one request and not this thread
            # What stands in it, an allocator's words or a file's place, is for the log.
            logger.exception("request %s: its reply cannot be spoken", request.request_id)
            failed = SpeechFailed(type(error).__name__)
            self._sink([TokenEvent(request.request_id, (), "error", str(failed))])

    def _load(self) -> SpeechEngine:
        self._is_loading = self._is_reading = True
        started = time.monotonic()
        try:
            engine = self.source.open()
        finally:
            self._is_loading = False
        logger.info("ready to speak after %.1f s, %d bytes", time.monotonic() - started, engine.nbytes)
        return engine

    def _step(self) -> None:
        assert self._engine is not None
        try:
            events = self._engine.step()
        except Exception:  # the last line of defence: what speaks is read again for whoever comes next
            logger.exception("speeches failed")
            events = [
                TokenEvent(name, (), "error", "the reply could not be spoken", is_resumable=True)
                for name in self._engine.open_requests
            ]
            self._close()
        self._progressed_at = time.monotonic()
        if events:
            self._sink(events)

    def _close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
