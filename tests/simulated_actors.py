"""Expert actors that compute on the simulated device: the seam by which tests run them, in this process or in Ray.

The product has no option for it. `SimulatedActor` is the actor itself, with every thread of it inside the simulation,
and takes `cuda` for that device. `install` puts it in the actor's place: as `worker_process_setup_hook` of a Ray in
each of its processes, of which the supervisor's creates actors.
"""

from __future__ import annotations

from fractions import Fraction
from unittest import mock

import torch
from torch import Tensor

from cluster import actor_pool
from experts import devices
from experts.actor import ActorSpec, ExpertActor
from experts.call import ExpertCall
from tests.simulated_device import DEVICE, simulated


def _resolve(word: str, option: str) -> torch.device:
    return DEVICE if word == "cuda" else torch.device(word)


class SimulatedActor(ExpertActor):
    def __init__(self, spec: ActorSpec) -> None:
        with simulated(), mock.patch.object(devices, "resolve_device", _resolve):
            super().__init__(spec)

    def set_limits(self, budget_bytes: int, share: Fraction) -> None:
        with simulated():
            super().set_limits(budget_bytes, share)

    def _compute(self, call: ExpertCall) -> Tensor:
        with simulated():
            return super()._compute(call)

    def _warm_up(self) -> None:
        with simulated():
            super()._warm_up()


def install() -> None:
    actor_pool.ExpertActor = SimulatedActor  # type: ignore[misc]
