"""The Ray Serve shell around our application: started, deployed, and stopped without touching anybody else's.

A Ray cluster has one Serve. It needs no HTTP proxy for us: the gateway has a port of its own. Called by
`gateway.service.launch`.
"""

from __future__ import annotations

import logging

from ray import serve
from ray.serve.config import ProxyLocation

from cluster.processes import quietly
from gateway.errors import DeploymentFailed, ServeTaken
from gateway.service.deployment import APP_NAME


def deploy(application: serve.Application) -> None:
    """Start Serve and run the application. Raises DeploymentFailed."""
    _say_little()
    serve.start(proxy_location=ProxyLocation.Disabled)
    try:
        serve.run(application, name=APP_NAME, route_prefix=None)
    except RuntimeError as error:
        deployments = serve.status().applications[APP_NAME].deployments.values()
        reasons = [deployment.message for deployment in deployments if deployment.message]
        raise DeploymentFailed(reasons[0] if reasons else str(error)) from error


def stop(is_shared: bool) -> None:
    """End our application, and Serve with it unless it has others by now.

    is_shared: whether the cluster is not ours alone, so that there may be others.
    """
    _say_little()
    if is_shared and _others():
        quietly(lambda: serve.delete(APP_NAME))
    else:
        quietly(serve.shutdown)


def check_free() -> None:
    """Raises ServeTaken where Serve runs for others: Serve is one for the whole cluster."""
    if others := _others():
        raise ServeTaken(others)


def _say_little() -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _others() -> tuple[str, ...]:
    return tuple(sorted(name for name in serve.status().applications if name != APP_NAME))
