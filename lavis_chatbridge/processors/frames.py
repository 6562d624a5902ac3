"""Which frames of a video, or clips of a sound, are taken: index arithmetic, without media."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def nearly_equal_chunks(items: Sequence[T], chunks: int) -> list[Sequence[T]]:
    """``items`` cut into ``chunks`` runs whose lengths differ by one at most, the longer ones first."""
    length, surplus = divmod(len(items), chunks)
    ends = [length * chunk + min(chunk, surplus) for chunk in range(chunks + 1)]
    return [items[start:end] for start, end in pairwise(ends)]


def one_of_each(items: Sequence[T], chunks: int, rng: np.random.Generator | None = None) -> list[T]:
    """One item of each of ``chunks`` nearly equal runs: drawn by ``rng``, or the middle one without it.

    Args:
        items: At least ``chunks`` of them.
        chunks: How many to take.
        rng: Source of chance.
    """
    if rng is None:
        return [chunk[(len(chunk) + 1) // 2 - 1] for chunk in nearly_equal_chunks(items, chunks)]
    return [chunk[int(rng.integers(len(chunk)))] for chunk in nearly_equal_chunks(items, chunks)]


def frame_indices(count: int, frames: int, rng: np.random.Generator | None = None) -> list[int]:
    """``frames`` indices into a video of ``count`` frames, spread over it in order.

    A shorter video is lengthened by repeating its last frame. (Original: ``data.py`` of the training reader.)

    Args:
        count: Frames in the video.
        frames: How many to take.
        rng: With it a random frame of each stretch, as in training; without it the middle one, as in evaluation.
    """
    lengthened = list(range(count)) + [count - 1] * (frames - count)
    return one_of_each(lengthened, frames, rng)


def uniform_frame_indices(count: int, frames: int) -> list[int]:
    """The first frame of each of ``frames`` equal stretches, at most ``count``. (Original: the demo's processor.)"""
    taken = min(count, frames)
    return [index * count // taken for index in range(taken)]
