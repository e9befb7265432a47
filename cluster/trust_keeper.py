"""The Ray shell of a trust keeper: the supervisor owns the ledger, routers send it their reports."""

from __future__ import annotations

from typing import Any

import ray

from cluster.supervisor_handle import find_supervisor
from experts.errors import ExpertError, LedgerUnusable
from experts.trust import TrustReport, TrustTable
from experts.trust_ledger import TrustIdentity
from router.trust_options import TrustOptions

ANSWER_TIMEOUT_S = 30.0
"""A report is a few MB at most, and on disk within a second."""


class SupervisedTrust:
    """A `TrustKeeper` over the supervisor of this Ray cluster."""

    def __init__(self, identity: TrustIdentity, options: TrustOptions) -> None:
        """Raises SupervisorMissing."""
        self._supervisor, self._identity, self._options = find_supervisor(), identity, options

    def table(self) -> TrustTable:
        """See TrustKeeper.table."""
        return self._ask(self._supervisor.trust_table.remote(self._identity, self._options))

    def add(self, report: TrustReport) -> TrustTable:
        """See TrustKeeper.add."""
        return self._ask(self._supervisor.add_trust.remote(self._identity, self._options, report))

    def close(self) -> None:
        """The ledger is the supervisor's."""

    def _ask(self, answer: Any) -> TrustTable:
        try:
            table: TrustTable = ray.get(answer, timeout=ANSWER_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ExpertError):
                raise error.cause from error
            raise LedgerUnusable("of the supervisor", type(error.cause).__name__) from error
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise LedgerUnusable("of the supervisor", type(error).__name__) from error
        return table
