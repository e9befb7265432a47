"""Who can reach an address, in every way to write it."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from gateway.errors import AddressUnusable, BindNeedsKey, PortTaken
from gateway.http.listener import open_listener
from gateway.service.bind_address import BindAddress, check_bind, check_free, resolve_bind

NAMES = {
    "here.test": ["127.0.0.1"],
    "both.test": ["127.0.0.1", "192.0.2.7"],
    "there.test": ["192.0.2.7"],
    "six.test": ["2001:db8::7"],
    "link.test": ["fe80::1%eth0"],
}


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    original = socket.getaddrinfo

    def lookup(host: str, port: int, **options: Any) -> Any:
        if host not in NAMES:
            return original(host, port, **options)
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in NAMES[host]]
        return [(f, socket.SOCK_STREAM, 6, "", (a, port)) for f, a in zip(families, NAMES[host], strict=True)]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)


@pytest.mark.parametrize(
    "host",
    [
        "0.0.0.0",
        "0",
        "::",
        "[::]",
        "0:0:0:0:0:0:0:0",
        "::ffff:0.0.0.0",
        "::ffff:192.0.2.1",
        "192.0.2.1",
        "there.test",
        "both.test",
        "six.test",
        "link.test",
        "255.255.255.255",
    ],
)
def test_host_beyond_loopback_needs_a_key(names: None, host: str) -> None:
    address = resolve_bind(host, 8000)
    with pytest.raises(BindNeedsKey) as caught:
        check_bind(host, address, 0)
    assert host in str(caught.value) and "--api-key-file" in str(caught.value)
    check_bind(host, address, 1)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1", "0x7f000001", "::1", "[::1]", "::ffff:127.0.0.1", "127.8.8.8", "here.test"]
)
def test_loopback_needs_none(names: None, host: str) -> None:
    check_bind(host, resolve_bind(host, 8000), 0)


def test_name_is_resolved_once_to_what_is_bound(names: None) -> None:
    assert resolve_bind("both.test", 80) == BindAddress("127.0.0.1", 80, False)
    assert resolve_bind("::1", 80).url == "http://[::1]:80"


@pytest.mark.parametrize("host", ["", " ", "a\0b", "no.such.host.invalid", "x" * 300])
def test_host_that_is_none_is_refused(host: str) -> None:
    with pytest.raises(AddressUnusable):
        resolve_bind(host, 8000)


def test_port_in_use_is_told(taken_port: int) -> None:
    with pytest.raises(PortTaken):
        check_free("localhost", BindAddress("127.0.0.1", taken_port, True))
    with pytest.raises(AddressUnusable):
        check_free("there", BindAddress("192.0.2.7", 8000, False))


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="one socket does not take both")
@pytest.mark.parametrize("holder", ["127.0.0.1", "0.0.0.0"])
def test_port_in_use_under_an_address_of_the_other_kind_is_told(holder: str) -> None:
    with socket.create_server((holder, 0)) as listener, pytest.raises(PortTaken):
        check_free("::", BindAddress("::", listener.getsockname()[1], False))


def test_port_that_is_said_to_be_free_can_be_had(free_port: int) -> None:
    for host in ("127.0.0.1", "0.0.0.0", "::ffff:127.0.0.1"):
        address = resolve_bind(host, free_port)
        check_free(host, address)
        open_listener(address.address, free_port).close()
