"""Counting which experts are asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from router.expert_use import ExpertUse
from router.loading import EngineOptions
from router.step_routing import RoutingWatcher
from tests.engines import open_engine, run_to_end
from tests.ray_nodes import greedy


class RowWatcher(RoutingWatcher):
    """Wants every layer with its rows."""

    def watch(self, *shown: object) -> None:
        return


@pytest.mark.parametrize("is_shown", [False, True])
def test_every_row_is_counted_at_its_expert_and_taken_once(tiny_store: Path, is_shown: bool) -> None:
    loaded = open_engine(tiny_store, EngineOptions())
    use = ExpertUse(loaded.store.served.name, loaded.config.num_experts)
    if is_shown:
        loaded.engine.watchers = (RowWatcher(),)
    loaded.engine.watchers = (*loaded.engine.watchers, use)
    run_to_end(loaded.engine, [greedy("a", max_tokens=4)])
    taken = use.take()
    num_rows = (5 + 4 - 1) * loaded.config.experts_per_token
    assert sorted(layer for _, layer in taken) == sorted(loaded.config.moe_layers)
    for counts_E in taken.values():
        assert counts_E.shape == (loaded.config.num_experts,)
        assert int(np.sum(counts_E)) == num_rows
    assert sum(int(counts_E.sum()) for counts_E in taken.values()) == loaded.worker.stats.rows
    assert use.take() == {}
    loaded.close()
