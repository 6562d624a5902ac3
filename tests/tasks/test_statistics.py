"""Intervals cover the truth, and agree with scipy's bootstrap and permutation test."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lavis_chatbridge.tasks import statistics


def test_intervals_cover_the_truth_of_95_in_100_suites() -> None:
    rng = np.random.default_rng(1)
    media, questions, suites = 150, 3, 2000
    difficulty = rng.beta(3, 2, (suites, media, 1))  # questions about one medium are alike
    right = 100.0 * (rng.random((suites, media, questions)) < difficulty).reshape(suites, -1)
    clusters = np.repeat(np.arange(media), questions)
    low, high = statistics.interval(right, clusters=clusters)
    covered = float(np.mean((low <= 60.0) & (high >= 60.0)))
    assert covered == pytest.approx(0.95, abs=0.02)
    low, high = statistics.interval(right)
    assert np.mean((low <= 60.0) & (high >= 60.0)) < covered  # without clusters they are too narrow


def test_an_interval_is_scipys_percentile_interval() -> None:
    values = np.random.default_rng(2).gamma(2.0, 20.0, 300)
    ours = statistics.interval(values)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(3))
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.5)


def test_a_paired_comparison_is_scipys() -> None:
    rng = np.random.default_rng(4)
    a = 100.0 * (rng.random(400) < 0.5)
    b = np.where(rng.random(400) < 0.12, 100.0, a)
    found = statistics.paired(a, b)
    theirs = stats.bootstrap(
        (a, b), lambda x, y, axis: np.mean(y - x, axis=axis), paired=True, n_resamples=20_000, method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    assert found.value == pytest.approx(b.mean() - a.mean())
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.5)
    assert found.p < 0.001
    c = a + rng.normal(0.0, 30.0, 400)
    theirs_p = stats.permutation_test(
        (a, c), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", n_resamples=9999,
        rng=np.random.default_rng(6),
    ).pvalue  # fmt: skip
    assert statistics.paired(a, c).p == pytest.approx(theirs_p, abs=0.04)


def test_equal_values_differ_by_nothing() -> None:
    found = statistics.paired([0.0, 100.0], [0.0, 100.0], clusters=["a", "b"])
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_weights_make_a_mean_of_all_parts() -> None:
    low, high = statistics.interval([100.0, 0.0], weights=[3.0, 1.0])
    assert (low, high) == (0.0, 100.0)
    assert statistics.paired([0.0, 0.0], [100.0, 0.0], weights=[3.0, 1.0]).value == 75.0


def test_seeds_have_a_mean_and_a_deviation() -> None:
    assert statistics.over_seeds([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert statistics.over_seeds([5.0]) == (5.0, 0.0)
