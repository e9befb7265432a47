"""What a process of a service is spared while it starts; what it computes is the same.

`cluster.worker_start` does it in every process that Ray starts for us, `gateway.service.launch` in the command.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

COLLECTED_FROM = 50_000
"""New objects before Python looks for unused ones, in place of 700. A start makes a million that all stay, and looking
through them a thousand times is an eighth of its work."""
UNUSED, USER = "pandas", "ray.serve."
"""Serve imports it where it is installed, which is a third of Serve's own import, to send data frames as JSON. No
answer of ours is one. Others find it: a batch, or what else runs on a service's Ray, needs it for Ray Data."""


class _NotForServe(MetaPathFinder):
    """Says that there is no UNUSED where a module of Serve's asks."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == UNUSED and _importer().startswith(USER):
            raise ModuleNotFoundError(f"{USER}* is spared {name}", name=name)
        return None


SPARING = _NotForServe()


def start_lightly() -> None:
    """For the rest of this process."""
    gc.set_threshold(COLLECTED_FROM, *gc.get_threshold()[1:])
    if SPARING not in sys.meta_path:
        sys.meta_path.insert(0, SPARING)


@contextmanager
def starting_lightly() -> Iterator[None]:
    """Inside only: for a process that may be somebody else's."""
    thresholds, is_there = gc.get_threshold(), SPARING in sys.meta_path
    start_lightly()
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if not is_there:
            sys.meta_path.remove(SPARING)


def _importer() -> str:
    """Name of the module whose import is looked for by the caller's caller."""
    frame = sys._getframe(2)
    while frame.f_back and str(frame.f_globals.get("__name__")).startswith("importlib."):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__"))
