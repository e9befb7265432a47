"""Where the service listens: resolved once, so that what was checked is what is bound.

Called by `gateway.service.launch`, and for a dry run by `gateway.service.command`.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from dataclasses import dataclass

from gateway.errors import AddressUnusable, BindNeedsKey, PortTaken
from gateway.http.listener import open_listener


@dataclass(frozen=True)
class BindAddress:
    """A numeric address. `is_loopback` is whether only this machine reaches it."""

    address: str
    port: int
    is_loopback: bool

    @property
    def is_v6(self) -> bool:
        return ":" in self.address

    @property
    def url(self) -> str:
        return f"http://{f'[{self.address}]' if self.is_v6 else self.address}:{self.port}"


def resolve_bind(host: str, port: int) -> BindAddress:
    """The address to bind for a name or number, IPv4 before IPv6. Beyond loopback if any of its addresses is.

    Raises AddressUnusable.
    """
    if not host.strip() or "\0" in host:
        raise AddressUnusable(repr(host), "no host is named")
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise AddressUnusable(host, getattr(error, "strerror", None) or "no such host") from error
    families = (socket.AF_INET, socket.AF_INET6)
    addresses = [str(entry[4][0]) for family in families for entry in found if entry[0] == family]
    if not addresses:
        raise AddressUnusable(host, "it has no IP address")
    return BindAddress(addresses[0], port, all(map(_is_loopback, addresses)))


def check_bind(host: str, address: BindAddress, num_keys: int) -> None:
    """Raises BindNeedsKey where strangers would reach a service without keys."""
    if not address.is_loopback and not num_keys:
        raise BindNeedsKey(host)


def check_free(host: str, address: BindAddress) -> None:
    """Asked before all that a start takes, at the end of which the gateway would find it out. Raises PortTaken or
    AddressUnusable."""
    try:
        open_listener(address.address, address.port).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(host, address.port) from error
        raise AddressUnusable(host, error.strerror or str(error)) from error


def _is_loopback(address: str) -> bool:
    number = ipaddress.ip_address(address.partition("%")[0])
    mapped = number.ipv4_mapped if isinstance(number, ipaddress.IPv6Address) else None
    return (mapped or number).is_loopback
