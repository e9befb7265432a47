"""The Ray shell that brings a store's records to the disks of a cluster's machines ahead of time.

One small actor a machine, pinned there, which lives until all records are there. Contains no decision. Called by
`sage-moe store sync --address`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.addresses import LOOPBACK, is_local_only
from cluster.errors import SyncFailed
from cluster.living_nodes import living_nodes
from cluster.resources import NO_CPUS, SYNC_KEEPER_NAME
from cluster.weight_keeper import start_keeper, stop_keeper
from experts.near_store import open_near
from experts.store_source import CacheSpec, StoreSource
from extraction.manifest import ExpertKey

SECRET_BYTES = 32
LOOK_S = 0.2
ANSWER_TIMEOUT_S = 120.0
PATIENCE_S = 30.0
"""Without a single record after an error."""


class NodeSync:
    """On one machine: fetches what is missing there for as long as it lives."""

    def __init__(
        self, source: StoreSource, keys: Collection[ExpertKey], cache: CacheSpec, secret: bytes
    ) -> None:
        self._near = open_near(source, keys, cache.here(), secret)

    def status(self) -> dict[str, Any]:
        """See `NearStore.status`."""
        return self._near.status()


@dataclass(frozen=True)
class NodeProgress:
    """One machine at a moment. records_total is 0 where the store is in place."""

    address: str
    folder: str
    records_done: int = 0
    records_total: int = 0
    fetched_bytes: int = 0
    last_error: str = ""

    @property
    def is_done(self) -> bool:
        return self.records_done == self.records_total


def sync_nodes(
    store_root: str,
    store_hash: str,
    keys: Collection[ExpertKey],
    cache: CacheSpec,
    show: Callable[[int, int], None],
) -> tuple[NodeProgress, ...]:
    """Returns when every machine of the cluster has these records, or the store in place. show: called with records
    done and to do, of all machines together. This process is connected to the cluster.

    Raises SyncFailed, KeeperNotStarted.
    """
    nodes = {node_id: node.address for node_id, node in living_nodes().items()}
    secret = secrets.token_bytes(SECRET_BYTES)
    host = LOOPBACK if is_local_only(list(nodes.values())) else ""
    head = start_keeper(store_root, secret, host, SYNC_KEEPER_NAME)
    try:
        source = StoreSource(store_hash, (store_root,), head=head)
        with _syncing(nodes, (source, keys, cache, secret)) as actors:
            return _await_all(nodes, actors, show)
    finally:
        stop_keeper(SYNC_KEEPER_NAME)


@contextmanager
def _syncing(nodes: Collection[str], arguments: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """An actor on each of these nodes, by id."""
    actors: dict[str, Any] = {}
    try:
        for node_id in nodes:
            here = NodeAffinitySchedulingStrategy(node_id, soft=False)
            made = ray.remote(NodeSync).options(num_cpus=NO_CPUS, scheduling_strategy=here)
            actors[node_id] = made.remote(*arguments)
        yield actors
    finally:
        for actor in actors.values():
            ray.kill(actor)


def _await_all(
    nodes: Mapping[str, str], actors: Mapping[str, Any], show: Callable[[int, int], None]
) -> tuple[NodeProgress, ...]:
    done, changed_at_s = -1, time.monotonic()
    while True:
        found = tuple(_ask(nodes[node_id], actor) for node_id, actor in actors.items())
        now = sum(node.records_done for node in found)
        if now != done or not any(node.last_error for node in found):
            done, changed_at_s = now, time.monotonic()
        show(now, sum(node.records_total for node in found))
        if all(node.is_done for node in found):
            return found
        if time.monotonic() - changed_at_s >= PATIENCE_S:
            stuck = next(node for node in found if not node.is_done and node.last_error)
            raise SyncFailed(stuck.address, stuck.last_error)
        time.sleep(LOOK_S)


def _ask(address: str, actor: Any) -> NodeProgress:
    try:
        told: dict[str, Any] = ray.get(actor.status.remote(), timeout=ANSWER_TIMEOUT_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        lines = str(getattr(error, "cause", None) or error).strip().splitlines() or [type(error).__name__]
        raise SyncFailed(address, lines[-1][:300]) from error
    return NodeProgress(
        address,
        told["folder"],
        told.get("records_done", 0),
        told.get("records_total", 0),
        sum(told.get("fetched_bytes", {}).values()),
        told.get("last_error", ""),
    )
