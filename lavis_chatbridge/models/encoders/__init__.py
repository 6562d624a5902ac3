"""Builds the frozen encoders that ``model.vision.encoder`` and ``model.audio.encoder`` name.

An encoder of your own is a function that takes the settings and returns a module with the members of :class:`Encoder`;
``encoder: my_module:my_function`` imports and calls it.

Shapes: ``B`` frames or clips, ``N`` tokens, ``D`` width.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from lavis_chatbridge.config import hint
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.models.settings import AudioSettings, VisionSettings

_OWN = {"vision": ("eva", "timm", "transformers"), "audio": ("beats", "transformers")}


class Encoder(Protocol):
    """A frozen encoder, which is also an ``nn.Module``.

    Attributes:
        width: ``D`` of its tokens.
        description: All settings (not weights) that affect its output; part of the hash of cached features.
    """

    width: int
    description: str

    def encode(self, batch: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens of frames or clips.

        Args:
            batch: ``[B, 3, H, W]`` frames, or ``[B, ...]`` clips as the encoder's processor returns them.
            lengths: ``[B]`` number of valid time steps of each clip; the rest is padding. None: all are valid.

        Returns:
            ``[B, N, D]`` tokens and ``[B, N]`` bool, false for padding.
        """
        ...


class VisionEncoder(Encoder, Protocol):
    """An encoder of frames; ``frame_shape`` is ``(3, H, W)``."""

    frame_shape: tuple[int, int, int]


class AudioEncoder(Encoder, Protocol):
    """An encoder of clips; their dimension ``time_axis`` is padded to multiples of ``patch`` steps."""

    patch: int
    time_axis: int


def build_vision(settings: VisionSettings) -> VisionEncoder:
    """The image and video encoder of the settings, with its weights.

    Raises:
        ConfigError: If the settings name an unknown encoder, or do not fit it.
        CheckpointError: If its weights cannot be found or downloaded, or do not fit.
    """
    return _build("vision", settings)


def build_audio(settings: AudioSettings) -> AudioEncoder:
    """The audio encoder of the settings, with its weights; raises as :func:`build_vision`."""
    return _build("audio", settings)


def tokens_of(grid: Tensor, pool: int, prefix: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``[B, D, H, W]`` features averaged over ``pool`` by ``pool`` neighbours, row by row, after the prefix tokens.

    Returns:
        ``[B, N, D]`` tokens, and a mask that is true everywhere.
    """
    grid = functional.avg_pool2d(grid, pool, ceil_mode=True) if pool > 1 else grid
    tokens = grid.flatten(2).transpose(1, 2)
    tokens = tokens if prefix is None else torch.cat([prefix, tokens], dim=1)
    return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def _build(part: str, settings: VisionSettings | AudioSettings) -> Any:
    """Call ``build_vision`` or ``build_audio`` of a module of this folder, or a user's ``MODULE:FUNCTION``."""
    name = settings.encoder
    module, _, function = name.partition(":")
    if name in _OWN[part]:
        module, function = f"{__name__}.{name}", f"build_{part}"
    elif not function:
        raise ConfigError(f"model.{part}.encoder: unknown encoder {name!r}{hint(name, _OWN[part])}")
    try:
        build = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model.{part}.encoder: {name!r} cannot be imported ({error})") from error
    return build(settings)
