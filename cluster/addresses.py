"""Where the data plane listens, and whether a cluster is one machine that nobody else reaches. Pure.

Called by `cluster.supervisor`, which starts expert actors, and by `cluster.joining`, which decides whether a service
may use a cluster at all.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from cluster.errors import NodeAddressInvalid

LOOPBACK = "127.0.0.1"
RAY_LOOPBACK = frozenset({LOOPBACK, "::1"})
"""Node addresses with which Ray's processes listen on loopback alone. With any other, of loopback too, its workers
listen on all of the machine's addresses (seen with Ray 2.60)."""


def is_loopback(address: str) -> bool:
    """Whether only processes of the same machine reach a numeric address. Raises NodeAddressInvalid."""
    number = _read(address)
    mapped = number.ipv4_mapped if isinstance(number, ipaddress.IPv6Address) else None
    return (mapped or number).is_loopback


def is_local_only(node_ips: Iterable[str]) -> bool:
    """Whether Ray listens on loopback alone on every node: all of it is on this machine, and closed to others.

    A Ray of one node with an address of its own is not: it is open to its network, and other nodes may join it.
    """
    return all(address in RAY_LOOPBACK for address in node_ips)


def data_plane_host(node_ip: str, is_local_only: bool) -> str:
    """The numeric address on which an expert actor of a node listens, and under which routers find it: the node's in
    Ray, since all nodes reach that one; loopback where all is on one machine. Raises NodeAddressInvalid.
    """
    if is_local_only:
        return LOOPBACK
    number = _read(node_ip)
    if number.is_unspecified or number.is_multicast:
        raise NodeAddressInvalid(node_ip)
    return node_ip


def _read(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(address)
    except ValueError as error:
        raise NodeAddressInvalid(address) from error
