"""What a check has found, and what mends it. Pure; made by `cluster.*_checks`, printed by `sage-moe doctor`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "failure"]
"""A failure keeps the service from working; a warning makes it slower, weaker or less sure."""


@dataclass(frozen=True)
class Finding:
    """One line for the user. `mend` says what to type, or where; nothing where all is well."""

    level: Level
    where: str
    """A node's name, or `here`."""
    what: str
    mend: str = ""


def ok(where: str, what: str) -> Finding:
    return Finding("ok", where, what)


def warning(where: str, what: str, mend: str) -> Finding:
    return Finding("warning", where, what, mend)


def failure(where: str, what: str, mend: str) -> Finding:
    return Finding("failure", where, what, mend)


def failures(findings: Iterable[Finding]) -> list[Finding]:
    """Those that keep the service from working."""
    return [finding for finding in findings if finding.level == "failure"]
