"""`sage-moe store sync --address`: every machine of a cluster gets a store's records.

The work is in `cluster.node_sync`. Called by `gateway.stores.share_command`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from experts.store import ExpertStore
from experts.store_source import CacheSpec
from gateway.stores.share import SyncRequest, chosen_experts

if TYPE_CHECKING:
    from cluster.node_sync import NodeProgress


def sync_cluster(
    request: SyncRequest, store: Path, address: str, show: Callable[[int, int], None]
) -> tuple[NodeProgress, ...]:
    """Raises OptionInvalid, SyncFailed, or what joining a cluster raises."""
    from cluster.joining import join_ray
    from cluster.processes import quietly

    opened = ExpertStore.open(store)
    try:
        keys, store_hash = chosen_experts(opened.expert_keys(), request), opened.hash
    finally:
        opened.close()
    join_ray(address)

    import ray

    from cluster.node_sync import sync_nodes

    try:
        cache = CacheSpec(str(request.folder), request.limit_bytes)
        return sync_nodes(str(store.resolve()), store_hash, keys, cache, show)
    finally:
        quietly(ray.shutdown)
