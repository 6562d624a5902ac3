"""The uncertainty of scores: bootstrap intervals of means, and paired comparisons of two sets of values.

Samples that share a medium are resampled together (cluster bootstrap). The intervals are percentile intervals, as
``scipy.stats.bootstrap(method="percentile")`` gives them; the p-value is that of a permutation test that swaps the
two values of a cluster, as ``scipy.stats.permutation_test(permutation_type="samples")`` does.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES, FEWEST = 2000, 500
"""Number of bootstrap resamples; sets of more than 10,000 clusters need and get fewer."""
LEVEL = 0.95
_AT_ONCE = 5_000_000  # entries of a block of resampling counts


@dataclass(frozen=True)
class Difference:
    """The mean of B minus the mean of A, on the same samples.

    Attributes:
        value: The difference of the two means.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p: Two-sided p-value of the hypothesis that A and B are equally good.
        samples: Number of samples.
    """

    value: float
    low: float
    high: float
    p: float
    samples: int


def interval(
    values: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % bootstrap interval of a weighted mean.

    Args:
        values: ``[..., n]``; each leading index is a separate set of values, all resampled alike.
        weights: ``[n]`` weights of the mean; by default ones.
        clusters: ``[n]`` the cluster (medium) of each sample; by default each sample is its own cluster.
        seed: Seed of the resampling.

    Returns:
        Lower and upper ends, each ``[...]``.
    """
    sums, totals = _clustered(np.asarray(values, dtype=float), weights, clusters)
    means = np.concatenate([(sums @ counts.T) / (totals @ counts.T) for counts in _resampled(len(totals), seed)], -1)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(means, [tail, 100 - tail], axis=-1)
    return low, high


def paired(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Difference:
    """The difference of the means of ``b`` and ``a``, which are ``[n]`` values of the same samples."""
    differences = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    sums, totals = _clustered(differences, weights, clusters)
    low, high = interval(differences, weights, clusters, seed)
    observed = sums.sum() / totals.sum()
    rng = np.random.default_rng([seed, 1])
    as_large = 0
    for size in _blocks(len(totals)):
        signs = rng.integers(0, 2, (size, len(totals)), dtype=np.int8) * 2 - 1
        as_large += int((np.abs(signs @ sums) >= abs(sums.sum()) * (1 - 1e-12)).sum())
    p = (as_large + 1) / (sum(_blocks(len(totals))) + 1)
    return Difference(float(observed), float(low), float(high), p, differences.shape[-1])


def over_seeds(scores: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of the population of seeds: n - 1) of the scores of several seeds; 0 for one."""
    return float(np.mean(scores)), float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0


def _clustered(
    values: np.ndarray, weights: Sequence[float] | np.ndarray | None, clusters: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted sums ``[..., k]`` and total weights ``[k]`` of the clusters."""
    count = values.shape[-1]
    each = np.ones(count) if weights is None else np.asarray(weights, dtype=float)
    if clusters is None:
        return values * each, each
    names = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    order = np.array([names[name] for name in clusters])
    totals = np.bincount(order, each, len(names))
    flat = (values * each).reshape(-1, count)
    sums = np.stack([np.bincount(order, row, len(names)) for row in flat])
    return sums.reshape(*values.shape[:-1], len(names)), totals


def _blocks(clusters: int) -> Iterator[int]:
    """Sizes of blocks of resamples that fit into memory."""
    total = min(RESAMPLES, max(FEWEST, 4 * _AT_ONCE // max(1, clusters)))
    size = max(1, min(total, _AT_ONCE // max(1, clusters)))
    for start in range(0, total, size):
        yield min(size, total - start)


def _resampled(clusters: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks ``[r, k]`` with the number of times each cluster was sampled, one row per resample."""
    rng = np.random.default_rng(seed)
    for size in _blocks(clusters):
        picked = rng.integers(0, clusters, (size, clusters)) + clusters * np.arange(size)[:, None]
        yield np.bincount(picked.ravel(), minlength=size * clusters).reshape(size, clusters).astype(float)
