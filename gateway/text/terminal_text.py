"""Text of models and servers made safe for a terminal: it may have lines and tabs, but moves no cursor, changes no
colour or title, and hides nothing. For messages of one line there is `extraction.errors.one_line`."""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"
"""Format characters that writing systems and emoji need, and that have no effect of their own."""
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Zl", "Zp"))


def safe_text(text: str) -> str:
    """The text with control and format characters escaped; newlines and tabs stay, carriage returns go.

    Looks at each character alone, so pieces of a stream can be passed one by one.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_safe, text))


def _safe(character: str) -> str:
    if character in "\n\t" or character in _JOINERS:
        return character
    if character == "\r":
        return ""
    if unicodedata.category(character) in _HIDDEN:
        return character.encode("unicode_escape").decode("ascii")
    return character
