"""The samples of each step, as a pure function of seed and step, so that any rank can compute any step directly.

A schedule gives the source of a step; a closed form counts the earlier steps of that source. A keyed permutation of
``0..size-1`` (a Feistel network with cycle-walking) gives the samples, without a shuffled array. Therefore 130 million
samples need no memory, and step 100,000 costs as much as step 0. This module uses indices, but no samples. A *source*
is one of a mixture (see `datasets.loader`), not `Sample.source`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from lavis_chatbridge.errors import ConfigError

_MASK = (1 << 64) - 1
_ROUNDS = 6
_RATIO_PRECISION = 10**6


class KeyedPermutation:
    """A pseudo-random permutation of ``0..size-1``, computed per element; ``key`` (any integers) selects it."""

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._low = np.uint64(bits // 2)
        self._high = np.uint64(bits - bits // 2)
        self._keys = [np.uint64(_hash(*key, round_)) for round_ in range(_ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """``[n]`` positions in ``0..size-1`` -> ``[n]`` int64 elements."""
        values = np.asarray(positions).astype(np.uint64)
        outside = np.full(len(values), True)
        while outside.any():  # the domain is smaller than twice the size, so walks are short
            values[outside] = self._scramble(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def _scramble(self, values: np.ndarray) -> np.ndarray:
        """One pass of the Feistel network over ``low + high`` bits; the halves swap in every round."""
        one = np.uint64(1)
        right_bits, left_bits = self._low, self._high
        for key in self._keys:
            right, left = values & ((one << right_bits) - one), values >> right_bits
            mixed = _mix(right ^ key) & ((one << left_bits) - one)
            values = (right << left_bits) | (left ^ mixed)
            right_bits, left_bits = left_bits, right_bits
        return values


class _Schedule:
    """The source of each step: shuffled blocks with exact counts.

    In the first ``n`` blocks, each source gets its share rounded down, and the most frequent one gets the rest. So the
    number of earlier steps of a source can be computed directly.
    """

    def __init__(self, ratios: list[float], seed: int) -> None:
        total = sum(ratios)
        least = Fraction(1, _RATIO_PRECISION)  # so that every source occurs
        shares = [max(least, Fraction(ratio / total).limit_denominator(_RATIO_PRECISION)) for ratio in ratios]
        scale = math.lcm(*(share.denominator for share in shares))
        self._weights = [int(share * scale) for share in shares]
        few = len(ratios) * (len(ratios) + 1)  # large enough that the most frequent source's remainder is positive
        period = sum(self._weights)
        self._block = period if period <= max(few, 12) else few
        self._seed = seed

    def at(self, step: int) -> tuple[int, list[int]]:
        """The source of a step, and the number of earlier steps of each source."""
        number, inside = divmod(step, self._block)
        before, after = (self._counts(block * self._block) for block in (number, number + 1))
        members = [source for source, (a, b) in enumerate(zip(before, after, strict=True)) for _ in range(b - a)]
        order = sorted(range(self._block), key=lambda i: _hash(self._seed, number, i))
        sources = [members[i] for i in order]
        for source in sources[:inside]:
            before[source] += 1
        return sources[inside], before

    def _counts(self, steps: int) -> list[int]:
        """The number of steps of each source among the first ``steps`` steps (whole blocks)."""
        counts = [weight * steps // sum(self._weights) for weight in self._weights]
        top = self._weights.index(max(self._weights))
        counts[top] += steps - sum(counts)
        return counts


class MixturePlan:
    """The samples of every step of a run over several sources.

    All ranks have the same source at a step. Rank ``r`` of ``W`` gets slice ``r`` of the global batch, so that ``W``
    ranks with batch ``B`` get the same samples as one rank with batch ``B * W``. Each source has its own shuffled
    epochs: every sample once per epoch, and the last batch of an epoch is completed from the next one.

    Args:
        ratios: Frequency of each source's steps, in any unit; by default its share of all samples.
        batch_size: Samples per step and rank, one number or one per source.
        lengths: Per source, an integer array ``[size]`` of sample lengths; a batch then has samples of similar length.
        group: With ``lengths``: sort this many consecutive global batches (a window) by length.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        ratios: Mapping[str, float] | None = None,
        batch_size: int | Mapping[str, int] = 1,
        world_size: int = 1,
        seed: int = 0,
        lengths: Mapping[str, np.ndarray] | None = None,
        group: int = 32,
    ) -> None:
        ratios = sizes if ratios is None else ratios
        if set(ratios) != set(sizes):
            raise ConfigError(f"a mixture needs a ratio for each of {', '.join(sizes)}, found {dict(ratios)}")
        self.names, self.sizes = list(sizes), dict(sizes)
        self.ratios = {name: float(ratios[name]) for name in sizes}
        self.batch_sizes = dict.fromkeys(sizes, batch_size) if isinstance(batch_size, int) else dict(batch_size)
        self.world_size, self.seed = world_size, seed
        self.lengths, self.group = dict(lengths or {}), group
        self._schedule = _Schedule(list(self.ratios.values()), _hash(seed, 0))
        self.resume(0, dict.fromkeys(sizes, 0))

    def resume(self, step: int, positions: Mapping[str, int]) -> None:
        """Continue at ``step`` from the `positions` of an earlier plan with other batch sizes or ranks."""
        self.origin = (step, dict(positions))
        self._earlier_steps = self._schedule.at(step)[1]
        self._window: tuple[tuple[str, int], np.ndarray] | None = None

    def positions(self, step: int) -> dict[str, int]:
        """Per source, the number of samples used before ``step``, over all its epochs.

        Sources with ``lengths`` count complete windows: a plan with other sizes cannot continue inside a window, so it
        skips the rest of it.
        """
        found = {}
        for name, before, now in zip(self.names, self._earlier_steps, self._schedule.at(step)[1], strict=True):
            steps = now - before
            if name in self.lengths:
                steps = -(-steps // self.group) * self.group
            found[name] = self.origin[1][name] + steps * self.batch_sizes[name] * self.world_size
        return found

    def batch(self, step: int, rank: int = 0) -> tuple[str, list[tuple[int, int]]]:
        """The samples of a rank at a step (from 0): the source, and ``(index, epoch)`` of each sample."""
        number, before = self._schedule.at(step)
        name, turn = self.names[number], before[number] - self._earlier_steps[number]
        size = self.batch_sizes[name]
        if name in self.lengths:
            # samples of similar length go to different ranks, so that all ranks take about the same time
            positions = self._sorted(name, turn).reshape(size, self.world_size)[:, rank]
        else:
            positions = self.origin[1][name] + (turn * self.world_size + rank) * size + np.arange(size)
        indices, epochs = self.samples_at(name, positions)
        return name, [(int(index), int(epoch)) for index, epoch in zip(indices, epochs, strict=True)]

    def samples_at(self, name: str, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``[n]`` positions in a source's sequence of epochs -> ``[n]`` sample indices and ``[n]`` epochs."""
        size = self.sizes[name]
        epochs = positions // size
        found = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            order = KeyedPermutation(size, self.seed, 1, self.names.index(name), int(epoch))
            found[chosen] = order(positions[chosen] % size)
        return found, epochs

    def steps_per_epoch(self) -> int:
        """Number of steps that use as many samples as all sources contain together."""
        return max(1, math.ceil(sum(self.sizes.values()) / self._samples_per_step()))

    def steps_of(self, epochs: int, step: int | None = None, positions: Mapping[str, int] | None = None) -> int:
        """Total steps for ``epochs`` epochs; for a run resumed at ``step`` (by default `resume`'s) with
        ``positions``: the steps so far plus those for the remaining samples."""
        first = self.origin[0] if step is None else step
        if first == 0:
            return epochs * self.steps_per_epoch()
        left = epochs * sum(self.sizes.values()) - sum((positions or self.origin[1]).values())
        return first + max(0, math.ceil(left / self._samples_per_step()))

    def _samples_per_step(self) -> float:
        """Mean number of samples per step on all ranks together."""
        weighted = sum(self.ratios[name] * self.batch_sizes[name] for name in self.names)
        return weighted / sum(self.ratios.values()) * self.world_size

    def _sorted(self, name: str, turn: int) -> np.ndarray:
        """Positions of a source's ``turn``-th global batch, after sorting by length."""
        window, inside = divmod(turn, self.group)
        if self._window is None or self._window[0] != (name, window):
            per_batch = self.batch_sizes[name] * self.world_size
            start = self.origin[1][name] + window * self.group * per_batch
            positions = np.arange(start, start + self.group * per_batch)
            lengths = np.asarray(self.lengths[name])[self.samples_at(name, positions)[0]]
            batches = positions[np.argsort(lengths, kind="stable")].reshape(self.group, per_batch)
            order = KeyedPermutation(self.group, self.seed, 2, self.names.index(name), window)
            self._window = ((name, window), batches[order(np.arange(self.group))])
        return self._window[1][inside]


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64 (Steele et al. 2014); overflow is intended."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _hash(*numbers: int) -> int:
    """A 64-bit hash of the numbers in order, equal on every machine and in every version."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state ^= state >> 29
        state = state * 0x94D049BB133111EB & _MASK
        state = (state ^ (state >> 32)) + 0x9E3779B97F4A7C15 & _MASK
    return state
