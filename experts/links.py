"""A router's connections to the actors of a roster: made, tended, and let go as rosters change.

Actors whose experts are not those of this process, or that were found to be wrong, are refused for as long as they
live. Used by `experts.remote_directory`; who may be asked for what is not decided here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from experts.channel import TransportLimits
from experts.connection import ExpertConnection
from experts.errors import TransportError
from experts.handshake import ServiceInfo
from experts.numerics import quantization_in
from experts.roster import Endpoint, Owners, ResidentExperts, Roster
from experts.worker import ExpertWorker

logger = logging.getLogger(__name__)

Links = Mapping[str, ExpertConnection]
MOST_AT_ONCE = 8
"""Connections that are made at the same time: one that does not answer holds up no other."""


class View(NamedTuple):
    """What a call reads once: every owner that has a connection announced all components that it owns."""

    owners: Owners
    fallbacks: Owners
    links: Links
    class_of: Mapping[str, str]
    """Numerics class of every actor of the roster that was ever connected."""
    resident: Mapping[str, ResidentExperts]


NOBODY = View({}, {}, {}, {}, {})


class ActorLinks:
    """Long-lived connections, tended by a thread of its own. Any thread may use them."""

    def __init__(
        self,
        local: ExpertWorker,
        secret: bytes,
        limits: TransportLimits,
        on_lost: Callable[[str], None],
    ) -> None:
        """local: whose experts the actors must have. on_lost: see RemoteDirectory."""
        self.view = NOBODY
        self._local, self._secret, self.limits = local, secret, limits
        self._on_lost = on_lost
        self._version = -1
        self._refused: frozenset[Endpoint] = frozenset()
        """Not connected again in the same incarnation."""
        self._changes = threading.Lock()
        """Held by whoever makes connections, which may take seconds."""
        self._news = threading.Condition()
        """Guards `view`, `_refused` and `_is_closing`, and tells of new views."""
        self._is_closing = False
        self._ends = threading.Event()
        self._tender = threading.Thread(target=self._tend, name="expert-heartbeat", daemon=True)
        self._tender.start()

    def open(self) -> frozenset[str]:
        """Names of the actors that calls can go to now."""
        return frozenset(name for name, link in self.view.links.items() if link.is_open)

    @property
    def is_closing(self) -> bool:
        return self._is_closing

    @property
    def version(self) -> int:
        """Of the roster that is followed."""
        return self._version

    def update(self, roster: Roster) -> None:
        """Follow a newer roster: connect to actors that are new, restarted or lost, drop those that are gone.

        An actor that cannot be reached, or does not fit the worker in this process, is left out.
        """
        with self._changes:
            if self._is_closing or roster.version < self._version:
                return
            components = _components_of(roster.owners)
            before = self.view
            kept = {
                name: link
                for name, link in before.links.items()
                if link.is_open
                and roster.endpoints.get(name) == link.endpoint
                and self._is_fit(link.endpoint, link.info, components.get(name, frozenset()))
            }
            owners, fallbacks = roster.owners, roster.fallbacks
            if roster.version == self._version:  # equal ones: what was derived from those before stays good
                owners, fallbacks = before.owners, before.fallbacks
            self._version = roster.version
            listed = components.keys() | roster.endpoints.keys()
            classes = {name: known for name, known in before.class_of.items() if name in listed}
            with self._news:
                self._refused = self._refused.intersection(roster.endpoints.values())
                self.view = View(owners, fallbacks, kept, classes, roster.resident)
                self._news.notify_all()
            for name, link in before.links.items():
                if name not in kept:
                    link.close()
            missing = [(name, endpoint) for name, endpoint in roster.endpoints.items() if name not in kept]
            self._connect_all([each for each in missing if each[1] not in self._refused], components)

    def refuse(self, name: str, incarnation: int) -> bool:
        """Let go of an actor, and do not come back to this life of it. False where it is not connected any more."""
        link = self.view.links.get(name)
        if link is None or link.endpoint.incarnation != incarnation:
            return False
        with self._news:
            is_known = link.endpoint in self._refused
            self._refused |= {link.endpoint}
        link.close()
        return not is_known

    def tell_lost(self, name: str, link: ExpertConnection) -> None:
        """Tell of a lost connection, but not of one that still stands or that was closed here on purpose."""
        is_ours = self.view.links.get(name) is link and link.endpoint not in self._refused
        if is_ours and not link.is_open:
            self._on_lost(name)

    def wait_for_news(self, known: View, timeout_s: float) -> bool:
        """Wait until the view is another one. False when it is not by then, or will never be again."""
        with self._news:
            self._news.wait_for(lambda: self.view is not known or self._is_closing, timeout_s)
            return self.view is not known and not self._is_closing

    def close(self) -> None:
        with self._news:
            self._is_closing = True
            self._news.notify_all()
        self._ends.set()
        self._tender.join()
        with self._changes:
            links, self.view = self.view.links, NOBODY
            for link in links.values():
                link.close()

    def _connect_all(
        self, missing: list[tuple[str, Endpoint]], components: Mapping[str, frozenset[str]]
    ) -> None:
        if len(missing) < 2:
            for name, endpoint in missing:
                self._connect(name, endpoint, components.get(name, frozenset()))
            return
        with ThreadPoolExecutor(MOST_AT_ONCE, thread_name_prefix="expert-connect") as threads:
            begun = [
                threads.submit(self._connect, name, endpoint, components.get(name, frozenset()))
                for name, endpoint in missing
            ]
        for connecting in begun:
            connecting.result()

    def _connect(self, name: str, endpoint: Endpoint, components: frozenset[str]) -> None:
        """Connect to an actor; calls and heartbeats go there from now on."""
        if self._is_closing:
            return
        try:
            link = ExpertConnection(endpoint, secret=self._secret, limits=self.limits)
        except TransportError as error:
            logger.warning("cannot reach expert actor %s: %s", endpoint.name, error)
            return
        if not self._is_fit(endpoint, link.info, components):
            link.close()
            return
        theirs = link.info.numerics_class
        if theirs != self._local.numerics_class:
            logger.warning(
                "expert actor %s computes in another numerics class (%s, here %s): results are not bitwise equal",
                endpoint.name,
                theirs,
                self._local.numerics_class,
            )
        with self._news:
            view = self.view
            self.view = view._replace(
                links={**view.links, name: link}, class_of={**view.class_of, name: theirs}
            )
            self._news.notify_all()

    def _is_fit(self, endpoint: Endpoint, info: ServiceInfo, components: frozenset[str]) -> bool:
        """Whether an actor computes the components that it owns as this process does; says so when it does not."""
        widths = self._local.widths
        reasons = [f"has no component {name!r}" for name in sorted(components.difference(info.components))]
        if info.dtype != self._local.dtype:
            reasons.append(f"computes in {info.dtype}, here {self._local.dtype}")
        theirs, ours = (quantization_in(name) for name in (info.numerics_class, self._local.numerics_class))
        if theirs != ours:
            reasons.append(f"has experts in {theirs or 'full precision'}, here in {ours or 'full precision'}")
        for name in info.components:
            if widths.get(name) != info.width:
                reasons.append(f"has component {name!r} of width {info.width}, here {widths.get(name)}")
        if reasons:
            logger.warning(
                "expert actor %s is refused, its experts are computed elsewhere: it %s",
                endpoint.name,
                "; ".join(reasons),
            )
            with self._news:
                self._refused |= {endpoint}
        return not reasons

    def _tend(self) -> None:
        while not self._ends.wait(self.limits.heartbeat_interval_s):
            for name, link in self.view.links.items():
                if link.is_open and not link.tend():
                    self.tell_lost(name, link)


def _components_of(owners: Owners) -> dict[str, frozenset[str]]:
    """Of every actor that owns something."""
    pairs = {(name, key.component) for key, names in owners.items() for name in names}
    return {name: frozenset(component for of, component in pairs if of == name) for name, _ in pairs}
