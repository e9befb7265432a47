"""The terminal of `sage-moe chat`: a prompt with line editing, answers as they come, notes dimmed.

Nothing that a model or a server wrote reaches the terminal unfiltered.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TextIO

from extraction.errors import one_line
from gateway.text.terminal_text import safe_text

PROMPT = "> "


class PlainTerminal:
    """Standard input and output. Without a terminal there are no prompts and no colours, so that it can be piped."""

    def __init__(self, output: TextIO | None = None) -> None:
        self._output = output or sys.stdout
        self._is_terminal = sys.stdin.isatty() and self._output.isatty()
        if self._is_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401 - line editing and earlier lines, for `input`

    def read_line(self) -> str:
        """See Terminal.read_line."""
        try:
            line = input(PROMPT if self._is_terminal else "")
        except (EOFError, KeyboardInterrupt):
            if self._is_terminal:
                self.show("\n")
            raise
        return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def show(self, text: str) -> None:
        """See Terminal.show."""
        self._output.write(safe_text(text))
        self._output.flush()

    def note(self, text: str) -> None:
        """See Terminal.note."""
        line = one_line(text)
        self._output.write(f"\x1b[2m{line}\x1b[0m\n" if self._is_terminal else f"{line}\n")
        self._output.flush()
