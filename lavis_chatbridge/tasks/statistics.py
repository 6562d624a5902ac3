"""Scores and their uncertainty: bootstrap intervals of means, and paired comparisons, by scipy.

Samples that share a medium are resampled together (cluster bootstrap). The p-value is that of a permutation test that
swaps the two values of a cluster.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from lavis_chatbridge.tasks.predictions import Prediction

_RESAMPLES, _FEWEST = 2000, 500  # more than 10,000 clusters get fewer, since their intervals need no more
_AT_ONCE = 5_000_000  # entries of a block of resamples
Values: TypeAlias = Sequence[float] | np.ndarray


@dataclass
class Measured:
    """Scores of some predictions, in total and of each.

    Attributes:
        predictions: Those with references, answers, options or facts.
        scores: Metric -> percent.
        each: Metric -> ``[n]`` percent; only metrics that are means over samples.
        weights: Metric -> ``[n]``, for means that are weighted.
        by_attribute: Attribute -> number of samples and accuracy, for captions that are scored by facts.
        tokenizer: Of captions: ``"ptb"`` (official, Java) or ``"python"`` (a rule); their scores are not comparable.
        left_out: Metric -> the reason why it was not computed.
    """

    predictions: Sequence[Prediction]
    scores: dict[str, float] = field(default_factory=dict)
    each: dict[str, np.ndarray] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    by_attribute: dict[str, dict[str, float]] = field(default_factory=dict)
    tokenizer: str = ""
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, metric: str, each: Sequence[float] | np.ndarray, score: float | None = None) -> None:
        """Add a metric that is a mean over samples."""
        self.each[metric] = np.asarray(each, dtype=float)
        self.scores[metric] = float(self.each[metric].mean()) if score is None else score

    @property
    def clusters(self) -> list[Any]:
        """The cluster of each sample, for resampling: its media, else only itself."""
        return [tuple(prediction.media) or number for number, prediction in enumerate(self.predictions)]


@dataclass(frozen=True)
class Difference:
    """The mean of B minus the mean of A on the same samples, the ends of its 95 % interval, its two-sided p-value.

    One cluster has neither interval nor p-value: they are None.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    samples: int


def interval(
    values: Values, weights: Values | None, clusters: Sequence[Hashable], seed: int = 0
) -> tuple[float, float] | None:
    """The ends of the 95 % bootstrap interval of a weighted mean; None for fewer than two clusters.

    ``values``, ``weights`` (None: equal) and ``clusters`` are ``[n]``. Samples with the same cluster share a medium.
    """
    from scipy import stats

    sums, totals = _clustered(np.asarray(values, dtype=float), weights, clusters)
    if len(totals) < 2:
        return None
    found = stats.bootstrap(
        (sums, totals),
        lambda some, of, axis: some.sum(axis) / of.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
        **_sizes(len(totals)),
    ).confidence_interval
    return float(found.low), float(found.high)


def paired(a: Values, b: Values, weights: Values | None, clusters: Sequence[Hashable]) -> Difference:
    """The difference of the means of ``b`` and ``a``, which are ``[n]`` values of the same samples."""
    from scipy import stats

    differences = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    sums, totals = _clustered(differences, weights, clusters)
    value = float(sums.sum() / totals.sum())
    if (ends := interval(differences, weights, clusters)) is None:
        return Difference(value, None, None, None, len(differences))
    p = stats.permutation_test(  # of one sample: it changes signs
        (sums,),
        lambda some, axis: some.sum(axis),
        permutation_type="samples",
        vectorized=True,
        rng=np.random.default_rng(1),
        **_sizes(len(totals)),
    ).pvalue
    return Difference(value, *ends, float(p), len(differences))


def _clustered(
    values: np.ndarray, weights: Values | None, clusters: Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted sums and total weights of the clusters."""
    each = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    numbers: dict[Hashable, int] = {}
    order = [numbers.setdefault(name, len(numbers)) for name in clusters]
    return np.bincount(order, values * each), np.bincount(order, each)


def _sizes(clusters: int) -> dict[str, int]:
    resamples = min(_RESAMPLES, max(_FEWEST, 4 * _AT_ONCE // clusters))
    return {"n_resamples": resamples, "batch": max(1, _AT_ONCE // clusters)}
