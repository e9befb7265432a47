"""A port for a service that the demonstrations, or tests, start."""

from __future__ import annotations

import random
import socket
from pathlib import Path

FIRST = 20_000
"""Ray gives its workers those below."""
CHANCE = random.SystemRandom()
"""Those that run at the same time are not to try the same ones."""


def free_port(host: str = "127.0.0.1") -> int:
    """One that nobody listens on now, of those that the kernel gives to nobody who asks for any: so nobody takes it by
    accident before it is used."""
    kernel_s_own = Path("/proc/sys/net/ipv4/ip_local_port_range")
    end = int(kernel_s_own.read_text().split()[0]) if kernel_s_own.exists() else 32_768
    while end > FIRST:
        port = CHANCE.randrange(FIRST, end)
        try:
            socket.create_server((host, port)).close()
        except OSError:
            continue
        return port
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])
