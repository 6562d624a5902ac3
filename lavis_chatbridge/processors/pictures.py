"""From RGB bytes to what the vision encoder takes: crop, resize, CLIP's mean and standard deviation.

Pictures and frames of videos go the same way. Legend: `T` frames, `H` `W` size of the source, `S` size of the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_OVERSAMPLING = 2
"""A large JPEG is decoded at a fraction of its size, but not below this many pixels for each of the result."""


@dataclass(frozen=True)
class PictureSettings:
    """How pictures are prepared.

    Attributes:
        image_size: Side of the result, in pixels.
        resize: "squash" the whole picture into the square, or "crop" its central square first.
        interpolation: Of the resizing.
        antialias: Whether every pixel of the source counts when it is made smaller.
        arithmetic: "bytes" resizes bytes with torch, equal to Pillow to one level in 256, and may decode large JPEGs
            at a fraction of their size; "pillow" is Pillow itself, as in the original's demo; "float" resizes
            floating-point pixels, as in the original's training reader.
        mean: Subtracted from the channels, which lie in [0, 1].
        std: Divides them then.
        background: What shows through transparent parts.
    """

    image_size: int = 224
    resize: Literal["squash", "crop"] = "squash"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = True
    arithmetic: Literal["bytes", "pillow", "float"] = "bytes"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    background: tuple[int, ...] = (255, 255, 255)

    def check(self) -> Iterator[str]:
        """Yields what contradicts."""
        if self.image_size < 1:
            yield f"image_size is {self.image_size}, expected at least 1"
        if self.arithmetic == "pillow" and not self.antialias:
            yield "arithmetic 'pillow' always antialiases; choose 'float' or 'bytes' for antialias: false"
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std, default=0.0) <= 0.0:
            yield "mean and std need 3 values each, std above 0"
        if len(self.background) != 3 or not all(0 <= value <= 255 for value in self.background):
            yield "background needs 3 values from 0 to 255"


@dataclass(frozen=True)
class TrainPictureSettings(PictureSettings):
    """How pictures are prepared and varied in training. Mildly, because places and sizes matter to captions.

    Attributes:
        crop_scale: Least and largest share of the picture's area that is kept.
        flip: Whether every other picture is mirrored; that makes "left" and "right" in its caption wrong.
    """

    crop_scale: tuple[float, ...] = (0.9, 1.0)
    flip: bool = False

    def check(self) -> Iterator[str]:
        """Yields what contradicts."""
        yield from super().check()
        if len(self.crop_scale) != 2 or not 0.0 < self.crop_scale[0] <= self.crop_scale[-1] <= 1.0:
            yield f"crop_scale is {list(self.crop_scale)}, expected two shares of the area in (0, 1], the smaller first"


def prepare(frames: np.ndarray, settings: PictureSettings, rng: np.random.Generator | None = None) -> Tensor:
    """Pictures of one size as the encoder's input.

    Args:
        frames: uint8 ``[T,H,W,3]``. All are cropped and mirrored alike.
        settings: With `TrainPictureSettings` and ``rng``, the pictures are varied.
        rng: Source of chance.

    Returns:
        float32 ``[T,3,S,S]``.
    """
    mirrored = False
    if settings.resize == "crop":
        frames = _central_square(frames)
    if rng is not None and isinstance(settings, TrainPictureSettings):
        frames = _random_crop(frames, settings.crop_scale, rng)
        mirrored = settings.flip and bool(rng.integers(2))
    pixels = _resized(frames, settings)
    if mirrored:
        pixels = pixels.flip(-1)
    mean = torch.tensor(settings.mean, dtype=torch.float32)[:, None, None] * 255.0
    scale = 1.0 / (torch.tensor(settings.std, dtype=torch.float32)[:, None, None] * 255.0)
    return pixels.float().sub_(mean).mul_(scale).contiguous()


def least_side(settings: PictureSettings) -> int | None:
    """The shortest side at which a photo may be decoded, or None where its full size is wanted."""
    if settings.arithmetic != "bytes" or not settings.antialias:
        return None
    kept = settings.crop_scale[0] if isinstance(settings, TrainPictureSettings) else 1.0
    return math.ceil(_OVERSAMPLING * settings.image_size / math.sqrt(kept))


def _central_square(frames: np.ndarray) -> np.ndarray:
    height, width = frames.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return frames[:, top : top + side, left : left + side]


def _random_crop(frames: np.ndarray, scale: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """A rectangle of the picture's own shape, of a random share of its area, at a random place."""
    share = math.sqrt(rng.uniform(scale[0], scale[1]))
    height, width = (max(1, round(side * share)) for side in frames.shape[1:3])
    top = int(rng.integers(frames.shape[1] - height + 1))
    left = int(rng.integers(frames.shape[2] - width + 1))
    return frames[:, top : top + height, left : left + width]


def _resized(frames: np.ndarray, settings: PictureSettings) -> Tensor:
    """``[T,3,S,S]`` with values from 0 to 255, as bytes or floats."""
    size = (settings.image_size, settings.image_size)
    if settings.arithmetic == "pillow":
        method = Image.Resampling[settings.interpolation.upper()]
        frames = np.stack([np.asarray(Image.fromarray(frame).resize(size, method)) for frame in frames])
        return torch.from_numpy(frames).permute(0, 3, 1, 2)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    if settings.arithmetic == "float":
        pixels = pixels.float()
    if pixels.shape[-2:] == size:
        return pixels
    resized = functional.interpolate(
        pixels, size, mode=settings.interpolation, align_corners=False, antialias=settings.antialias
    )
    return resized.clamp(0, 255) if settings.arithmetic == "float" else resized
