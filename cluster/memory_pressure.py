"""Who is ended first where a machine's memory runs out: expert actors, which others stand in for, before a router.

Ray's own monitor, which would see it the other way round, is off (`cluster.resources.ray_environment`).
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

SCORE_FILE = "/proc/{pid}/oom_score_adj"
ROUTER_SCORE = 500
"""Ray gives all of its workers 1000, the most."""


def prefer_others_as_victims() -> None:
    """For the kernel's choice. Without effect where the system does not allow that."""
    with suppress(OSError):
        Path(SCORE_FILE.format(pid="self")).write_text(f"{ROUTER_SCORE}\n")
