"""``chatbridge_image_train`` and ``chatbridge_image_eval``: a picture -> float32 ``[3,S,S]``."""

from __future__ import annotations

from typing import Any

import numpy as np
from lavis.common.registry import registry
from torch import Tensor

from lavis_chatbridge.processors.base import ChatBridgeProcessor
from lavis_chatbridge.processors.pictures import PictureSettings, TrainPictureSettings, least_side, prepare


@registry.register_processor("chatbridge_image_eval")
class ImageEvalProcessor(ChatBridgeProcessor):
    """The same picture always gives the same tensor."""

    name = "chatbridge_image_eval"
    settings_class = PictureSettings
    settings: PictureSettings

    def __call__(self, source: Any, rng: np.random.Generator | None = None) -> Tensor:
        background = self.settings.background[0], self.settings.background[1], self.settings.background[2]
        picture = self.opener.open_image(
            source, at_least=least_side(self.settings), background=background, limits=self.limits
        )
        return prepare(picture[None], self.settings, self._chance(rng))[0]


@registry.register_processor("chatbridge_image_train")
class ImageTrainProcessor(ImageEvalProcessor):
    """A random part of the picture."""

    name = "chatbridge_image_train"
    draws = True
    settings_class = TrainPictureSettings
    settings: TrainPictureSettings
