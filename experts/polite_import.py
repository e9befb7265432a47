"""Imports that let other processes go first, for one that others wait for less.

Called by `experts.actor` while a service starts.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from importlib import import_module

NICENESS = 4
"""Three tenths of a core where one other wants it, a whole one where nobody does: the router waits for expert actors
in the end, and on a machine that others keep busy much less would be too little."""


def import_politely(*modules: str) -> None:
    """Import modules on a thread of low priority, which Linux gives to single threads and does not give back; elsewhere
    this does nothing. What cannot be imported is left to who needs it."""
    if sys.platform != "linux":
        return
    thread = threading.Thread(target=_import, args=(modules,), name="polite-import")
    thread.start()
    thread.join()


def _import(modules: tuple[str, ...]) -> None:
    niceness = max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0))  # of this thread alone
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, niceness)
    for name in modules:
        with suppress(ImportError):
            import_module(name)
