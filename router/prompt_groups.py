"""Which waiting requests can take their prompt's keys and values from a running one: a pure decision.

Requests of one group have the same prompt. The first computes it; the others are held back until it is there, then
share its full blocks. Where nobody is left to share with, the next of the group computes it again. Called by
`router.engine` before every plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from router.attention import BLOCK_POSITIONS


@dataclass(frozen=True)
class Member:
    """What the decision needs to know of a sequence."""

    name: str
    group: str | None
    can_give: bool = False
    """Its prompt is in the cache, and the numbers there were finite."""
    can_take: bool = False
    """Nothing of it has been computed, and it wants nothing that only computing the prompt gives."""


def shared_positions(num_prompt: int) -> int:
    """Positions whose blocks are shared: full ones that nobody writes any more. The prompt's last token is always
    computed anew, for its logits."""
    return (num_prompt - 1) // BLOCK_POSITIONS * BLOCK_POSITIONS


def match_members(
    running: Iterable[Member], waiting: Iterable[Member]
) -> tuple[dict[str, str], frozenset[str]]:
    """Returns (name of a waiting member -> name of the running one to share with, names to hold back).

    waiting: oldest first. A member is held back while an older one of its group is about to compute the prompt.
    """
    givers: dict[str, str] = {}
    busy: set[str] = set()
    for member in running:
        if member.group is not None:
            if member.can_give:
                givers.setdefault(member.group, member.name)
            else:
                busy.add(member.group)
    parents: dict[str, str] = {}
    held: set[str] = set()
    for member in waiting:
        if member.group is None or not member.can_take:
            pass
        elif member.group in givers:
            parents[member.name] = givers[member.group]
        elif member.group in busy:
            held.add(member.name)
        if member.group is not None:
            busy.add(member.group)
    return parents, frozenset(held)
