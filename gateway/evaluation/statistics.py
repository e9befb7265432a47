"""Perplexity and how sure it is. Pure; called by `gateway.evaluation.run` and `benchmarks/quality.py`.

The tokens scored in one window are one cluster: neighbouring tokens are alike, so that single tokens would promise too
much. The mean negative log likelihood per token is a ratio of sums over clusters, and its standard error is the
linearised one of such a ratio (W. G. Cochran, "Sampling Techniques", 3rd edition, 1977, section 6.4), with the normal
quantile. Several texts are strata: each has a mean of its own, and what is uncertain is which tokens of these texts
were seen, not which texts were chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NORMAL_95 = 1.959964
"""Two-sided 95% quantile of the normal distribution."""


@dataclass(frozen=True)
class Cluster:
    """Tokens scored together: how many, and their negative log likelihoods' sum, in nats."""

    num_tokens: int
    nll: float


@dataclass(frozen=True)
class Estimate:
    """A mean in nats per token, with its standard error; None where there are too few clusters to tell."""

    num_tokens: int
    mean: float
    standard_error: float | None

    @property
    def ratio(self) -> float:
        """exp(mean): a perplexity, or how many times as high one is as the other. Infinite beyond a float."""
        return _exp(self.mean)

    @property
    def ratio_95(self) -> tuple[float, float] | None:
        """95% confidence interval of `ratio`; exact where the mean is."""
        if self.standard_error is None:
            return None
        reach = NORMAL_95 * self.standard_error
        return _exp(self.mean - reach), _exp(self.mean + reach)


def estimate(strata: Sequence[Sequence[Cluster]]) -> Estimate:
    """Over all tokens of all texts. There must be one token at least."""
    total = sum(cluster.num_tokens for clusters in strata for cluster in clusters)
    mean = math.fsum(cluster.nll for clusters in strata for cluster in clusters) / total
    variances = [_variance_of_sum(clusters) for clusters in strata if clusters]
    if any(variance is None for variance in variances):
        return Estimate(total, mean, None)
    return Estimate(total, mean, math.sqrt(math.fsum(v for v in variances if v is not None)) / total)


def compare(strata: Sequence[Sequence[Cluster]], base: Sequence[Sequence[Cluster]]) -> Estimate:
    """How many times as high the perplexity is as that of `base`, which has the same clusters: `ratio` and `ratio_95`.

    Differences are taken cluster by cluster, so that how hard the text is cancels out.
    """
    return estimate([list(map(_difference, ours, theirs)) for ours, theirs in zip(strata, base, strict=True)])


def _difference(ours: Cluster, theirs: Cluster) -> Cluster:
    if ours.num_tokens != theirs.num_tokens:
        raise ValueError(f"clusters of {ours.num_tokens} and {theirs.num_tokens} tokens cannot be compared")
    return Cluster(ours.num_tokens, ours.nll - theirs.nll)


def _variance_of_sum(clusters: Sequence[Cluster]) -> float | None:
    """Of the sum of nll around this stratum's mean times its tokens; None from a single cluster."""
    if len(clusters) < 2:
        return None
    mean = math.fsum(c.nll for c in clusters) / sum(c.num_tokens for c in clusters)
    squares = math.fsum((c.nll - mean * c.num_tokens) ** 2 for c in clusters)
    return squares * len(clusters) / (len(clusters) - 1)


def _exp(value: float) -> float:
    return math.exp(value) if value < 709.0 else math.inf
