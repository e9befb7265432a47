"""The Ray shell that tells expert actors what they go by: trust, and how much they may keep. Waits for none.

One notice at a time to an actor, since two could overtake each other. Used by `cluster.supervisor`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import ray

from cluster.members import Member
from experts.group_trust import HandDown, group_scores
from experts.trust import TrustSettings, TrustTable

logger = logging.getLogger(__name__)

Limits = tuple[int, Fraction]
"""Bytes of experts, and share of its group, that an actor may keep: the lower holds."""


@dataclass(frozen=True)
class _Notice:
    answer: Any
    incarnation: int
    limits: Limits | None
    """None for a notice of trust."""
    num_tokens: int = 0


class ActorNotices:
    """Used on one thread."""

    def __init__(self) -> None:
        self._open: dict[str, _Notice] = {}
        self._told: dict[str, tuple[int, Limits]] = {}
        """By actor: its incarnation, and the limits that it has taken."""
        self._hand_down = HandDown()

    def tell(
        self,
        members: Mapping[str, tuple[Member, Any]],
        limits: Mapping[str, Limits],
        trust: tuple[TrustTable, TrustSettings] | None,
        now_s: float,
    ) -> None:
        """members: those that are ready and have a bound, with their handles. limits: by name in Ray."""
        self._told = {name: told for name, told in self._told.items() if name in members}
        self._open = {name: notice for name, notice in self._open.items() if name in members}
        for name, (member, handle) in members.items():
            if name in self._open and not self._is_done(name, now_s):
                continue
            notice = self._next(member, handle, limits[name], trust, now_s)
            if notice is not None:
                self._open[name] = notice

    def _next(
        self,
        member: Member,
        handle: Any,
        limits: Limits,
        trust: tuple[TrustTable, TrustSettings] | None,
        now_s: float,
    ) -> _Notice | None:
        incarnation = member.incarnation
        # Also one that has just started: an earlier supervisor may have told it something else.
        if self._told.get(member.name) != (incarnation, limits):
            return _Notice(handle.set_limits.remote(*limits), incarnation, limits)
        if trust is None:
            return None
        table, settings = trust
        if not self._hand_down.is_due(member.name, incarnation, table.num_tokens, now_s):
            return None
        scores_G = group_scores(table, settings, member.keys)
        return _Notice(handle.set_trust.remote(scores_G), incarnation, None, table.num_tokens)

    def _is_done(self, name: str, now_s: float) -> bool:
        """Whether the open notice was answered; notes what was taken."""
        notice = self._open[name]
        done, _ = ray.wait([notice.answer], timeout=0.0)
        if not done:
            return False
        del self._open[name]
        try:
            ray.get(notice.answer)
        except ray.exceptions.RayError as error:
            logger.warning("expert actor %s was not told: %s", name, type(error).__name__)
            return True
        if notice.limits is not None:
            self._told[name] = (notice.incarnation, notice.limits)
        else:
            self._hand_down.note(name, notice.incarnation, notice.num_tokens, now_s)
        return True
