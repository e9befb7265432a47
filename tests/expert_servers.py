"""Expert servers in this process, each behind a socket as in an actor, over a store's experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cluster.placement import split_experts
from experts.numerics import calibrate
from experts.roster import Endpoint, Roster
from experts.store import ExpertStore
from experts.transport import ExpertServer, ServiceInfo, TransportLimits
from experts.worker import DTYPES, ExpertWorker
from router.loading import stored_dtype
from router.model_config import read_model_config

SECRET = b"a secret for tests, 32 bytes long"
PATIENT = TransportLimits(heartbeat_misses=240)
"""For tests that count rows: on a busy machine a live peer may well be silent for longer than a service would wait."""


@contextmanager
def expert_servers(
    root: Path, num_actors: int, dtype: str | None = None, *, numerics_class: str | None = None
) -> Iterator[Roster]:
    """The roster that lists them; they and the store are closed at the end. dtype: None means as stored.
    numerics_class: what they announce; None means their own."""
    with ExitStack() as stack:
        store = ExpertStore.open(root)
        stack.callback(store.close)
        component, config = store.served.name, read_model_config(store.served.config)
        width, expert_width = config.hidden_size, config.expert_width
        kind = DTYPES[dtype or stored_dtype(store)]
        kernel = calibrate([(2 * expert_width, width), (width, expert_width)], kind)
        endpoints, owners = {}, {}
        for index, group in enumerate(split_experts(store.expert_keys(component), num_actors)):
            worker = ExpertWorker(store, kernel, kind, widths={component: width}, group=group)
            info = ServiceInfo(width, kind, numerics_class or worker.numerics_class, (component,))
            server = ExpertServer(worker.compute, info, secret=SECRET, incarnation=index + 1)
            server.start()
            stack.callback(server.stop)
            name = f"experts-{index}"
            endpoints[name] = Endpoint(name, "127.0.0.1", server.port, index + 1)
            owners |= dict.fromkeys(group, (name,))
        yield Roster(1, endpoints, owners)
