"""Which Ray clusters this machine is a node of, and which of them a user means. Reads the process list only.

Ray's own search for `auto` turns a loopback address into the machine's own, where a head on loopback does not listen,
and takes any cluster where there are several. Called by `cluster.joining` and `sage-moe doctor`, before Ray is
imported.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import psutil

from cluster.addresses import is_local_only, is_loopback
from cluster.errors import ClusterRefused
from cluster.head_probe import parse_head, split_host_port

AUTO = "auto"
ADDRESS_VARIABLE = "RAY_ADDRESS"


@dataclass(frozen=True)
class LocalRay:
    """One node of a Ray cluster that runs on this machine. head: where its cluster's head listens, `host:port`."""

    head: str
    node_ip: str


def local_rays() -> list[LocalRay]:
    """All that this user may see."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        node = read_raylet(process.info["cmdline"] or ())
        if node is not None and node not in found:
            found.append(node)
    return found


def read_raylet(command: Sequence[str]) -> LocalRay | None:
    """From the command line of Ray's node process; None for any other."""
    if not command or PurePath(command[0]).name != "raylet":
        return None
    options = dict(word.split("=", 1) for word in command[1:] if word.startswith("--") and "=" in word)
    head, node_ip = options.get("--gcs-address"), options.get("--node_ip_address")
    return LocalRay(head, node_ip) if head and node_ip else None


def choose_ray(address: str, found: Sequence[LocalRay], environment: Mapping[str, str]) -> LocalRay:
    """The node through which to join the cluster at `address`: `auto`, HOST or HOST:PORT.

    Raises ClusterRefused where this machine is no node of it, or of more than one for `auto`; HeadAddressInvalid.
    """
    if address == AUTO:
        address = environment.get(ADDRESS_VARIABLE) or AUTO
    if address == AUTO:
        heads = {node.head for node in found}
        if not heads:
            mend = "start one (docs/cluster.md), or leave out --address and have one started"
            raise ClusterRefused("no Ray runs on this machine", mend)
        if len(heads) > 1:
            raise ClusterRefused(
                f"{len(heads)} Ray clusters run here", f"name one of {', '.join(sorted(heads))}"
            )
        return found[0]
    wanted = parse_head(address)
    for node in found:
        if _is_same(wanted, node.head):
            return node
    host, _ = split_host_port(wanted)
    mend = f"run this on the head, or `sage-moe join {host}` here first"
    raise ClusterRefused(f"this machine is no node of a Ray cluster at {wanted}", mend)


def check_not_joined(head: str, node_ip: str | None, found: Sequence[LocalRay]) -> None:
    """Raises ClusterRefused where this machine is a node of that cluster already: a second one would count its memory
    and cores again.

    node_ip: the address that the new node is to have; None for the machine's own.
    """
    own = own_addresses() if node_ip is None else {node_ip}
    for node in found:
        if node.node_ip in own and _is_same(head, node.head):
            is_head = split_host_port(node.head)[0] == node.node_ip
            mend = (
                "it is the head and takes part already; run this on the other machines"
                if is_head
                else "end the other `sage-moe join` with Ctrl-C or `ray stop`, or join from another machine"
            )
            raise ClusterRefused(f"this machine is a node of {head} already, as {node.node_ip}", mend)


def is_alone(node: LocalRay, found: Sequence[LocalRay]) -> bool:
    """Whether a cluster is this machine's alone: its head and its nodes here listen on loopback only."""
    nodes = (other.node_ip for other in found if other.head == node.head)
    return is_local_only([split_host_port(node.head)[0], *nodes])


def _is_same(wanted: str, head: str) -> bool:
    """Whether two addresses mean one head; one on loopback means one of this machine, by whatever address."""
    (host, port), (head_host, head_port) = split_host_port(wanted), split_host_port(head)
    if port != head_port:
        return False
    addresses = _addresses(host)
    if head_host in addresses:
        return True
    return any(map(is_loopback, addresses)) and head_host in own_addresses()


def _addresses(host: str) -> set[str]:
    try:
        return {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return set()


def own_addresses() -> set[str]:
    """Numeric addresses of this machine's interfaces."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        entry.address.partition("%")[0]
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in families
    }
