"""From a model hub to a store or to a checkpoint folder: looks first, says what it takes, then downloads.

The plan is made from the shards' headers, so that a checkpoint that is incomplete, unknown or too large for the disk is
refused before its weights are on their way. Called by the commands.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from extraction.atomic_folder import check_vacant, free_bytes, reclaimable_bytes
from extraction.copying import Progress
from extraction.errors import CheckpointDamaged, DiskFull, HubRefused, OptionRefused
from extraction.extract import ExtractionReport, Job, extract, prepare
from extraction.files import open_regular
from extraction.hub import (
    HubId,
    RemoteCheckpoint,
    bytes_to_download,
    cache_folder,
    cached_snapshot,
    download,
    download_all,
    fetch_outline,
    look_up,
    silence_downloads,
)
from extraction.manifest import Dtype
from extraction.quantised_parts import NOT_QUANTISED, QuantisedParts
from extraction.safetensors_file import read_header
from extraction.selection import Selection

Announce = Callable[[str], None]
"""Called with one line for the user before a download."""


@dataclass
class HubShards:
    """Fetches each shard when its turn comes; a ShardSupply."""

    remote: RemoteCheckpoint
    outline: Path
    discards: bool
    """Whether shards are kept in the workspace until they are consumed, instead of in the library's cache."""
    _folder: Path | None = None

    def use(self, workspace: Path) -> None:
        """See ShardSupply."""
        self._folder = workspace / "shards" if self.discards else None

    @property
    def peak_bytes(self) -> int:
        """See ShardSupply."""
        sizes = [size for name, size in self.remote.sizes.items() if name.endswith(".safetensors")]
        return max(sizes, default=0) if self.discards else 0

    def identity(self, shards: Iterable[str]) -> str:
        """See ShardSupply."""
        return f"{self.remote.id.repo}@{self.remote.commit}"

    @contextmanager
    def opened(self, shard: str) -> Iterator[int]:
        """See ShardSupply. Raises HubRefused, or CheckpointDamaged when it is not the shard that was planned with."""
        path = download(self.remote, shard, local_dir=self._folder)
        descriptor = open_regular(path.resolve())
        try:
            self._check(descriptor, shard)
            yield descriptor
        finally:
            os.close(descriptor)

    def release(self, shard: str) -> None:
        """See ShardSupply."""
        if self._folder is not None:
            (self._folder / shard).unlink(missing_ok=True)

    def _check(self, descriptor: int, shard: str) -> None:
        planned = open_regular(self.outline / shard)
        try:
            if read_header(planned, shard) != read_header(descriptor, shard):
                raise CheckpointDamaged(shard, "has other tensors than the hub told at first")
        finally:
            os.close(planned)


def extract_from_hub(
    hub_id: HubId,
    dest: Path,
    *,
    announce: Announce,
    discard_source: bool = False,
    selection: Selection | None = None,
    dtype: Dtype | None = None,
    quantised: QuantisedParts = NOT_QUANTISED,
    progress: Progress | None = None,
) -> ExtractionReport:
    """Like `extract`, of a checkpoint on the hub; only shards that the selection needs are downloaded.

    discard_source: each shard is downloaded into the workspace when its turn comes, and removed when its weights are
    in the store and on the disk. Raises an ExtractionError; after a broken download the workspace stays for the next
    run.
    """
    check_vacant(dest)
    remote = look_up(hub_id)
    with tempfile.TemporaryDirectory(prefix="sage-moe-") as folder:
        outline = Path(folder)
        fetch_outline(remote, outline)
        job = prepare(outline, selection=selection, dtype=dtype, quantised=quantised)
        supply = HubShards(remote, outline, discard_source)
        _check_space(job, supply, dest, announce)
        if discard_source:
            silence_downloads()  # Two bars would overwrite each other: the extraction's moves with each shard.
        else:
            download_all(remote, _shards(job))
        return extract(
            outline,
            dest,
            selection=selection,
            dtype=dtype,
            quantised=quantised,
            progress=progress,
            shards=supply,
        )


def hub_snapshot(hub_id: HubId, *, announce: Announce) -> Path:
    """The checkpoint's folder in the library's cache, downloaded where it is not there. Raises an ExtractionError.

    Where the hub cannot be asked, what an earlier download left is taken if it is whole.
    """
    try:
        remote = look_up(hub_id)
    except HubRefused:
        snapshot = cached_snapshot(hub_id)
        if snapshot is None:
            raise
        return snapshot
    with tempfile.TemporaryDirectory(prefix="sage-moe-") as folder:
        shards = fetch_outline(remote, Path(folder))
        prepare(Path(folder), index_only=True)
    missing, cache = bytes_to_download(remote, shards), cache_folder()
    free = free_bytes(cache)
    if missing:
        announce(f"{hub_id}: downloading {_size(missing)} to {cache} ({_size(free)} free)")
    if missing > free:
        raise DiskFull(str(cache), missing, free)
    return download_all(remote, shards)


def _shards(job: Job) -> tuple[str, ...]:
    return job.layout.shards if job.layout is not None else ()


def _check_space(job: Job, supply: HubShards, dest: Path, announce: Announce) -> None:
    """Say what the download and the store take at their peak. Raises DiskFull."""
    if job.layout is None:
        raise OptionRefused("--index-only", "an index needs the checkpoint's folder; give a local one")
    remote, parent = supply.remote, dest.absolute().parent
    parent = next(folder for folder in (parent, *parent.parents) if folder.is_dir())
    store, free = job.space_needed + supply.peak_bytes, free_bytes(parent) + reclaimable_bytes(dest)
    cache = cache_folder()
    missing = 0 if supply.discards else bytes_to_download(remote, job.layout.shards)
    is_one_disk = cache.stat().st_dev == parent.stat().st_dev
    needed = store + missing if is_one_disk else store
    announce(
        f"{remote.id}: {_size(sum(remote.sizes[shard] for shard in job.layout.shards))} of shards; "
        f"at most {_size(store + missing)} of disk ({_size(free)} free in {parent})"
    )
    if needed > free:
        raise DiskFull(str(parent), needed, free)
    if not is_one_disk and missing > free_bytes(cache):
        raise DiskFull(str(cache), missing, free_bytes(cache))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
