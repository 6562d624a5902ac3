"""The types of processed and encoded media, which processors pass to the model."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AudioClips(NamedTuple):
    """One sound as filterbank clips."""

    fbank: Tensor
    """``[N, F, M]`` normalised log-mel filterbank: clips, frames of 10 ms, mel bins."""
    frames: Tensor
    """``[N]`` number of valid frames of each clip; the rest of its ``F`` frames is padding."""


class EncodedMedium(NamedTuple):
    """The output of frozen encoder and layer norm for one medium, as stored in feature caches."""

    tokens: Tensor
    """``[T, N, D]``: frames or clips, tokens of each, encoder width."""
    mask: Tensor
    """``[T, N]`` bool, true where a token represents content (false for padded audio)."""
