"""Intervals and p-values of weighted, clustered samples."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lavis_chatbridge.tasks import statistics


def test_equal_values_differ_by_nothing() -> None:
    found = statistics.paired([0.0, 100.0], [0.0, 100.0], clusters=["a", "b"])
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("clusters", [["a"], ["a"] * 3], ids=["one sample", "one medium"])
def test_one_cluster_has_neither_interval_nor_p(clusters: list[str]) -> None:
    values = [100.0] * len(clusters)
    assert statistics.interval(values, clusters=clusters) is None
    found = statistics.paired([0.0] * len(clusters), values, clusters=clusters)
    assert (found.value, found.low, found.high, found.p) == (100.0, None, None, None)


def test_samples_that_share_a_medium_count_as_one() -> None:
    right = np.random.default_rng(1).random(100) < 0.6
    alone = statistics.interval(100.0 * right)
    shared = statistics.interval(100.0 * np.repeat(right, 5), clusters=np.repeat(np.arange(100), 5).tolist())
    assert shared == pytest.approx(alone)
    assert alone[0] < 100.0 * right.mean() < alone[1]


def test_a_clear_difference_has_a_small_p() -> None:
    rng = np.random.default_rng(4)
    a = 100.0 * (rng.random(400) < 0.5)
    found = statistics.paired(a, np.where(rng.random(400) < 0.12, 100.0, a))
    assert 0.0 < found.low < found.value < found.high
    assert found.p < 0.001
    assert statistics.paired(a, a + rng.normal(0.0, 30.0, 400)).p > 0.01


def test_weights_make_a_mean_of_all_parts() -> None:
    low, high = statistics.interval([100.0, 0.0], weights=[3.0, 1.0])
    assert (low, high) == (0.0, 100.0)
    assert statistics.paired([0.0, 0.0], [100.0, 0.0], weights=[3.0, 1.0]).value == 75.0


def test_intervals_cover_the_truth_in_95_percent_of_simulated_suites() -> None:
    rng, truth = np.random.default_rng(0), 0.4
    covered = 0
    for _ in range(2000):  # 60 media with two questions each, which are right together more often than alone
        shared = rng.random((60, 1)) < 0.5
        right = np.where(shared, rng.random((60, 1)) < truth, rng.random((60, 2)) < truth).ravel()
        low, high = statistics.interval(right, clusters=[n // 2 for n in range(120)], seed=int(rng.integers(2**31)))
        covered += low <= truth <= high
    assert 0.93 <= covered / 2000 <= 0.97


def test_a_comparison_agrees_with_scipys_paired_bootstrap_of_both_runs() -> None:
    rng = np.random.default_rng(3)
    a = rng.random(80) < 0.5
    b = a | (rng.random(80) < 0.2)
    found = statistics.paired(a, b)
    expected = stats.bootstrap(
        (a.astype(float), b.astype(float)),
        lambda x, y, axis: y.mean(axis) - x.mean(axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.015)
    assert found.value == pytest.approx(b.mean() - a.mean())
