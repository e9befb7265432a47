"""The Ray shell that notices when the head of the cluster is lost, long before Ray gives it up.

Ray's own clients try for a minute and end the process then. Called by whoever keeps a service running.
"""

from __future__ import annotations

import time

import ray

from cluster.errors import HeadLost
from cluster.head_probe import split_host_port
from cluster.living_nodes import takes_connections

LOOK_INTERVAL_S = 1.0
CONNECT_TIMEOUT_S = 2.0
MISSES = 3
"""Looks in a row at which nobody listens."""


def wait_head_lost() -> None:
    """Return never: raises HeadLost once Ray's control process takes no connection any more."""
    address = str(ray.get_runtime_context().gcs_address)
    host, port = split_host_port(address)
    misses = 0
    while misses < MISSES:
        time.sleep(LOOK_INTERVAL_S)
        misses = 0 if takes_connections(host, port, CONNECT_TIMEOUT_S) else misses + 1
    raise HeadLost(address)
