"""How long a layer's experts take when they are spread over machines: the arithmetic that plans are compared by. Pure.

A router asks every process that has experts of a layer at once and waits for the slowest. A call costs its hop (round
trip, and the bytes of one row) once, and each expert the bytes of its weights at the process's speed and of its answer
at the link's. Used by `cluster.assignment`, `cluster.forecast` and the simulator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
LEAST_PROBABILITY = 1e-300
MESSAGE_S = 0.015e-3
"""The router's own work for one message and its answer, where nobody has measured it and it has a core of its own."""


@dataclass(frozen=True)
class Seat:
    """A process that experts can be given to: the routers' own, or one expert actor. `index` counts a node's."""

    node_id: str
    index: int
    is_router: bool
    room_bytes: int
    """Of experts in memory."""
    most_bytes: int
    """Of experts in memory and on its disk together."""
    byte_s: float
    """Seconds to multiply one byte of an expert with a row."""
    disk_byte_s: float
    """Seconds to read one byte of an expert that is not in memory; infinite without a disk."""
    link_byte_s: float
    """Seconds for a byte on the way from or to the router; 0 in the routers' own process."""
    round_trip_s: float

    def hop_s(self, row_bytes: int) -> float:
        """What the first expert of a call costs beside its own time."""
        return 0.0 if self.is_router else self.round_trip_s + row_bytes * self.link_byte_s

    def expert_s(self, expert_bytes: float, row_bytes: float) -> float:
        """What every expert in memory adds, with its answer's bytes. row_bytes: of all its rows."""
        return expert_bytes * self.byte_s + row_bytes * self.link_byte_s


def is_called(share: float, experts_per_token: int, num_experts: int, num_tokens: int = 1) -> float:
    """Probability that a process is needed by at least one of some tokens of a layer.

    share: expected experts per token that it computes. Exact where all experts are equally likely: drawing without
    replacement; otherwise the process counts as so many experts of average use.
    """
    held = num_experts * share / experts_per_token
    missed = math.prod(max(0.0, 1.0 - held / (num_experts - rank)) for rank in range(experts_per_token))
    return float(1.0 - missed**num_tokens)


def expected_slowest(
    hops_B: Sequence[float], units_B: Sequence[float], means_B: Sequence[float], most_B: Sequence[int]
) -> float:
    """Expected time of the slowest of B processes, in seconds.

    Process b takes hop + n x unit where n of its experts are needed, and nothing where none is; n is binomial with
    the given mean out of `most`, and independent of the others'.
    """
    times, steps = [], []
    certain = 0.0
    for hop, unit, mean, most in zip(hops_B, units_B, means_B, most_B, strict=True):
        if most <= 0 or mean <= 0.0:
            continue
        at_most_K = np.maximum(np.cumsum(_binomial(most, min(1.0, mean / most))), LEAST_PROBABILITY)
        logs_K = np.log(np.minimum(at_most_K, 1.0))
        certain += float(logs_K[0])
        times.append(hop + unit * np.arange(1, most + 1))
        steps.append(np.diff(logs_K))
    if not times:
        return 0.0
    times_N, steps_N = np.concatenate(times), np.concatenate(steps)
    order_N = np.argsort(times_N, kind="stable")
    # P(slowest <= t) is the product of all processes' own; its logarithm rises at each process's possible times.
    below_N = np.exp(certain + np.concatenate(([0.0], np.cumsum(steps_N[order_N])[:-1])))
    gaps_N = np.diff(times_N[order_N], prepend=0.0)
    return float(np.sum(gaps_N * (1.0 - np.minimum(below_N, 1.0))))


def _binomial(most: int, probability: float) -> Floats:
    """(most + 1,) probabilities of 0 to `most`."""
    if probability >= 1.0:
        certain: Floats = np.zeros(most + 1)
        certain[most] = 1.0
        return certain
    counts_K = np.arange(1, most + 1)
    ratios_K = np.log((most - counts_K + 1) / counts_K) + math.log(probability / (1.0 - probability))
    logs_K = most * math.log1p(-probability) + np.concatenate(([0.0], np.cumsum(ratios_K)))
    result: Floats = np.exp(logs_K)
    return result


def needed_experts(uses: float, num_experts: int, num_streams: int) -> float:
    """Distinct experts of a share that a step of some tokens needs, if the share's are used alike."""
    return float(num_experts * (1.0 - (1.0 - min(1.0, uses / num_experts)) ** num_streams))
