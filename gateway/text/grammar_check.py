"""Whether a grammar that a request brings can be followed, found out in a process of its own, with hard limits on time
and memory. See `gateway.text.grammar_process`, which runs there, and `gateway.text.confined`.

Called by `gateway.http.response_format` and `sage-moe generate` before a router hears of a grammar.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from weakref import WeakValueDictionary

from gateway.errors import GrammarRefused, LimitBroken, PreparationBusy
from gateway.text.confined import ConfinedProcess, Confinement
from router.grammar_limits import GRAMMAR_LIMITS

TASK = Path(__file__).with_name("grammar_process.py")
MOST_KNOWN = 256
WAIT_S = 8.0
"""For grammars that came before: a few owners' that each take all the time that one may."""


class GrammarChecker:
    """Starts its process when the first grammar comes. Safe to use from several threads."""

    def __init__(self, limits: Confinement | None = None) -> None:
        self.confined = ConfinedProcess(TASK, {"limits": GRAMMAR_LIMITS}, limits or Confinement())
        self._known: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()
        """Warnings of grammars that can be followed, by digest."""
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "grammars")
        """Of its own: those of the event loop prepare everybody's prompts."""
        self._turn = asyncio.Lock()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """By owner."""

    async def check_in_turn(
        self, owner: str, grammar: str, parts: Mapping[str, str] | None = None
    ) -> tuple[str, ...]:
        """`check` beside an event loop. Of one owner's grammars one at a time waits for those of others."""
        known = self._find(_digest(grammar))
        if known is not None:
            return known
        own_turn = self._turns.setdefault(owner, asyncio.Lock())
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(WAIT_S):
                    await held.enter_async_context(own_turn)
                    await held.enter_async_context(self._turn)
            except TimeoutError as error:
                raise PreparationBusy from error
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self.check, grammar, parts)

    def check(self, grammar: str, parts: Mapping[str, str] | None = None) -> tuple[str, ...]:
        """What of it will not be enforced, in the words of `llguidance`. grammar: text for it. parts: grammars of which
        it is made, by the name that an error is to give.

        Raises GrammarRefused with what is wrong, PreparationBusy where other requests' grammars took the time.
        """
        digest = _digest(grammar)
        known = self._find(digest)
        if known is not None:
            return known
        try:
            found = self.confined.ask({"grammar": grammar, "parts": dict(parts or {})})
        except LimitBroken as error:
            raise GrammarRefused("it takes too much time or memory to compile") from error
        if "error" in found:
            raise GrammarRefused(found["error"], found.get("part"))
        warnings = tuple(found["warnings"])
        with self._lock:
            self._known[digest] = warnings
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        return warnings

    def close(self) -> None:
        """End the process. Another grammar would start it again."""
        self.confined.close()

    def _find(self, digest: bytes) -> tuple[str, ...] | None:
        with self._lock:
            if digest in self._known:
                self._known.move_to_end(digest)
            return self._known.get(digest)


def _digest(grammar: str) -> bytes:
    return hashlib.sha256(grammar.encode()).digest()
