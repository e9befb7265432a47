"""The mean, and an interval that covers it as often as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gateway.evaluation.statistics import Cluster, compare, estimate


def test_perplexity_is_of_all_tokens_whatever_the_clusters() -> None:
    found = estimate([[Cluster(2, 3.0), Cluster(4, 9.0)], [Cluster(2, 4.0)] * 2])
    assert found.num_tokens == 10
    assert found.ratio == pytest.approx(math.exp(20.0 / 10))


def test_clusters_that_are_alike_leave_nothing_uncertain() -> None:
    found = estimate([[Cluster(5, 10.0)] * 4, [Cluster(5, 20.0)] * 4])
    assert found.standard_error == 0.0, "that texts differ is not uncertainty about these texts"
    assert found.ratio_95 == (found.ratio, found.ratio)


def test_one_window_tells_no_interval() -> None:
    found = estimate([[Cluster(5, 10.0)]])
    assert found.standard_error is None and found.ratio_95 is None


def test_equal_clusters_have_the_standard_error_of_their_means() -> None:
    sums = [3.0, 5.0, 4.0, 8.0]
    found = estimate([[Cluster(2, nll) for nll in sums]])
    means = np.array(sums) / 2
    assert found.standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(4))


def test_interval_covers_the_true_perplexity_as_often_as_it_says() -> None:
    """Tokens of a window share a level, as those of real texts do; the seed is fixed."""
    random = np.random.default_rng(11)
    covered = 0
    for _ in range(400):
        counts = random.integers(10, 30, 60)
        levels = random.normal(3.0, 0.5, 60)
        nll = [float(random.normal(level, 2.0, n).sum()) for level, n in zip(levels, counts, strict=True)]
        clusters = [Cluster(int(n), total) for n, total in zip(counts, nll, strict=True)]
        interval = estimate([clusters]).ratio_95
        assert interval is not None
        covered += interval[0] <= math.exp(3.0) <= interval[1]
    assert 0.92 <= covered / 400 <= 0.98


def test_comparison_takes_out_how_hard_the_text_is() -> None:
    base = [[Cluster(4, nll) for nll in (4.0, 40.0, 12.0, 20.0)]]
    worse = [[Cluster(4, cluster.nll + 4 * math.log(1.02)) for cluster in base[0]]]
    found = compare(worse, base)
    assert found.ratio == pytest.approx(1.02)
    assert found.ratio_95 == pytest.approx((1.02, 1.02))


def test_runs_over_other_windows_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="4 and 5 tokens"):
        compare([[Cluster(4, 1.0)]], [[Cluster(5, 1.0)]])


def test_perplexity_beyond_a_float_is_infinite() -> None:
    assert estimate([[Cluster(1, 1000.0)] * 2]).ratio == math.inf
