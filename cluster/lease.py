"""One service in a cluster: who has it, kept in Ray's own key-value store, for as long as its command lives.

A shell without decisions of its own. A command that was killed leaves its entry; Ray knows that its job is dead, and
the next service takes over. Called by `gateway.service.launch`.
"""

from __future__ import annotations

import json
import os
import platform
import time
from typing import Any

from ray.experimental import internal_kv

from cluster.errors import ServiceRunsAlready
from cluster.resources import NAMESPACE

KEY = "service"
ATTEMPTS = 3
"""Two commands may find the same dead one at the same moment."""


def take_lease(model: str, url: str) -> None:
    """Raises ServiceRunsAlready."""
    import ray

    entry = {
        "job": ray.get_runtime_context().get_job_id(),
        "model": model,
        "url": url,
        "pid": os.getpid(),
        "host": platform.node(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    holder = None
    for _ in range(ATTEMPTS):
        if not internal_kv._internal_kv_put(KEY, json.dumps(entry), overwrite=False, namespace=NAMESPACE):
            return
        holder = read_lease()
        if holder is not None and is_alive(holder):
            break
        release_lease()
    raise ServiceRunsAlready(describe(holder))


def read_lease() -> dict[str, Any] | None:
    """Of the service that runs, or was killed; None without one."""
    raw: Any = internal_kv._internal_kv_get(KEY, namespace=NAMESPACE)
    if raw is None:
        return None
    entry: dict[str, Any] = json.loads(raw)
    return entry


def release_lease() -> None:
    internal_kv._internal_kv_del(KEY, namespace=NAMESPACE)


def is_alive(entry: dict[str, Any]) -> bool:
    """Whether the command that made an entry still runs."""
    from ray._private.state import jobs

    dead = {job["JobID"] for job in jobs() if job["IsDead"]}  # type: ignore[no-untyped-call]
    return entry.get("job") not in dead


def describe(entry: dict[str, Any] | None) -> str:
    if not entry:
        return "unknown"
    return (
        f"{entry.get('model')} at {entry.get('url')}, process {entry.get('pid')} on {entry.get('host')} "
        f"since {entry.get('started')}"
    )
