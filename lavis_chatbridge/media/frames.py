"""Selects frames of a video or clips of a sound. Index arithmetic only: knows no media."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def one_of_each(items: Sequence[T], chunks: int, rng: np.random.Generator | None = None) -> list[T]:
    """One item of each of ``chunks`` runs: a random one with ``rng``, else the middle one.

    ``items`` must be at least ``chunks`` long; the runs' lengths differ by at most one, the longer ones come first.
    """
    length, surplus = divmod(len(items), chunks)
    ends = [length * chunk + min(chunk, surplus) for chunk in range(chunks + 1)]
    runs = [items[start:end] for start, end in pairwise(ends)]
    if rng is None:
        return [run[(len(run) + 1) // 2 - 1] for run in runs]
    return [run[int(rng.integers(len(run)))] for run in runs]


def frame_indices(count: int, frames: int, rng: np.random.Generator | None = None) -> list[int]:
    """``frames`` indices into a video of ``count`` frames, evenly spaced and in order.

    A shorter video repeats its last frame (original: ``data.py`` of the training reader). Each index is a random one of
    its stretch with ``rng`` (training), and the middle one without (evaluation).
    """
    lengthened = list(range(count)) + [count - 1] * (frames - count)
    return one_of_each(lengthened, frames, rng)


def uniform_frame_indices(count: int, frames: int) -> list[int]:
    """The first frame of each of ``frames`` equal stretches, at most ``count`` (original: the demo's processor)."""
    taken = min(count, frames)
    return [index * count // taken for index in range(taken)]
