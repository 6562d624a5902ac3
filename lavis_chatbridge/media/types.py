"""The types of processed and encoded media, which processors pass to the model."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AudioClips(NamedTuple):
    """One sound as filterbank clips."""

    fbank: Tensor
    """``[N, F, M]`` normalised log-mel filterbank: clips, frames of 10 ms, mel bins."""
    frames: Tensor
    """``[N]`` number of the ``F`` frames of each clip that are sound; the rest is padding."""


class EncodedMedium(NamedTuple):
    """One medium after its frozen encoder and layer norm, as feature caches store it."""

    tokens: Tensor
    """``[T, N, D]``: frames or clips, tokens of each, encoder width."""
    mask: Tensor
    """``[T, N]`` bool, true where a token represents content (false for padded audio)."""
