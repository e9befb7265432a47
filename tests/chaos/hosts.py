"""Machines that are none: network namespaces of this one, each with an address of its own, on one switch.

A link may be cut and healed while everything on both sides lives on. Needs root; skips the test where it is not
permitted. Nothing else of this machine's network is touched, and only these addresses and loopback are used.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import pytest

T = TypeVar("T")
NETWORK = "198.18.77"
"""Of the block that is reserved for tests of network devices: nobody's."""
NEW_NETWORK = 0x40000000
"""CLONE_NEWNET."""


@dataclass(frozen=True)
class Host:
    """One namespace."""

    name: str
    address: str
    head: str
    """The namespace with the switch; the head's own."""
    port: str
    """Of the switch, where its cable ends; empty for the head."""

    def command(self, words: Sequence[str]) -> list[str]:
        """The same command, there."""
        return ["nsenter", f"--net=/run/netns/{self.name}", *words]

    def run(self, body: Callable[[], T]) -> T:
        """Call a function on a thread that has this host's network."""
        with ThreadPoolExecutor(1, initializer=_enter, initargs=(self.name,)) as thread:
            return thread.submit(body).result()

    def cut(self) -> None:
        """Pull its cable out: packets both ways are lost, and no end is told."""
        _ip("-n", self.head, "link", "set", self.port, "down")

    def heal(self) -> None:
        _ip("-n", self.head, "link", "set", self.port, "up")


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """The first one is the head, where the switch is."""
    if shutil.which("ip") is None or shutil.which("nsenter") is None:
        pytest.skip("there are no ip and nsenter commands")
    mark = secrets.token_hex(2)
    names = [f"sage{mark}-{number}" for number in range(count)]
    head = names[0]
    made: list[Host] = []
    try:
        for number, name in enumerate(names):
            done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=30)
            if done.returncode != 0:
                pytest.skip(f"network namespaces are not permitted: {done.stderr.strip()}")
            made.append(Host(name, f"{NETWORK}.{number + 1}", head, f"port{number}" if number else ""))
        _ip("-n", head, "link", "add", "switch", "type", "bridge")
        for host in made:
            _ip("-n", host.name, "link", "set", "lo", "up")
            if host.port:
                _ip("-n", head, "link", "add", host.port, "type", "veth", "peer", "eth0", "netns", host.name)
                _ip("-n", head, "link", "set", host.port, "master", "switch", "up")
            device = "eth0" if host.port else "switch"
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", device)
            _ip("-n", host.name, "link", "set", device, "up")
        yield made
    finally:
        for host in made:  # with them go their devices
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, timeout=30)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def _enter(name: str) -> None:
    """Of the calling thread, and what it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if libc.setns(descriptor, NEW_NETWORK) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(descriptor)
