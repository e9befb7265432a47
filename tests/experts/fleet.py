"""Expert servers by name over one small store, and a directory over them: what the data plane's tests stand on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from experts.call import ExpertCall
from experts.channel import TransportLimits
from experts.handshake import ServiceInfo
from experts.numerics import RowKernel, calibrate
from experts.remote_directory import RemoteDirectory
from experts.roster import Endpoint, Owners, Roster
from experts.server import ExpertServer
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from extraction.manifest import ExpertKey
from tests.experts.wire_peers import QUICK, SECRET, endpoint_of

WIDTH, EXPERT_WIDTH, NUM_EXPERTS, LAYERS = 64, 24, 8, (0, 2)
KERNEL: RowKernel = calibrate([(2 * EXPERT_WIDTH, WIDTH), (WIDTH, EXPERT_WIDTH)], torch.float32)
LIMITS = TransportLimits(max_rows_per_frame=16)
HASTY = replace(QUICK, connect_timeout_s=1.0)
NAMES = ("experts-0", "experts-1", "experts-2")
ALL_KEYS = tuple(ExpertKey("model", layer, expert) for layer in LAYERS for expert in range(NUM_EXPERTS))


def make_worker(store: ExpertStore, **options: Any) -> ExpertWorker:
    return ExpertWorker(store, KERNEL, torch.float32, widths={"model": WIDTH}, **options)


def info_of(local: ExpertWorker) -> ServiceInfo:
    return ServiceInfo(WIDTH, local.dtype, local.numerics_class, ("model",))


class Fleet:
    """Servers by name, and the roster that tells where they are."""

    def __init__(self, local: ExpertWorker) -> None:
        self.servers: dict[str, ExpertServer] = {}
        self._local = local
        self._endpoints: dict[str, Endpoint] = {}
        self._version = 0

    def start(
        self,
        name: str,
        incarnation: int = 1,
        *,
        compute: Callable[[ExpertCall], torch.Tensor] | None = None,
        limits: TransportLimits = LIMITS,
        **info: Any,
    ) -> ExpertServer:
        """Start an actor, in place of one of the same name if there is one."""
        if name in self.servers:
            self.servers[name].stop()
        announced = replace(info_of(self._local), **info)
        server = ExpertServer(
            compute or self._local.compute, announced, secret=SECRET, incarnation=incarnation, limits=limits
        )
        server.start()
        self.servers[name] = server
        self.announce(endpoint_of(server.port, name=name, incarnation=incarnation))
        return server

    def announce(self, endpoint: Endpoint) -> None:
        self._endpoints[endpoint.name] = endpoint

    def stop(self) -> None:
        for server in self.servers.values():
            server.stop()

    def roster(self, owners: Owners | None = None, fallbacks: Owners | None = None) -> Roster:
        """A newer one each time. Experts are dealt out in turn unless told otherwise."""
        self._version += 1
        if owners is None:
            names = sorted(self._endpoints)
            owners = {key: (names[key.expert % len(names)],) for key in ALL_KEYS}
        return Roster(self._version, dict(self._endpoints), owners, fallbacks=fallbacks or {})


@contextmanager
def directory_over(
    local: ExpertWorker, roster: Roster, limits: TransportLimits = LIMITS, **options: Any
) -> Iterator[RemoteDirectory]:
    directory = RemoteDirectory(local, roster, SECRET, limits=limits, **options)
    try:
        yield directory
    finally:
        directory.close()


def call_of(seed: int = 0, num_tokens: int = 5, experts: tuple[int, ...] = (0, 1, 2, 5, 7)) -> ExpertCall:
    chance = random.Random(seed)
    counts = tuple(chance.randint(1, 6) for _ in experts)
    tokens = tuple(chance.randrange(num_tokens) for _ in range(sum(counts)))
    tokens_TD = torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    return ExpertCall("model", LAYERS[seed % 2], experts, counts, tokens, tokens_TD, f"request-{seed}")


def assert_same(directory: RemoteDirectory, local: ExpertWorker, call: ExpertCall) -> None:
    assert torch.equal(directory.run(call), local.compute(call))


def owned_by(*names: str) -> Owners:
    """Every expert has these actors as replicas."""
    return dict.fromkeys(ALL_KEYS, names)
