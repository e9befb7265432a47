"""The supervisor's trust ledger: opened when a router first asks, owned until the end. Any thread may ask."""

from __future__ import annotations

import threading

from experts.trust import TrustReport, TrustSettings, TrustTable
from experts.trust_ledger import TrustIdentity, TrustLedger
from router.trust_options import TrustOptions, open_local_ledger


class TrustDesk:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ledger: TrustLedger | None = None
        self._options: TrustOptions | None = None

    def table(self, identity: TrustIdentity, options: TrustOptions) -> TrustTable:
        """What is kept. Raises LedgerBusy or LedgerUnusable."""
        return self._owned(identity, options).table()

    def add(self, identity: TrustIdentity, options: TrustOptions, report: TrustReport) -> TrustTable:
        """Keep a router's report; see `TrustLedger.add`."""
        return self._owned(identity, options).add(report)

    def known(self) -> tuple[TrustTable, TrustSettings] | None:
        """None where no router has learned anything yet."""
        with self._lock:
            if self._ledger is None or self._options is None:
                return None
            return self._ledger.table(), self._options.settings

    def close(self) -> None:
        with self._lock:
            if self._ledger is not None:
                self._ledger.close()

    def _owned(self, identity: TrustIdentity, options: TrustOptions) -> TrustLedger:
        with self._lock:
            if self._ledger is None:
                self._ledger, self._options = open_local_ledger(identity, options), options
            return self._ledger
