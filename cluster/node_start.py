"""How a machine becomes a node: the `ray start` command, its environment and limits. Pure, but for one system call.

Called by `sage-moe join`; `cluster.node_process` runs the command.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cluster.addresses import is_loopback
from cluster.errors import ClusterRefused, NodeAddressInvalid
from cluster.head_probe import split_host_port
from cluster.machine_checks import WANTED_FILES
from cluster.ray_token import MODE_VARIABLE
from cluster.resources import OBJECT_STORE_BYTES, ray_environment
from experts.store_source import STORE_CACHE_VARIABLE

LABEL_KEY = re.compile(r"(?:[a-z0-9][a-z0-9.-]{0,252}/)?[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
RESERVED = "ray.io/"


@dataclass(frozen=True)
class NodeOptions:
    """What a node is started with; None leaves it to Ray, which looks at the machine."""

    head: str
    num_cpus: int | None = None
    num_gpus: int | None = None
    memory_bytes: int | None = None
    """What Ray may count as this node's memory."""
    node_address: str | None = None
    """By which of its addresses the others reach this machine."""
    labels: Mapping[str, str] = field(default_factory=dict)
    store_cache: str | None = None

    @property
    def is_head_here(self) -> bool:
        """Whether the head is on this machine's loopback: two nodes on one machine, as in a test."""
        try:
            return is_loopback(split_host_port(self.head)[0])
        except NodeAddressInvalid:
            return False


def start_command(ray: str, options: NodeOptions, is_blocking: bool) -> list[str]:
    """ray: path of Ray's own command."""
    given = {
        "num-cpus": options.num_cpus,
        "num-gpus": options.num_gpus,
        "memory": options.memory_bytes,
        "node-ip-address": options.node_address,
        "labels": ",".join(f"{key}={value}" for key, value in sorted(options.labels.items())) or None,
    }
    command = [ray, "start", f"--address={options.head}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    command += [f"--{name}={value}" for name, value in given.items() if value is not None]
    if options.is_head_here:
        command.append("--dashboard-agent-listen-port=0")  # the head's own has the usual one
    return [*command, "--block"] if is_blocking else command


def start_environment(options: NodeOptions, environment: Mapping[str, str]) -> dict[str, str]:
    """Ray's processes on the node, and the actors that are started there later, inherit it."""
    variables = ray_environment() | dict(environment) | {MODE_VARIABLE: "token"}
    if options.store_cache is not None:
        variables[STORE_CACHE_VARIABLE] = options.store_cache
    return variables


def parse_labels(words: Iterable[str]) -> dict[str, str]:
    """K=V words, several in one with commas between. Raises ClusterRefused for what Ray would not take."""
    labels = {}
    for pair in (pair for word in words for pair in word.split(",")):
        key, separator, value = pair.strip().partition("=")
        if not separator or not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
            reason = (
                "labels are KEY=VALUE of letters, digits, '-', '_' and '.', each of at most 63 characters"
            )
            raise ClusterRefused(f"--labels {pair[:80]!r}", reason)
        if key.startswith(RESERVED):
            raise ClusterRefused(f"--labels {key}", f"keys that begin with {RESERVED} are Ray's own")
        labels[key] = value
    return labels


def raise_open_files() -> None:
    """As far as this user may, up to what Ray wants; child processes inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
