"""The encoders and the perceiver, each random or for a file to fill, and never twice in memory.

What a file fills is built on the meta device: nothing is reserved and nothing drawn for numbers that the file holds. It
then takes the file's tensors over, each converted on its own to the precision that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lavis_chatbridge.models import checkpoint, weights
from lavis_chatbridge.models.beats import Beats, BeatsConfig
from lavis_chatbridge.models.perceiver import build_perceiver
from lavis_chatbridge.models.settings import AudioSettings, PerceiverSettings, VisionSettings, torch_dtype
from lavis_chatbridge.models.vision import build_vision


def vision_encoder(settings: VisionSettings) -> nn.Module:
    """The EVA-ViT of a file, or a random one, in its precision.

    Raises:
        CheckpointError: If the file is missing or does not fit.
    """
    dtype = torch_dtype(settings.dtype)
    if settings.weights is None:
        return build_vision(settings).to(dtype)
    file = checkpoint.read(checkpoint.find(settings.weights, "model.vision.weights"))
    tensors = checkpoint.vision_tensors(file.tensors, settings.depth, settings.tokens)
    with unfilled():
        encoder = build_vision(settings)
    checkpoint.load_exactly(encoder, tensors, file.path, "model.vision", dtype)
    return encoder


def audio_encoder(settings: AudioSettings) -> Beats:
    """The BEATs of a file, or a random one, in its precision.

    Raises:
        CheckpointError: If the file is missing or does not fit.
        ConfigError: If the file holds a variant that is not built here.
    """
    dtype = torch_dtype(settings.dtype)
    if settings.weights is None:
        return Beats(settings.config or BeatsConfig()).to(dtype)
    file = checkpoint.read(checkpoint.find(settings.weights, "model.audio.weights"))
    config = weights.beats_config_of(file, settings)
    tensors = checkpoint.beats_tensors(file.tensors, config.encoder_layers)
    with unfilled():
        encoder = Beats(config)
    checkpoint.load_exactly(encoder, tensors, file.path, "model.audio", dtype)
    return encoder


def perceiver(settings: PerceiverSettings, encoder_width: int) -> nn.Module:
    """A random perceiver, or one without numbers where a file is named that will fill it.

    Args:
        settings: Its sizes and its file.
        encoder_width: Width of the tokens that the cross-attention reads.
    """
    if settings.weights is None:
        return build_perceiver(settings, encoder_width)
    with unfilled():
        return build_perceiver(settings, encoder_width)


@contextmanager
def unfilled() -> Iterator[None]:
    """Modules that are built inside have shapes and no numbers; what they count (positions, schedules) is real."""
    with torch.device("meta"), _CountForReal():
        yield


class _CountForReal(TorchFunctionMode):
    """LAVIS reads a schedule while it builds an EVA-ViT, and no file holds the Q-Former's positions."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if function in (torch.arange, torch.linspace):
            named.setdefault("device", "cpu")
        return function(*args, **named)
