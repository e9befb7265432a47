"""A thread that computes beside the engine's, with half of the process's cores: running streams keep the others.

Used by `router.media.encoding_thread` and `router.speech.speech_thread`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from experts.cores import num_cores


class SideThread(threading.Thread):
    """Runs a function; whoever started it keeps the number of threads that PyTorch computes with there."""

    def __init__(self, function: Callable[[], None], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._function = function
        self._has_set_threads = threading.Event()

    def start(self) -> None:
        """Before threads that compute: a number of threads that one sets is also what others begin with."""
        usual = torch.get_num_threads()
        super().start()
        self._has_set_threads.wait()
        torch.set_num_threads(usual)

    def run(self) -> None:
        torch.set_num_threads(max(1, num_cores() // 2))  # of this thread's own products
        torch.get_num_threads()  # from here on it does not look at what others set
        self._has_set_threads.set()
        self._function()
