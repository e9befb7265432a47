"""How the supervisor is found. Apart from it, so that a router, which asks it, does not import all that it does.

A Ray shell; used by `cluster.ray_directory` and `cluster.trust_keeper`.
"""

from __future__ import annotations

from typing import Any

import ray

from cluster.errors import SupervisorMissing
from cluster.resources import NAMESPACE, SUPERVISOR_NAME


def find_supervisor() -> Any:
    """The running supervisor's handle. Raises SupervisorMissing."""
    try:
        return ray.get_actor(SUPERVISOR_NAME, namespace=NAMESPACE)
    except ValueError as error:
        raise SupervisorMissing(str(error).splitlines()[0]) from error
