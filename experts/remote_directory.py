"""An expert directory over expert actors: asks all that a call needs at once, checks what they answer, and asks others
for what is lost or wrong.

Who can be asked for an expert, in this order: its owners, which are replicas of each other; actors with its record on
their disk; a worker in this process; and all of the wanted numerics class before any of another (`experts.replicas`).
Where nobody is left, a call waits for the roster to bring a replacement, and fails after a bounded time with an error
that names the expert. No row is ever left out. Knows sockets and nothing of Ray; who is where comes from a `Roster`.
Used by `cluster.ray_directory`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from experts.asking import Asker, Begun, Failure, Heard, Question, are_finite
from experts.audit import Auditor, Opinion
from experts.call import ExpertCall
from experts.call_times import CallTimes
from experts.channel import TransportLimits
from experts.devices import upload
from experts.directory import AuditStats, DirectoryStats
from experts.errors import ExpertError, ExpertUnavailable
from experts.exchange import MOST_PEERS, Exchange
from experts.expert_table import ExpertTable
from experts.links import NOBODY, ActorLinks, Links, View
from experts.native_plane import plane
from experts.ranks import Ranks
from experts.replicas import Reach, best_left, choose
from experts.roster import Roster
from experts.shares import Place, Share, join, split_by_place
from experts.worker import ExpertWorker
from extraction.manifest import ExpertKey

logger = logging.getLogger(__name__)

QUARANTINED_SHOWN = 16
NOT_FINITE = "values that are not finite, where others computed finite ones"
NOT_THE_OTHERS = "other values than others computed, found by an audit"

OnBad = Callable[[str, int, str], None]
"""An actor's name and incarnation, and what was wrong with its rows."""


@dataclass(frozen=True)
class DirectoryOptions:
    """What a service may choose about the way to its experts."""

    call_timeout_s: float = 30.0
    """The longest that an actor may take for a part of a call; less where its answers have lately been quick."""
    replacement_wait_s: float = 30.0
    """How long a call waits for somebody who can compute an expert that nobody can now."""
    audit_share: float = 0.0
    """Share of the answers that are computed again elsewhere; see `experts.audit`."""
    audit_seed: int = 0


@dataclass(frozen=True)
class _Attempt:
    """How far the search for somebody who computes some experts has come."""

    avoided: frozenset[Place] = frozenset()
    """Suspended: asked only where nobody else is left."""
    tried: frozenset[Place] = frozenset()
    error: ExpertError | None = None
    """Why the last one of these did not do it."""
    is_second_opinion: bool = False
    until_s: float | None = None
    """Monotonic, once it has begun to wait for a replacement."""

    def after(self, failure: Failure) -> _Attempt:
        is_second = self.is_second_opinion or failure.rows_RD is not None
        tried = self.tried | {failure.place}
        return replace(self, tried=tried, error=failure.error, is_second_opinion=is_second)


NOTHING_BEGUN: Mapping[Place, Begun] = {}
_FIRST = _Attempt()
"""Nobody was tried, and nobody is suspended."""


class _Plan(NamedTuple):
    """Who is asked for what of a call, and the view that says where they are."""

    view: View
    places: list[Place]
    lacking: ExpertKey | None = None
    """An expert that nobody is left for; then there are no places."""


class RemoteDirectory:
    """See `ExpertDirectory`. Any thread may call."""

    def __init__(
        self,
        local: ExpertWorker,
        roster: Roster,
        secret: bytes,
        *,
        limits: TransportLimits | None = None,
        options: DirectoryOptions | None = None,
        on_lost: Callable[[str], None] = lambda name: None,
        on_bad: OnBad = lambda name, incarnation, reason: None,
    ) -> None:
        """local: computes what no actor does.

        on_lost: called with an actor's name when its connection failed, maybe more than once, on the thread that
        noticed. on_bad: when an actor was found to give wrong rows, once; it is not asked any more in this
        incarnation. Neither may wait or raise.
        """
        self._local = local
        self._options = options or DirectoryOptions()
        self._on_bad = on_bad
        self._links = ActorLinks(local, secret, limits or TransportLimits(), on_lost)
        self._asker = Asker(self._links, CallTimes(self._options.call_timeout_s), local.numerics_class)
        self._ranks = Ranks(NOBODY, Reach(frozenset(), {}, local.numerics_class))
        self._counting = threading.Lock()
        self._local_rows = self._num_quarantined = 0
        self._quarantined: deque[str] = deque(maxlen=QUARANTINED_SHOWN)
        share, seed = self._options.audit_share, self._options.audit_seed
        self.auditor = Auditor(share, seed, self._opinions, self._found_wrong)
        self.update(roster)

    @property
    def local(self) -> ExpertWorker:
        return self._local

    @property
    def num_quarantined(self) -> int:
        """See ExpertDirectory.num_quarantined."""
        return self._num_quarantined

    @property
    def foreign_rows(self) -> int:
        """See ExpertDirectory.foreign_rows."""
        return self._asker.counters.foreign_rows

    def connected(self) -> frozenset[str]:
        """Names of the actors that calls can go to now."""
        return self._links.open()

    def outstanding_rows(self, name: str) -> int:
        """Rows that an actor was asked for and has not answered yet."""
        return self._asker.times.load(name, time.monotonic()).outstanding_rows

    def update(self, roster: Roster) -> None:
        """Follow a newer roster; see `ActorLinks.update`."""
        self._links.update(roster)
        listed = self._links.view.class_of.keys()
        self._asker.times.keep_only(listed)
        self._asker.suspensions.keep_only(listed)

    def run(self, call: ExpertCall) -> Tensor:
        """See ExpertDirectory.run. Raises ExpertUnavailable, or what computing here raises."""
        if not call.tokens_TD.is_cpu:
            # Sockets take what is in host memory; it is read back once for all of them.
            rows_RD = self.run(call._replace(tokens_TD=call.tokens_TD.cpu()))
            return upload(rows_RD, call.tokens_TD.device)
        suspended = self._asker.suspensions.of((call.component, call.layer), time.monotonic())
        return self._compute(call, _Attempt(suspended) if suspended else _FIRST)

    def prefetch(self, component: str, layer: int, experts: Sequence[int]) -> None:
        """Does nothing: a hint would take a round trip of its own, about as long as the next call is away."""

    def exchange(self, component: str, layers: tuple[int, ...], num_experts: int) -> Exchange | None:
        """See ExpertDirectory.exchange. None too where answers are audited, or one of the actors is left alone for a
        while."""
        if self._options.audit_share:
            return None
        exchanges, key = self._current_ranks().exchanges, (component, layers, num_experts)
        if key not in exchanges:
            exchanges[key] = self._make_exchange(*key)
        found = exchanges[key]
        is_usable = found is not None and not self._asker.suspensions.is_any_of(found.names)
        return found if is_usable else None

    def table(self, component: str, layer: int) -> ExpertTable | None:
        """While no actor is known; else None, since who has which expert changes."""
        return None if self._links.view.owners else self._local.table(component, layer)

    def note_use(self, table: ExpertTable, used: Sequence[int], num_rows: int) -> None:
        self._local.note_use(table, used, num_rows)
        with self._counting:
            self._local_rows += num_rows

    def load_more(self) -> bool:
        """See ExpertDirectory.load_more: actors may come at any time, and what they have is read here only where they
        are lost."""
        return False

    def resident(self, component: str, layer: int) -> frozenset[int]:
        """See ExpertDirectory.resident."""
        ranks = self._current_ranks()
        present, resident = ranks.reach.present, ranks.view.resident
        here = self._local.resident(component, layer)
        if present:
            of_layer = ranks.of(component, layer)
            here = frozenset(expert for expert in here if of_layer.of(expert)[0] == (None,))
        there = (resident.get(name, {}).get((component, layer), frozenset()) for name in present)
        return here.union(*there)

    def stats(self) -> DirectoryStats:
        asker, auditor = self._asker, self.auditor
        return DirectoryStats(
            self._local_rows,
            asker.counters.remote_rows,
            asker.counters.hop_seconds,
            sum(asker.failures.values()),
            dict(asker.failures),
            asker.counters.foreign_rows,
            AuditStats(auditor.done, auditor.disagreed, auditor.undecided, auditor.owed),
            self._num_quarantined,
            tuple(self._quarantined),
            asker.times.summary(),
        )

    def close(self) -> None:
        self._links.close()
        self.auditor.close()

    # Computing

    def _compute(self, call: ExpertCall, attempt: _Attempt) -> Tensor:
        """All rows of a call, from whoever can do it and was not tried."""
        plan = self._plan(call, attempt)
        while plan.lacking is not None:
            attempt = self._wait_for_replacement(call, plan.view, plan.lacking, attempt)
            plan = self._plan(call, attempt)
        shares = split_by_place(call, plan.places)
        results, failures = self._ask(shares, plan.view.links, not attempt.is_second_opinion)
        return self._complete(call, results, failures, attempt)

    def _complete(
        self,
        call: ExpertCall,
        results: list[tuple[Share, Tensor]],
        failures: Sequence[Failure],
        attempt: _Attempt,
    ) -> Tensor:
        """All rows of a call, with those that somebody failed to compute."""
        for failure in failures:
            logger.warning("%s; its rows are computed elsewhere", failure.error)
            rows_RD = self._compute(failure.share.call, attempt.after(failure))
            if failure.rows_RD is not None:
                rows_RD = self._settle(failure, failure.rows_RD, rows_RD)
            results.append((failure.share, rows_RD))
        return join(results, call.num_rows)

    def _plan(self, call: ExpertCall, attempt: _Attempt) -> _Plan:
        ranks = self._current_ranks()
        of_layer = ranks.of(call.component, call.layer)
        out = attempt.tried | attempt.avoided
        if not out and (places := of_layer.without_choice(call.experts)) is not None:
            return _Plan(ranks.view, places)
        tiers = [of_layer.of(expert) for expert in call.experts]
        if not out:
            equals = [each[0] for each in tiers]  # never empty: this process is among them
        else:
            equals = [best_left(each, out) or best_left(each, attempt.tried) for each in tiers]
            if not all(equals):
                lacking = call.experts[equals.index(())]
                return _Plan(ranks.view, [], ExpertKey(call.component, call.layer, lacking))
        now_s = time.monotonic()
        return _Plan(
            ranks.view, choose(call.counts, equals, lambda name: self._asker.times.load(name, now_s))
        )

    def _current_ranks(self) -> Ranks:
        """Those of before while they are good, which is nearly always."""
        view, ranks = self._links.view, self._ranks
        if view is ranks.view:
            for link in ranks.links:
                if not link.is_open:
                    break
            else:
                return ranks
        present = frozenset(name for name, link in view.links.items() if link.is_open)
        reach = Reach(present, view.class_of, self._local.numerics_class)
        self._ranks = ranks = Ranks(view, reach, ranks)
        return ranks

    def _make_exchange(self, component: str, layers: tuple[int, ...], num_experts: int) -> Exchange | None:
        """None where not every expert has one actor to ask, or there are too many of these."""
        ranks = self._current_ranks()
        places = ranks.sole_names(component, layers, num_experts)
        if plane() is None or not places or not num_experts:
            return None
        links = {name: ranks.view.links[name] for name in {name for each in places for name in each}}
        if len(links) > MOST_PEERS:
            return None

        def conclude(call: ExpertCall, shares: Mapping[Place, Share], begun: Mapping[Place, Begun]) -> Tensor:
            return self._complete(call, *self._ask(shares, links, True, begun), _FIRST)

        return Exchange(component, places, links, self._asker, self._links.limits, conclude)

    def _ask(
        self,
        shares: Mapping[Place, Share],
        links: Links,
        is_checked: bool,
        begun: Mapping[Place, Begun] = NOTHING_BEGUN,
    ) -> tuple[list[tuple[Share, Tensor]], list[Failure]]:
        """Send all shares, compute this process's own meanwhile, and hear the answers. begun: some of them are sent
        already."""
        results: list[tuple[Share, Tensor]] = []
        failures: list[Failure] = []
        asked: deque[Question] = deque()
        try:
            # By name, since a connection is held until its answer: two threads in two orders would wait for ever.
            for name in sorted(name for name in shares if name is not None) if len(shares) > 1 else shares:
                if name is None:
                    continue
                share = begun.get(name) or self._asker.ask(name, links[name], shares[name])
                if isinstance(share, Question):
                    asked.append(share)
                elif isinstance(share, Heard):
                    _sort(share.question.share, self._asker.judge(*share), results, failures)
                else:
                    failures.append(share)
            if None in shares:
                _sort(shares[None], self._run_local(shares[None]), results, failures)
            while asked:
                outcome = self._asker.hear(asked[0], is_checked=is_checked)
                question = asked.popleft()
                if self._options.audit_share and not isinstance(outcome, Failure):
                    self.auditor.offer(question.share.call, _opinion(question, outcome))
                _sort(question.share, outcome, results, failures)
        finally:
            for question in asked:  # only after an error
                self._asker.drop(question)
        return results, failures

    def _run_local(self, share: Share) -> Tensor | Failure:
        try:
            rows_RD = self._local.compute(share.call)
        except ExpertError as error:
            return Failure(None, share, error)
        with self._counting:
            self._local_rows += share.call.num_rows
        return rows_RD

    def _settle(self, failure: Failure, first_RD: Tensor, second_RD: Tensor) -> Tensor:
        """Of an answer that is not finite and a second opinion, the right one: two of a mind are the model's own."""
        if not are_finite(second_RD):
            return first_RD
        place = failure.place
        assert place is not None, "what is computed here is not checked"
        self._quarantine(place, failure.incarnation, NOT_FINITE)
        return second_RD

    def _wait_for_replacement(
        self, call: ExpertCall, view: View, lacking: ExpertKey, attempt: _Attempt
    ) -> _Attempt:
        """Until the roster brings news; then everybody may be tried again. Raises when there is nothing to wait for."""
        error = attempt.error
        assert error is not None, "somebody was tried"
        if not view.owners.get(lacking) and not view.fallbacks.get(lacking):
            raise error
        now_s, wait_s = time.monotonic(), self._options.replacement_wait_s
        until_s = now_s + wait_s if attempt.until_s is None else attempt.until_s
        if not self._links.wait_for_news(view, max(0.0, until_s - now_s)) or time.monotonic() >= until_s:
            waited_s = time.monotonic() - until_s + wait_s
            raise ExpertUnavailable(call.component, call.layer, call.experts, waited_s, str(error))
        return _Attempt(error=error, is_second_opinion=attempt.is_second_opinion, until_s=until_s)

    # Finding who is wrong

    def _opinions(self, call: ExpertCall, place: Place) -> Iterator[Opinion]:
        """The same rows from all others who can compute the whole call, best first."""
        ranks = self._current_ranks()
        of_layer = ranks.of(call.component, call.layer)
        tiers = [of_layer.of(expert) for expert in call.experts]
        able = frozenset.intersection(*(frozenset(p for tier in each for p in tier) for each in tiers))
        share = Share(call, range(call.num_rows))
        for other in (other for tier in tiers[0] for other in tier if other in able and other != place):
            opinion = self._opinion_of(other, share, ranks.view) if other else self._opinion_here(call)
            if opinion is not None:
                yield opinion

    def _opinion_here(self, call: ExpertCall) -> Opinion | None:
        try:
            return Opinion(None, 0, self._local.numerics_class, self._local.compute(call))
        except ExpertError as error:
            logger.warning("no second opinion here: %s", error)
            return None

    def _opinion_of(self, name: str, share: Share, view: View) -> Opinion | None:
        question = self._asker.ask(name, view.links[name], share)
        if isinstance(question, Failure):
            return None
        rows = self._asker.hear(question, is_checked=False, is_counted=False)
        return None if isinstance(rows, Failure) else _opinion(question, rows)

    def _found_wrong(self, opinion: Opinion) -> None:
        if opinion.place is None:
            logger.error("this process computes other expert rows than two actors that agree")
        else:
            self._quarantine(opinion.place, opinion.incarnation, NOT_THE_OTHERS)

    def _quarantine(self, name: str, incarnation: int, reason: str) -> None:
        """Ask this life of an actor no more, and report it; once."""
        if self._links.refuse(name, incarnation):
            logger.error("expert actor %s is asked no more: it answered with %s", name, reason)
            with self._counting:
                self._num_quarantined += 1
                self._quarantined.append(f"{name}/{incarnation}")
            self._on_bad(name, incarnation, reason)


def _sort(
    share: Share, outcome: Tensor | Failure, results: list[tuple[Share, Tensor]], failures: list[Failure]
) -> None:
    if isinstance(outcome, Failure):
        failures.append(outcome)
    else:
        results.append((share, outcome))


def _opinion(question: Question, rows_RD: Tensor) -> Opinion:
    link = question.link
    return Opinion(question.name, link.endpoint.incarnation, link.info.numerics_class, rows_RD)
