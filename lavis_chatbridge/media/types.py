"""What a processed or encoded medium is: the forms in which media travel from processors to the model."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AudioClips(NamedTuple):
    """One sound as filterbank clips.

    Attributes:
        fbank: ``[N, F, M]`` normalised log-mel filterbank: clips, frames of 10 ms, mel bins.
        frames: ``[N]`` how many of the ``F`` frames of each clip are sound; the rest is padding.
    """

    fbank: Tensor
    frames: Tensor


class EncodedMedium(NamedTuple):
    """One medium after its frozen encoder and layer norm: what a feature cache holds.

    Attributes:
        tokens: ``[T, N, D]``: frames or clips, tokens of each, encoder width.
        mask: ``[T, N]`` bool, true where a token stands for content (false for padded audio).
    """

    tokens: Tensor
    mask: Tensor
