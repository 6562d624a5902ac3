"""Selects frames of a video or clips of a sound. Index arithmetic only: knows no media."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


def one_of_each(items: Sequence[int], chunks: int, rng: np.random.Generator | None = None) -> list[int]:
    """Split ``items`` into ``chunks`` runs and take one item of each: a random one with ``rng``, else the middle one.

    There must be at least ``chunks`` items. The runs' lengths differ by at most one; longer runs come first.
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
    its segment with ``rng`` (training), and the middle one without (evaluation).
    """
    lengthened = list(range(count)) + [count - 1] * (frames - count)
    return one_of_each(lengthened, frames, rng)


def uniform_frame_indices(count: int, frames: int) -> list[int]:
    """The first frame of each of ``frames`` equal segments, at most ``count`` (original: the demo's processor)."""
    taken = min(count, frames)
    return [index * count // taken for index in range(taken)]


def clip_indices(
    length: int, clip: int, shortest: float, most: int, rng: np.random.Generator | None = None
) -> list[int]:
    """Indices of the clips of a sound to use: all, or one of each of ``most`` segments.

    Args:
        length: The sound's length.
        clip: Length of a clip, in the same unit.
        shortest: Drop a shorter remainder at the end.
        most: Maximum number of clips.
        rng: Chooses a random clip of each segment; None: the middle one.
    """
    count = -(-length // clip)
    if count > 1 and length - (count - 1) * clip < shortest:
        count -= 1
    return list(range(count)) if count <= most else one_of_each(range(count), most, rng)
