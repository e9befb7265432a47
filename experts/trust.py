"""How much each expert has earned: what is remembered of its observations, and the score made of it. Pure.

Trust has three aspects, each a weighted mean of observations in [0, 1]: convergence, stability and efficiency. An
observation's weight halves with every half-life, counted in tokens that the model has computed, never in seconds.
An aspect without evidence is 0.5. Only sums are kept, so tables that several routers filled can be added in any
order. What the observations are is `router.trust_signals`; who keeps them is `experts.trust_ledger`. Formulas,
half-lives and their reasons: docs/trust.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from experts.errors import TrustMismatch

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

ASPECTS = ("convergence", "stability", "efficiency")
CONVERGENCE, STABILITY, EFFICIENCY = range(len(ASPECTS))
UNSEEN = 0.5
"""The score of what has not been observed."""
NUM_BUCKETS = 24
"""Of token frequencies; see `bucket_of`."""


@dataclass(frozen=True)
class TrustSettings:
    """How observations become a score. The defaults are the seed's."""

    weights: tuple[float, float, float] = (0.4, 0.3, 0.3)
    """Of the aspects in the order of `ASPECTS`; only their proportions count."""
    half_lives: tuple[float, float, float] = (32768.0, 65536.0, 16384.0)
    """Tokens after which an observation counts half, by aspect."""
    bucket_half_life: float = 131072.0
    """The same for the mean NLL of a frequency bucket."""
    prior_weight: float = 8.0
    """How many observations of `UNSEEN` a new expert starts with, so that its first ones do not decide alone."""

    def __post_init__(self) -> None:
        numbers = (*self.weights, *self.half_lives, self.bucket_half_life, self.prior_weight)
        if not all(math.isfinite(number) and number >= 0 for number in numbers) or sum(self.weights) <= 0:
            raise ValueError("weights must be finite, not negative and not all 0")
        if min(*self.half_lives, self.bucket_half_life, self.prior_weight) <= 0:
            raise ValueError("half-lives and the prior's weight must be above 0")


@dataclass(frozen=True)
class TrustTable:
    """Sums of observations about one component's experts: A aspects, L layers with experts, E experts, B buckets.

    A delta is a table as well: of what was observed since the last one. Treat a table that you have handed out as
    constant; only `observe` and `observe_buckets` change one in place.
    """

    component: str
    layers: tuple[int, ...]
    """Ascending; row l of the arrays is layer `layers[l]`."""
    clock: float
    """The token at which an observation has weight 1 in these sums; later ones weigh more, earlier ones less."""
    num_tokens: int
    """Tokens that were computed while this was observed."""
    sums_ALE: Floats
    weights_ALE: Floats
    counts_ALE: Counts
    """Observations ever, without decay."""
    bucket_sums_B: Floats
    """Of NLL in nats."""
    bucket_weights_B: Floats

    @property
    def num_experts(self) -> int:
        """Of each layer."""
        return int(self.sums_ALE.shape[2])

    @property
    def now(self) -> float:
        """The clock at which scores are read: that of all tokens, or of the latest observation if that is ahead,
        since a router stamps with the total that it was last told."""
        return max(self.clock, float(self.num_tokens))


def empty_table(component: str, layers: tuple[int, ...], num_experts: int, clock: float = 0.0) -> TrustTable:
    """Nothing observed. clock: of the observations to come."""
    shape = (len(ASPECTS), len(layers), num_experts)
    return TrustTable(
        component,
        layers,
        clock,
        0,
        np.zeros(shape),
        np.zeros(shape),
        np.zeros(shape, np.int64),
        np.zeros(NUM_BUCKETS),
        np.zeros(NUM_BUCKETS),
    )


def observe(
    table: TrustTable,
    aspect: int,
    experts_N: npt.NDArray[np.integer[Any]],
    values_N: Floats,
    weights_N: Floats,
    at: float,
    settings: TrustSettings,
) -> None:
    """Add N observations made at token `at` to a table, in place; those that are not finite are left out.

    experts_N: flat numbers, row of the layer times E plus expert. values_N are clamped to [0, 1], weights_N to at
    least 0.
    """
    is_usable_N = np.isfinite(values_N) & np.isfinite(weights_N) & (weights_N > 0)
    experts_N, values_N, weights_N = experts_N[is_usable_N], values_N[is_usable_N], weights_N[is_usable_N]
    scale = _growth(at - table.clock, settings.half_lives[aspect])
    num_cells = table.sums_ALE[aspect].size
    values_N = np.clip(values_N, 0.0, 1.0)
    for array_ALE, parts_N in (
        (table.sums_ALE, values_N * weights_N * scale),
        (table.weights_ALE, weights_N * scale),
        (table.counts_ALE, None),
    ):
        cells_LE = array_ALE[aspect]
        added = np.bincount(experts_N, weights=parts_N, minlength=num_cells)
        cells_LE += added.reshape(cells_LE.shape)


def observe_buckets(
    table: TrustTable, buckets_N: npt.NDArray[np.int64], nll_N: Floats, at: float, settings: TrustSettings
) -> None:
    """Add NLLs of tokens to the means of their buckets, in place. Both finite."""
    scale = _growth(at - table.clock, settings.bucket_half_life)
    table.bucket_sums_B[:] += np.bincount(buckets_N, nll_N * scale, NUM_BUCKETS)
    table.bucket_weights_B[:] += np.bincount(buckets_N, np.full(len(nll_N), scale), NUM_BUCKETS)


def merged(first: TrustTable, second: TrustTable, settings: TrustSettings) -> TrustTable:
    """Both tables' observations in one. Commutative and associative up to rounding.

    Raises TrustMismatch when they are about different experts.
    """
    if _experts_of(first) != _experts_of(second):
        raise TrustMismatch(str(_experts_of(first)), str(_experts_of(second)))
    clock = max(first.clock, second.clock)
    a, b = moved(first, clock, settings), moved(second, clock, settings)
    return replace(
        a,
        num_tokens=a.num_tokens + b.num_tokens,
        sums_ALE=a.sums_ALE + b.sums_ALE,
        weights_ALE=a.weights_ALE + b.weights_ALE,
        counts_ALE=a.counts_ALE + b.counts_ALE,
        bucket_sums_B=a.bucket_sums_B + b.bucket_sums_B,
        bucket_weights_B=a.bucket_weights_B + b.bucket_weights_B,
    )


def moved(table: TrustTable, clock: float, settings: TrustSettings) -> TrustTable:
    """The same observations, weighed as seen from another token. Shares the arrays where nothing changes."""
    if clock == table.clock:
        return table
    passed = table.clock - clock
    scale_A = np.array([_growth(passed, half_life) for half_life in settings.half_lives])[:, None, None]
    bucket_scale = _growth(passed, settings.bucket_half_life)
    return replace(
        table,
        clock=clock,
        sums_ALE=table.sums_ALE * scale_A,
        weights_ALE=table.weights_ALE * scale_A,
        bucket_sums_B=table.bucket_sums_B * bucket_scale,
        bucket_weights_B=table.bucket_weights_B * bucket_scale,
    )


def aspect_scores(table: TrustTable, settings: TrustSettings) -> Floats:
    """(A, L, E) in [0, 1]: each aspect's weighted mean, drawn towards `UNSEEN` by the prior."""
    seen = moved(table, table.now, settings)
    prior = settings.prior_weight
    scores_ALE = (UNSEEN * prior + seen.sums_ALE) / (prior + seen.weights_ALE)
    return np.clip(scores_ALE, 0.0, 1.0)


def trust_scores(table: TrustTable, settings: TrustSettings) -> Floats:
    """(L, E) in [0, 1]: the weighted mean of the aspects."""
    weights_A = np.array(settings.weights) / sum(settings.weights)
    scores_LE = np.tensordot(weights_A, aspect_scores(table, settings), axes=1)
    return np.clip(scores_LE, 0.0, 1.0)


def aspect_means(table: TrustTable, settings: TrustSettings) -> dict[str, float]:
    """Mean score of each aspect over the experts that were observed in it; aspects without any are left out."""
    scores_ALE = aspect_scores(table, settings)
    return {
        name: float(scores_LE[counts_LE > 0].mean())
        for name, scores_LE, counts_LE in zip(ASPECTS, scores_ALE, table.counts_ALE, strict=True)
        if counts_LE.any()
    }


def bucket_means(tables: Sequence[TrustTable], settings: TrustSettings) -> Floats:
    """(B,) mean NLL in nats over all tables; NaN for a bucket that has seen nothing."""
    clock = max(table.clock for table in tables)
    scales = [_growth(table.clock - clock, settings.bucket_half_life) for table in tables]
    sums_B = sum(scale * table.bucket_sums_B for scale, table in zip(scales, tables, strict=True))
    weights_B = sum(scale * table.bucket_weights_B for scale, table in zip(scales, tables, strict=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums_B / weights_B)


def bucket_of(token_ids_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A token's frequency bucket: the power of two of its id.

    BPE vocabularies number their tokens in the order of their merges, frequent ones first, so the id is a rank. No
    text has to be counted, every router agrees, and nothing about anybody's text is kept.
    """
    buckets_N: npt.NDArray[np.int64] = np.log2(token_ids_N + 1.0).astype(np.int64).clip(0, NUM_BUCKETS - 1)
    return buckets_N


def check_delta(delta: TrustTable, known: TrustTable) -> None:
    """Raises TrustMismatch for a table that is not about the same experts, or that no observations can have made."""
    if _experts_of(delta) != _experts_of(known):
        raise TrustMismatch(str(_experts_of(known)), str(_experts_of(delta)))
    sums = (delta.sums_ALE, delta.weights_ALE, delta.bucket_sums_B, delta.bucket_weights_B)
    is_sane = all(np.isfinite(array).all() and (array >= 0).all() for array in sums)
    is_sane = is_sane and bool((delta.sums_ALE <= delta.weights_ALE * (1 + 1e-9)).all())
    if not is_sane or delta.num_tokens < 0 or not math.isfinite(delta.clock) or (delta.counts_ALE < 0).any():
        raise TrustMismatch("observations from 0 to 1", "sums that are out of range")


def _experts_of(table: TrustTable) -> tuple[str, tuple[int, ...], int]:
    return table.component, table.layers, table.num_experts


def _growth(tokens: float, half_life: float) -> float:
    """What an observation weighs that was made that many tokens after the clock."""
    return math.exp2(min(tokens / half_life, MAX_DOUBLINGS)) if tokens > -MAX_DOUBLINGS * half_life else 0.0


MAX_DOUBLINGS = 500.0
"""Beyond these a weight is 0 one way; the other way, tables are moved long before."""


@dataclass(frozen=True)
class TrustReport:
    """A delta on its way to the owner. The same (sender, sequence) is added once, however often it is sent."""

    sender: str
    sequence: int
    """1, 2, 3, ... for each sender."""
    delta: TrustTable = field(repr=False)
