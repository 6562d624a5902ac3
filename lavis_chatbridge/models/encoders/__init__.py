"""Builds the frozen encoders that ``model.vision.encoder`` and ``model.audio.encoder`` name.

To add your own, write a function that takes the settings and returns a module with the members of
:class:`Encoder`, and decorate it with :func:`register`. ``encoder: my_module:my_name`` imports ``my_module`` first.

Shapes: ``B`` frames or clips, ``N`` tokens, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lavis_chatbridge.config import hint
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.models.settings import AudioSettings, VisionSettings


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


Build = Callable[[Any], nn.Module]
_OWN = {"vision": ("eva", "timm", "transformers"), "audio": ("beats", "transformers")}
_REGISTERED: dict[str, dict[str, Build]] = {"vision": {}, "audio": {}}


def register(part: Literal["vision", "audio"], name: str) -> Callable[[Build], Build]:
    """Decorator that registers a function (settings -> encoder) under a name."""

    def enter(build: Build) -> Build:
        _REGISTERED[part][name] = build
        return build

    return enter


def build_vision(settings: VisionSettings) -> VisionEncoder:
    """The image and video encoder of the settings, with its weights.

    Raises:
        ConfigError: If the settings name an unknown encoder, or do not fit it.
        CheckpointError: If its weights cannot be found or downloaded, or do not fit.
    """
    return cast(VisionEncoder, _builder("vision", settings.encoder)(settings))


def build_audio(settings: AudioSettings) -> AudioEncoder:
    """The audio encoder of the settings, with its weights; raises as :func:`build_vision`."""
    return cast(AudioEncoder, _builder("audio", settings.encoder)(settings))


def tokens_of(grid: Tensor, pool: int, prefix: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``[B, D, H, W]`` features averaged over ``pool`` by ``pool`` neighbours, row by row, after the prefix tokens.

    Returns:
        ``[B, N, D]`` tokens, and a mask that is true everywhere.
    """
    grid = functional.avg_pool2d(grid, pool, ceil_mode=True) if pool > 1 else grid
    tokens = grid.flatten(2).transpose(1, 2)
    tokens = tokens if prefix is None else torch.cat([prefix, tokens], dim=1)
    return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def _builder(part: str, name: str) -> Build:
    """The function ``build_vision`` or ``build_audio`` of a module of this folder, or a registered one."""
    if name in _OWN[part]:
        return getattr(import_module(f"{__name__}.{name}"), f"build_{part}")
    module, _, own = name.rpartition(":")
    if module:
        try:
            import_module(module)
        except ImportError as error:
            raise ConfigError(f"model.{part}.encoder: the module {module!r} cannot be imported ({error})") from error
    if own not in _REGISTERED[part]:
        known = [*_OWN[part], *_REGISTERED[part]]
        raise ConfigError(f"model.{part}.encoder: there is no encoder {own!r}{hint(own, known)}")
    return _REGISTERED[part][own]
