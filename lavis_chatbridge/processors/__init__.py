"""LAVIS processors of ChatBridge: image, video, audio and text. Importing this package registers them."""

from __future__ import annotations

from lavis_chatbridge.processors.audio import AudioEvalProcessor, AudioTrainProcessor
from lavis_chatbridge.processors.base import TextProcessor, load_processors
from lavis_chatbridge.processors.pictures import (
    ImageEvalProcessor,
    ImageTrainProcessor,
    VideoEvalProcessor,
    VideoTrainProcessor,
)

__all__ = [
    "AudioEvalProcessor",
    "AudioTrainProcessor",
    "ImageEvalProcessor",
    "ImageTrainProcessor",
    "TextProcessor",
    "VideoEvalProcessor",
    "VideoTrainProcessor",
    "load_processors",
]
