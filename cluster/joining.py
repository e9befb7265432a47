"""The Ray shell that connects to a cluster which runs already, once it was seen to be fit for that.

A service or a batch goes beyond loopback only on a Ray that refuses strangers: whoever may call Ray gets the data
plane's secret from it, and can run code on every node. That is asked of the running cluster, by a call without a
token; what this process's environment says about it would be a wish. Called by `gateway.service.launch`,
`gateway.batch.ray_shell` and `cluster.ray_topology`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ClusterRefused
from cluster.findings import Finding, failures
from cluster.head_checks import check_head
from cluster.head_probe import HeadFacts, probe_head
from cluster.local_ray import LocalRay, choose_ray, is_alone, local_rays
from cluster.processes import quietly
from cluster.ray_token import MODE_VARIABLE, Token, find_token
from cluster.resources import LOCAL_ONLY, NAMESPACE, ray_environment

HEAD_RESOURCE = "node:__internal_head__"
"""Ray's own mark of the head among a node's resources."""


@dataclass(frozen=True)
class RunningRay:
    """A cluster that may be joined. is_local_only: whether only this machine reaches it."""

    node: LocalRay
    head: HeadFacts
    is_local_only: bool
    findings: tuple[Finding, ...]

    @property
    def environment(self) -> dict[str, str]:
        """What Ray must find in the environment before it is imported."""
        mode = "disabled" if self.head.is_open else "token"
        return {MODE_VARIABLE: mode} | (LOCAL_ONLY if self.is_local_only else {})


def find_running_ray(address: str, token: Token | None = None) -> RunningRay:
    """The cluster that `address` (`auto`, HOST or HOST:PORT) means, and how it looks; refuses nothing yet.

    token: what to try; by default the user's. Raises ClusterRefused, HeadAddressInvalid or TokenUnusable.
    """
    found = local_rays()
    node = choose_ray(address, found, os.environ)
    token = token or find_token(os.environ, Path.home())
    head = probe_head(node.head, token)
    is_local_only = is_alone(node, found)
    return RunningRay(node, head, is_local_only, tuple(check_head(head, token, is_local_only)))


def check_usable(running: RunningRay) -> None:
    """Raises ClusterRefused where the cluster must not, or cannot, be used."""
    for finding in failures(running.findings):
        raise ClusterRefused(f"the Ray cluster at {finding.where}: {finding.what}", finding.mend)


def connect(running: RunningRay, process_variables: Mapping[str, str] | None = None) -> None:
    """Make this process a driver of the cluster. Raises ClusterRefused.

    process_variables: for the environment of all processes that the cluster starts for this driver; they would
    otherwise have their node's.
    """
    os.environ.update(ray_environment() | running.environment)
    import ray

    try:
        ray.init(
            address=running.node.head,
            namespace=NAMESPACE,
            runtime_env={"env_vars": dict(process_variables or {})},
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())
        raise ClusterRefused(f"the Ray cluster at {running.node.head} cannot be joined", reason) from error


def join_ray(address: str, *, process_variables: Mapping[str, str] | None = None) -> RunningRay:
    """Find, check and connect. Raises ClusterRefused, HeadAddressInvalid or TokenUnusable."""
    running = find_running_ray(address)
    check_usable(running)
    connect(running, process_variables)
    return running


@contextmanager
def connected(running: RunningRay) -> Iterator[None]:
    """A driver of the cluster for as long as the context lasts. Raises ClusterRefused."""
    connect(running)
    import ray

    try:
        yield
    finally:
        quietly(ray.shutdown)


def driver_node() -> tuple[str, bool]:
    """This driver's node: Ray's id of it, and whether it is the cluster's head."""
    import ray

    node_id = str(ray.get_runtime_context().get_node_id())
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    here = next(node for node in nodes if node["NodeID"] == node_id)
    return node_id, HEAD_RESOURCE in here["Resources"]
