"""The Ray shell around the head's weight server: a small detached actor on the machine that has the whole store.

Apart from the supervisor, which Ray may restart on another machine, and from the router, whose engine it must not slow
down. Its port is chosen once, so that Ray can restart it at the address that expert actors know. Contains no decision.
Called by `gateway.service.launch`.
"""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import KeeperNotStarted
from cluster.resources import NAMESPACE, WEIGHT_KEEPER_NAME, weight_keeper_options
from experts.store import ExpertStore
from experts.weight_server import WeightServer

START_TIMEOUT_S = 120.0
NAME_LOOKS, NAME_LOOK_S = 50, 0.1
START_ATTEMPTS = 3


class WeightKeeper:
    """Gives a store's records to the machines of this Ray cluster."""

    def __init__(self, store_root: str, secret: bytes, host: str, port: int) -> None:
        logging.basicConfig(level=logging.INFO)
        self._store = ExpertStore.open(Path(store_root))
        self._server = WeightServer(self._store, secret=secret, host=host, port=port)
        self._server.start()

    def port(self) -> int:
        """The answer also says that it serves."""
        return self._server.port


def start_keeper(
    store_root: str, secret: bytes, host: str, name: str = WEIGHT_KEEPER_NAME
) -> tuple[str, int]:
    """Start it on this machine. Returns its address. host: empty means that of this node in Ray. name: in Ray.

    Raises KeeperNotStarted.
    """
    host = host or str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = weight_keeper_options(name) | {"scheduling_strategy": here}
    reason = ""
    for _ in range(START_ATTEMPTS):  # somebody may take the port between the look and the start
        port = _free_port(host)
        keeper: Any = ray.remote(WeightKeeper).options(**options).remote(store_root, secret, host, port)
        try:
            return host, int(ray.get(keeper.port.remote(), timeout=START_TIMEOUT_S))
        except (ray.exceptions.RayError, TimeoutError) as error:
            reason = str(error).strip().splitlines()[-1][:300]
            ray.kill(keeper)
    raise KeeperNotStarted(reason)


def stop_keeper(name: str = WEIGHT_KEEPER_NAME) -> None:
    """Does nothing where none runs. Its name is free afterwards, as a rule."""
    try:
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    except ValueError:
        return
    for _ in range(NAME_LOOKS):
        if name not in ray.util.list_named_actors():
            return
        time.sleep(NAME_LOOK_S)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])
