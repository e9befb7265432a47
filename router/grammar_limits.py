"""What a grammar may take, in the units of `llguidance`. Imports nothing: the gateway's process knows it, too.

A grammar is compiled within these limits in a process of its own before a router hears of it
(`gateway.text.grammar_check`), and again by the router (`router.grammar`), so that none comes there that takes more.
"""

from __future__ import annotations

from typing import Any

GRAMMAR_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,  # to build expressions: 10 ms
    "step_lexer_fuel": 100_000,  # of one mask: 7 ms
    "step_max_items": 20_000,  # of one mask: 1 ms
    "max_items_in_row": 1_000,
    "max_lexer_states": 60_000,  # of one answer: 11 MB are 20,000 of a long string
    "max_grammar_size": 200_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
"""Counts of work, not of time: whether an answer meets one depends on nothing but the answer."""
