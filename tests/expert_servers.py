"""Expert servers in this process, each behind a socket as in an actor, over a store's experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from cluster.placement import split_experts
from experts.budget import measure_experts
from experts.call import ExpertCall
from experts.channel import TransportLimits
from experts.device_proof import prove_experts
from experts.device_tier import RecordsAsStored, open_tiers
from experts.devices import CPU
from experts.handshake import ServiceInfo
from experts.quantised import planned_form
from experts.roster import Endpoint, Roster
from experts.server import Compute, ExpertServer
from experts.store import ExpertStore
from experts.worker import DTYPES, ExpertWorker
from extraction.manifest import ExpertKey
from router.loading import stored_dtype
from router.model_config import read_model_config
from tests.simulated_device import DEVICE, simulated

SECRET = b"a secret for tests, 32 bytes long"
PATIENT = TransportLimits(heartbeat_misses=240)
"""For tests that count rows: on a busy machine a live peer may well be silent for longer than a service would wait."""


@contextmanager
def expert_servers(
    root: Path,
    num_actors: int,
    dtype: str | None = None,
    *,
    numerics_class: str | None = None,
    budgets: tuple[int, int] | None = None,
    replicas: int = 1,
    servers: list[ExpertServer] | None = None,
) -> Iterator[Roster]:
    """The roster that lists them; they and the store are closed at the end. dtype: None means as stored.
    numerics_class: what they announce; None means their own. budgets: experts on the simulated device, in which they
    then compute, and behind it; None computes in host memory. replicas: actors of each group. servers: takes them."""
    with ExitStack() as stack:
        store = ExpertStore.open(root)
        stack.callback(store.close)
        component, config = store.served.name, read_model_config(store.served.config)
        width, kind = config.hidden_size, DTYPES[dtype or stored_dtype(store)]
        device = CPU if budgets is None else DEVICE
        endpoints: dict[str, Endpoint] = {}
        owners: dict[ExpertKey, tuple[str, ...]] = {}
        groups = split_experts(store.expert_keys(component), num_actors)
        with simulated():
            kernel = prove_experts(width, config.expert_width, kind, device)
            form = planned_form(store, kind, {component: width}, device)
            for index, group in enumerate(group for group in groups for _ in range(replicas)):
                device_experts, host_experts = budgets or (None, 0)
                one = measure_experts(store, group, form).largest
                stored = measure_experts(store, group, RecordsAsStored()).largest
                worker = ExpertWorker(
                    store,
                    kernel,
                    kind,
                    widths={component: width},
                    group=group,
                    budget_bytes=None if device_experts is None else device_experts * one,
                    tiers=open_tiers(device, host_experts * stored),
                    has_guests=True,
                    is_served=budgets is None,
                )
                stack.callback(worker.close)
                info = ServiceInfo(width, kind, numerics_class or worker.numerics_class, (component,))
                compute = worker.compute if budgets is None else _in_simulation(worker)
                server = ExpertServer(compute, info, secret=SECRET, incarnation=index + 1, desk=worker.desk)
                server.start()
                stack.callback(server.stop)
                name = f"experts-{index}"
                endpoints[name] = Endpoint(name, "127.0.0.1", server.port, index + 1)
                owners |= {key: (*owners.get(key, ()), name) for key in group}
                if servers is not None:
                    servers.append(server)
        yield Roster(1, endpoints, owners)


def _in_simulation(worker: ExpertWorker) -> Compute:
    """On whatever thread: the simulation is each thread's own."""

    def compute(call: ExpertCall) -> Tensor:
        with simulated():
            return worker.compute(call)

    return compute
