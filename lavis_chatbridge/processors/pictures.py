"""Images and videos to the vision encoder's input: resized to a square, normalised by the encoder's mean and std.

Legend: `T` frames, `H` `W` size of the source, `S` size of the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from lavis.common.registry import registry
from PIL import Image
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional

from lavis_chatbridge.config import Settings
from lavis_chatbridge.media import open_image, open_video
from lavis_chatbridge.media.video import frame_indices, uniform_frame_indices
from lavis_chatbridge.processors.base import Processor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_OVERSAMPLING = 2
"""A large JPEG is decoded at reduced size; its sides are at least this factor times ``image_size``."""


class PictureSettings(Settings):
    """How images are prepared."""

    image_size: PositiveInt = 224
    """Side of the result, in pixels."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = True
    """Whether downscaling averages over all source pixels."""
    arithmetic: Literal["bytes", "pillow", "float"] = "bytes"
    """``bytes``: resize bytes with torch (at most 1/256 from Pillow); large JPEGs may be decoded at reduced size.
    ``pillow``: Pillow itself, as in the original's demo. ``float``: resize floating-point pixels, as in the original's
    training reader."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """Mean of each channel (values in [0, 1]), which is subtracted."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = CLIP_STD
    """Standard deviation of each channel; the result is divided by it."""

    def check(self) -> Iterator[str]:
        if self.arithmetic == "pillow" and not self.antialias:
            yield "arithmetic 'pillow' always antialiases; choose 'float' or 'bytes' for antialias: false"


class TrainPictureSettings(PictureSettings):
    """How images are prepared in training. Crops are mild, because captions mention positions and sizes."""

    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest share of the image's area to keep."""

    def check(self) -> Iterator[str]:
        yield from super().check()
        if not 0.0 < self.crop_scale[0] <= self.crop_scale[1] <= 1.0:
            yield f"crop_scale is {list(self.crop_scale)}, expected two shares of the area in (0, 1], the smaller first"


class VideoSettings(PictureSettings):
    """How videos are prepared."""

    num_frames: PositiveInt = 4
    sampling: Literal["chunks", "uniform"] = "chunks"
    """``chunks``: one frame of each of ``num_frames`` equal segments; a shorter video repeats its last frame.
    ``uniform``: the first frame of each segment; a shorter video gives fewer frames, as in the original's demo."""


class TrainVideoSettings(TrainPictureSettings, VideoSettings):
    """How videos are prepared in training: all frames of one video are cropped alike."""


@registry.register_processor("chatbridge_image_eval")
class ImageEvalProcessor(Processor):
    """An image -> float32 ``[3,S,S]``, deterministic."""

    name = "chatbridge_image_eval"
    settings_class = PictureSettings
    settings: PictureSettings

    def __call__(self, source: Any, rng: np.random.Generator | None = None) -> Tensor:
        picture = self.opener(open_image, source, at_least=_least_side(self.settings), limits=self.limits)
        return prepare(picture[None], self.settings, rng)[0]


@registry.register_processor("chatbridge_image_train")
class ImageTrainProcessor(ImageEvalProcessor):
    """A random crop of the image."""

    name = "chatbridge_image_train"
    random = True
    settings_class = TrainPictureSettings


@registry.register_processor("chatbridge_video_eval")
class VideoEvalProcessor(Processor):
    """A video -> float32 ``[T,3,S,S]``, deterministic."""

    name = "chatbridge_video_eval"
    revision = 4
    settings_class = VideoSettings
    settings: VideoSettings

    def __call__(self, source: Any, rng: np.random.Generator | None = None) -> Tensor:
        rng, frames = (rng or np.random.default_rng()) if self.random else None, self.settings.num_frames
        if self.settings.sampling == "uniform":
            choose: partial[list[int]] = partial(uniform_frame_indices, frames=frames)
        else:
            choose = partial(frame_indices, frames=frames, rng=rng)
        return prepare(self.opener(open_video, source, choose, limits=self.limits), self.settings, rng)


@registry.register_processor("chatbridge_video_train")
class VideoTrainProcessor(VideoEvalProcessor):
    """Random frames, all with the same random crop."""

    name = "chatbridge_video_train"
    random = True
    settings_class = TrainVideoSettings


def prepare(frames: np.ndarray, settings: PictureSettings, rng: np.random.Generator | None = None) -> Tensor:
    """Images of one size (uint8 ``[T,H,W,3]``) as the encoder's input: float32 ``[T,3,S,S]``.

    `TrainPictureSettings` crop them at random, all alike; ``rng`` is by default a new generator.
    """
    if isinstance(settings, TrainPictureSettings):
        frames = _random_crop(frames, settings.crop_scale, rng or np.random.default_rng())
    mean = torch.tensor(settings.mean, dtype=torch.float32)[:, None, None] * 255.0
    scale = 1.0 / (torch.tensor(settings.std, dtype=torch.float32)[:, None, None] * 255.0)
    return _resized(frames, settings).contiguous().float().sub_(mean).mul_(scale)


def _least_side(settings: PictureSettings) -> int | None:
    """The shortest side to which decoding may reduce a photo; None: full size."""
    if settings.arithmetic != "bytes" or not settings.antialias:
        return None
    kept = settings.crop_scale[0] if isinstance(settings, TrainPictureSettings) else 1.0
    return math.ceil(_OVERSAMPLING * settings.image_size / math.sqrt(kept))


def _random_crop(frames: np.ndarray, scale: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """A random crop with the image's aspect ratio, and a random share of its area."""
    share = math.sqrt(rng.uniform(*scale))
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
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    if settings.arithmetic == "float":
        pixels = pixels.float()
    if pixels.shape[-2:] == size:
        return pixels
    resized = functional.interpolate(
        pixels, size, mode=settings.interpolation, align_corners=False, antialias=settings.antialias
    )
    return resized.clamp(0, 255) if settings.arithmetic == "float" else resized
