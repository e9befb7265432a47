"""Processes that fetch into a cache and are killed at any moment, or run into the end of the disk."""

from __future__ import annotations

import multiprocessing
import random
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from experts.cached_store import CachedStore
from experts.errors import CacheDiskFull
from experts.store import ExpertStore
from experts.store_cache import StoreCache
from experts.weight_sources import FolderSource
from extraction.manifest import ExpertKey

_processes = multiprocessing.get_context("fork")  # the imports are paid already
DEADLINE_S = 60.0


def fetch_all(cache_root: Path, store_root: Path, link: Connection) -> None:
    """Says how many records are there after each one, and stays."""
    store = ExpertStore.open(store_root)
    source = FolderSource(store_root, store.hash)
    with_all = CachedStore.join(StoreCache(cache_root), store.hash, [source])
    for key in store.expert_keys():
        with_all.read_expert(key)
        link.send(len(with_all.held_experts()))
    link.recv()


@contextmanager
def victim(cache_root: Path, store_root: Path) -> Iterator[tuple[BaseProcess, Connection]]:
    link, other = _processes.Pipe()
    process = _processes.Process(target=fetch_all, args=(cache_root, store_root, other), daemon=True)
    process.start()
    other.close()
    try:
        yield process, link
    finally:
        process.kill()
        process.join(DEADLINE_S)
        link.close()


def kill_at_random(cache_root: Path, store_root: Path, rng: random.Random, num_records: int) -> None:
    """Let it fetch some records, then end it in the middle of whatever it does."""
    with victim(cache_root, store_root) as (_, link):
        assert link.poll(DEADLINE_S), "the victim does not begin"
        enough = rng.randint(1, num_records)
        while link.recv() < enough:
            assert link.poll(DEADLINE_S)
        # Not to wait for anything: the moment of the kill is meant to be any.
        threading.Event().wait(rng.uniform(0.0, 0.004))


def fetch_beyond_a_limit(
    cache_root: Path, store_root: Path, key: ExpertKey, nbytes: int, link: Connection
) -> None:
    """Writes meet a limit that answers with an error, as a full disk does; then it is lifted."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = ExpertStore.open(store_root)
    cached = CachedStore.join(
        StoreCache(cache_root), store.hash, [FolderSource(store_root, store.hash)], keys=()
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))
    try:
        cached.read_expert(key)
    except CacheDiskFull as error:
        link.send(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    link.send(bytes(cached.read_expert(key).numpy().data) == bytes(store.read_expert(key).numpy().data))
    cached.close()


def run_beyond_a_limit(cache_root: Path, store_root: Path, key: ExpertKey, nbytes: int) -> list[object]:
    """What `fetch_beyond_a_limit` said."""
    link, other = _processes.Pipe()
    arguments = (cache_root, store_root, key, nbytes, other)
    process = _processes.Process(target=fetch_beyond_a_limit, args=arguments, daemon=True)
    process.start()
    other.close()
    said: list[object] = []
    try:
        while link.poll(DEADLINE_S):
            said.append(link.recv())
    except EOFError:
        pass
    process.join(DEADLINE_S)
    return said
