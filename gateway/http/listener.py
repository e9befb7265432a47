"""The socket of the HTTP port, opened in one way by who checks that it is free and by `gateway.http.server`."""

from __future__ import annotations

import socket

BACKLOG = 2048
"""Connections that the system accepts before we do."""


def open_listener(address: str, port: int) -> socket.socket:
    """address: numeric. `::` takes IPv4 too, where the system can do both. Raises OSError."""
    is_v6 = ":" in address
    return socket.create_server(
        (address, port),
        family=socket.AF_INET6 if is_v6 else socket.AF_INET,
        backlog=BACKLOG,
        dualstack_ipv6=is_v6 and socket.has_dualstack_ipv6(),
    )
