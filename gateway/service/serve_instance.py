"""The Ray Serve shell around our application: started, deployed, and stopped without touching anybody else's.

A Ray cluster has one Serve. It needs no HTTP proxy for us: the gateway has a port of its own. Called by
`gateway.service.launch`.
"""

from __future__ import annotations

import logging
import time

from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.schema import ApplicationStatus

from cluster.processes import quietly
from gateway.errors import DeploymentFailed, ServeTaken
from gateway.service.application import APP_NAME

LOOK_S = 0.1
"""Every look costs Serve and the command a hundredth of a second of CPU, which what starts meanwhile needs."""
FAILED = ApplicationStatus.DEPLOY_FAILED.value
"""Of applications and of deployments."""


def start() -> None:
    """Start Serve without an application."""
    _say_little()
    serve.start(proxy_location=ProxyLocation.Disabled)


def begin(application: serve.Application) -> None:
    """Have Serve, which was started, start the application; see `wait_running`."""
    target = serve.RunTarget(application, name=APP_NAME, route_prefix=None)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def wait_running() -> None:
    """Return when the application has begun to serve. Raises DeploymentFailed."""
    while True:
        application = serve.status().applications[APP_NAME]
        if application.status == ApplicationStatus.RUNNING:
            return
        if application.status.value == FAILED:  # one that is unhealthy may be well again
            failed = [each for each in application.deployments.values() if each.status.value == FAILED]
            reasons = [each.message for each in failed if each.message]
            raise DeploymentFailed(reasons[0] if reasons else application.message)
        time.sleep(LOOK_S)


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
