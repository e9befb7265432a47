"""Whether a grammar that a request brings can be followed, found out in a process of its own, with hard limits on time
and memory. See `gateway.text.grammar_process`, which runs there, and `gateway.text.confined`.

Called by `gateway.http.response_format` and `sage-moe generate` before a router hears of a grammar.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from gateway.errors import GrammarRefused, LimitBroken
from gateway.text.confined import ConfinedProcess, Confinement
from router.grammar_limits import GRAMMAR_LIMITS

TASK = Path(__file__).with_name("grammar_process.py")
MOST_KNOWN = 256


class GrammarChecker:
    """Starts its process when the first grammar comes. Safe to use from several threads."""

    def __init__(self, limits: Confinement | None = None) -> None:
        self.confined = ConfinedProcess(TASK, {"limits": GRAMMAR_LIMITS}, limits or Confinement())
        self._known: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()
        """Warnings of grammars that can be followed, by digest."""
        self._lock = threading.Lock()

    def check(self, grammar: str, parts: Mapping[str, str] | None = None) -> tuple[str, ...]:
        """What of it will not be enforced, in the words of `llguidance`. grammar: text for it. parts: grammars of which
        it is made, by the name that an error is to give.

        Raises GrammarRefused with what is wrong, PreparationBusy where other requests' grammars took the time.
        """
        digest = hashlib.sha256(grammar.encode()).digest()
        with self._lock:
            known = self._known.get(digest)
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
