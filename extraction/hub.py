"""Checkpoints that are not here yet: what a model hub has under a name, and the download of what extraction needs.

Goes through the public functions of `huggingface_hub`, with its cache, tokens and environment variables. Only weights
in safetensors and the small text files are ever asked for: no pickles, no code. Names and sizes that the hub tells are
checked before they are used. Called by `extraction.hub_extract` and by the commands.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from extraction.errors import CheckpointDamaged, ExtractionError, HubRefused
from extraction.manifest import MAX_FILE_BYTES, check_relative
from extraction.plan import (
    MAX_SMALL_FILE_BYTES,
    SHARD_INDEX,
    SINGLE_SHARD,
    SMALL_FILES,
    plan_extraction,
    read_shard_index,
)
from extraction.safetensors_file import MAX_HEADER_BYTES

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_HUB_ID = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{{0,127}}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_SHARDS = 4096
NUM_CONNECTIONS = 4
RETRIES_AFTER_S = (0.5, 2.0)
HEADER_GUESS_BYTES = 1 << 16
"""Asked for at first; a longer header takes a second request."""


@dataclass(frozen=True)
class HubId:
    """What a user typed: ORG/NAME or ORG/NAME@REVISION."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


@dataclass(frozen=True)
class RemoteCheckpoint:
    """One commit of a model on the hub. `sizes` has the bytes of every file that may be asked for."""

    id: HubId
    commit: str
    sizes: Mapping[str, int]


def parse_hub_id(text: str) -> HubId | None:
    """None for what no hub would take for a model's name. Says nothing about folders of that name."""
    match = _HUB_ID.fullmatch(text)
    if match is None or ".." in text or "--" in match["repo"]:
        return None
    return HubId(match["repo"], match["revision"])


def look_up(hub_id: HubId) -> RemoteCheckpoint:
    """Asks the hub which commit the name means now, and for its files. Raises HubRefused."""
    with _translated(hub_id):
        info = _api().model_info(hub_id.repo, revision=hub_id.revision, files_metadata=True, timeout=30)
        files = [(file.rfilename, file.size) for file in info.siblings or []]
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise HubRefused(str(hub_id), "the hub names no commit")
    sizes: dict[str, int] = {}
    for name, size in files:
        if name not in SMALL_FILES and name != SHARD_INDEX and not name.endswith(".safetensors"):
            continue
        try:
            check_relative(name)
        except ValueError as error:
            raise HubRefused(str(hub_id), f"the hub lists a file of a refused name: {error}") from error
        most = MAX_FILE_BYTES if name.endswith(".safetensors") else MAX_SMALL_FILE_BYTES
        if type(size) is not int or not 0 <= size <= most:
            raise HubRefused(str(hub_id), f"the hub gives {name} a size of {size!r} bytes")
        sizes[name] = size
    return RemoteCheckpoint(hub_id, info.sha, sizes)


def fetch_outline(remote: RemoteCheckpoint, folder: Path) -> tuple[str, ...]:
    """The checkpoint without its weights: small files, and shards that have a header, their size, and holes.

    A plan of `folder` is that of the whole checkpoint. Returns the shards' names.
    Raises HubRefused, CheckpointDamaged or PathRefused.
    """
    small = sorted(name for name in remote.sizes if name in SMALL_FILES or name == SHARD_INDEX)
    if "config.json" not in small:
        raise HubRefused(str(remote.id), "has no config.json: it is no checkpoint in this form")
    _each(lambda name: download(remote, name, local_dir=folder), small)
    shards = tuple(sorted(set(read_shard_index(folder).values()))) or (SINGLE_SHARD,)
    absent = [shard for shard in shards if shard not in remote.sizes]
    if absent or len(shards) > MAX_SHARDS:
        reason = f"has no {absent[0]}" if absent else f"has more than {MAX_SHARDS} shards"
        raise HubRefused(str(remote.id), reason)
    _each(lambda shard: _write_outline(remote, shard, folder), shards)
    return shards


def download(remote: RemoteCheckpoint, name: str, *, local_dir: Path | None = None) -> Path:
    """One file, into the library's cache or a folder. Broken connections are resumed. Raises HubRefused."""
    with _translated(remote.id):
        path = Path(
            _api().hf_hub_download(
                remote.id.repo,
                name,
                revision=remote.commit,
                local_dir=None if local_dir is None else str(local_dir),
            )
        )
    size = path.stat().st_size
    if size != remote.sizes[name]:
        raise CheckpointDamaged(name, f"has {size} bytes, the hub promised {remote.sizes[name]}")
    return path


def download_all(remote: RemoteCheckpoint, shards: tuple[str, ...]) -> Path:
    """The folder of the library's cache that holds the checkpoint, whole. Raises HubRefused."""
    names = [*sorted(name for name in remote.sizes if name in SMALL_FILES or name == SHARD_INDEX), *shards]
    with _translated(remote.id):
        # By its name, so that the library remembers what the name meant, for when the hub cannot be asked.
        _api().hf_hub_download(remote.id.repo, "config.json", revision=remote.id.revision)
    paths = _each(lambda name: download(remote, name), names)
    return paths[names.index("config.json")].parent


def bytes_to_download(remote: RemoteCheckpoint, shards: tuple[str, ...]) -> int:
    """Of the shards that the library's cache does not hold yet."""
    from huggingface_hub import try_to_load_from_cache

    found = {shard: try_to_load_from_cache(remote.id.repo, shard, revision=remote.commit) for shard in shards}
    return sum(remote.sizes[shard] for shard in shards if not isinstance(found[shard], str))


def cache_folder() -> Path:
    """Where the library keeps what it downloads; the nearest folder above that exists."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE).absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def cached_snapshot(hub_id: HubId) -> Path | None:
    """What an earlier download of this name left in the library's cache, if it is whole."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id.repo, "config.json", revision=hub_id.revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        plan_extraction(folder)
    except ExtractionError:
        return None
    return folder


def endpoint() -> str:
    """Address of the hub."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def silence_downloads() -> None:
    """No bars of the library's own."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()


def _api() -> HfApi:
    from huggingface_hub import HfApi

    if not sys.stderr.isatty():
        silence_downloads()
    return HfApi(endpoint=endpoint(), library_name="sage-moe")


def _each(work: Callable[[str], T], names: list[str] | tuple[str, ...]) -> list[T]:
    """In the order of names, a few at a time."""
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        futures = [pool.submit(work, name) for name in names]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write_outline(remote: RemoteCheckpoint, shard: str, folder: Path) -> None:
    size = remote.sizes[shard]
    path = folder / shard
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = _fetch_start(remote, shard, min(size, HEADER_GUESS_BYTES))
    length = 8 + int.from_bytes(raw[:8], "little")
    if length > min(size, MAX_HEADER_BYTES):
        raise CheckpointDamaged(shard, f"is no safetensors file: header of {length} bytes in {size}")
    if length > len(raw):
        raw = _fetch_start(remote, shard, length)
    with open(path, "wb") as file:
        file.write(raw[:length])
        file.truncate(size)


def _fetch_start(remote: RemoteCheckpoint, shard: str, num_bytes: int) -> bytes:
    """The first bytes of a file; no more is read, whatever the hub sends. Raises HubRefused."""
    for wait_s in RETRIES_AFTER_S:
        try:
            return _fetch_start_once(remote, shard, num_bytes)
        except HubRefused:
            time.sleep(wait_s)
    return _fetch_start_once(remote, shard, num_bytes)


def _fetch_start_once(remote: RemoteCheckpoint, shard: str, num_bytes: int) -> bytes:
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(remote.id.repo, shard, revision=remote.commit, endpoint=endpoint())
    headers = build_hf_headers(library_name="sage-moe") | {"Range": f"bytes=0-{num_bytes - 1}"}
    start = bytearray()
    # Redirects lead to the hub's storage; the client sends the token to the hub's own host only.
    request = get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30)
    with _translated(remote.id), request as answer:
        answer.raise_for_status()
        for chunk in answer.iter_raw(HEADER_GUESS_BYTES):
            start += chunk
            if len(start) >= num_bytes:
                break
    if len(start) < num_bytes:
        raise CheckpointDamaged(shard, f"the hub sends {len(start)} of its first {num_bytes} bytes")
    return bytes(start[:num_bytes])


@contextmanager
def _translated(hub_id: HubId) -> Iterator[None]:
    """The library's errors as HubRefused, in words that a user can act on."""
    from huggingface_hub import errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except ExtractionError:
        raise
    except errors.GatedRepoError as error:
        reason = "asks you to accept its terms on its page; then set HF_TOKEN"
        raise HubRefused(str(hub_id), reason) from error
    except errors.RepositoryNotFoundError as error:
        reason = f"is no folder here, and no public model at {endpoint()}; a private one needs HF_TOKEN"
        raise HubRefused(str(hub_id), reason) from error
    except errors.RevisionNotFoundError as error:
        raise HubRefused(str(hub_id), f"has no such revision at {endpoint()}") from error
    except errors.OfflineModeIsEnabled as error:
        raise HubRefused(str(hub_id), "is not here, and HF_HUB_OFFLINE forbids to ask the hub") from error
    except (HTTPError, errors.LocalEntryNotFoundError) as error:
        reason = (
            f"could not be read from {endpoint()}: {str(error).splitlines()[0] if str(error) else error!r}"
        )
        raise HubRefused(str(hub_id), reason) from error
    except OSError as error:
        if error.filename is not None or error.errno is not None:
            raise
        raise HubRefused(str(hub_id), f"could not be downloaded: {error}") from error
