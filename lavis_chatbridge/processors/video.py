"""``chatbridge_video_train`` and ``chatbridge_video_eval``: a video -> float32 ``[T,3,S,S]``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from lavis.common.registry import registry
from torch import Tensor

from lavis_chatbridge.processors.base import ChatBridgeProcessor
from lavis_chatbridge.processors.frames import frame_indices, uniform_frame_indices
from lavis_chatbridge.processors.pictures import PictureSettings, TrainPictureSettings, prepare


@dataclass(frozen=True)
class VideoSettings(PictureSettings):
    """How videos are prepared.

    Attributes:
        num_frames: How many frames are taken.
        sampling: "chunks" takes one of each of ``num_frames`` equal stretches and repeats the last frame of shorter
            videos; "uniform" takes the first of each, and fewer of shorter videos, as the original's demo does.
    """

    num_frames: int = 4
    sampling: Literal["chunks", "uniform"] = "chunks"

    def check(self) -> Iterator[str]:
        """Yields what contradicts."""
        yield from super().check()
        if self.num_frames < 1:
            yield f"num_frames is {self.num_frames}, expected at least 1"


@dataclass(frozen=True)
class TrainVideoSettings(TrainPictureSettings, VideoSettings):
    """How videos are prepared and varied in training: all frames of one alike."""


@registry.register_processor("chatbridge_video_eval")
class VideoEvalProcessor(ChatBridgeProcessor):
    """The same video always gives the same tensor."""

    name = "chatbridge_video_eval"
    revision = 2
    settings_class = VideoSettings
    settings: VideoSettings

    def __call__(self, source: Any, rng: np.random.Generator | None = None) -> Tensor:
        chance = self._chance(rng)
        background = self.settings.background[0], self.settings.background[1], self.settings.background[2]
        frames = self.opener.open_video(
            source, lambda count: self._choose(count, chance), background=background, limits=self.limits
        )
        return prepare(frames, self.settings, chance)

    def _choose(self, count: int, rng: np.random.Generator | None) -> list[int]:
        if self.settings.sampling == "uniform":
            return uniform_frame_indices(count, self.settings.num_frames)
        return frame_indices(count, self.settings.num_frames, rng)


@registry.register_processor("chatbridge_video_train")
class VideoTrainProcessor(VideoEvalProcessor):
    """Random frames, and a random part of them."""

    name = "chatbridge_video_train"
    draws = True
    settings_class = TrainVideoSettings
    settings: TrainVideoSettings
