"""Trust of one engine, from its start to its end: what is known, who watches, and who keeps it.

Called by `router.loading`; where trust is kept is the caller's choice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from experts.errors import ExpertError, LedgerUnusable
from experts.store import ExpertStore
from experts.trust import aspect_means
from experts.trust_book import TrustBook
from experts.trust_ledger import TrustIdentity
from experts.trust_reporter import TrustKeeper, TrustReporter
from router.engine import Engine
from router.model_config import ModelConfig
from router.trust_collector import TrustCollector
from router.trust_options import TrustOptions, open_local_ledger

logger = logging.getLogger(__name__)


OpenKeeper = Callable[[TrustIdentity, TrustOptions], TrustKeeper]


def trust_identity(store: ExpertStore, component: str | None = None) -> TrustIdentity:
    """Of a component's experts; None means the served one. Raises LedgerUnusable where it has none."""
    name = component or store.served.name
    keys = store.expert_keys(name)
    if not keys:
        raise LedgerUnusable(name, "this component has no experts to trust")
    layers = tuple(sorted({key.layer for key in keys}))
    return TrustIdentity(
        store.hash, store.record(keys[0]).dtype, name, layers, 1 + max(key.expert for key in keys)
    )


class TrustSession:
    """Opened before the engine, so that whoever computes experts can read `book`; then `attach`, then `close`."""

    def __init__(
        self,
        store: ExpertStore,
        config: ModelConfig,
        options: TrustOptions,
        open_keeper: OpenKeeper = open_local_ledger,
    ) -> None:
        """Where the keeper cannot be opened, the log says so, and trust is learned anew and kept nowhere."""
        identity = trust_identity(store)
        self._keeper: TrustKeeper | None = None
        base = identity.empty_table()
        try:
            self._keeper = open_keeper(identity, options)
            base = self._keeper.table()
        except ExpertError as error:
            logger.warning("trust is learned but not kept: %s", error)
        self.book = TrustBook(base, options.settings)
        self.collector = TrustCollector(self.book, config.hidden_size, options.layers_a_look)
        self._reporter: TrustReporter | None = None

    def attach(self, engine: Engine) -> None:
        """Watch an engine from its next step on."""
        engine.watchers = (*engine.watchers, self.collector)
        engine.probe = self.collector
        if self._keeper is not None:
            self._reporter = TrustReporter(self.book, self._keeper, self.collector.flush)

    def close(self) -> None:
        """Keep what was observed last."""
        if self._reporter is not None:
            self._reporter.close()
        elif self._keeper is not None:
            self._keeper.close()

    def status(self) -> dict[str, Any]:
        """Plain values for people."""
        table = self.book.view()
        return {
            "is_kept": self._keeper is not None,
            "means": aspect_means(table, self.book.settings),
            "tokens": table.num_tokens,
            "experts_observed": int(table.counts_ALE.any(axis=0).sum()),
        }
