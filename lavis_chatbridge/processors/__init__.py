"""LAVIS processors of ChatBridge: image, video, audio and text. Importing this package registers them."""

from __future__ import annotations

from lavis_chatbridge.processors.audio import AudioEvalProcessor, AudioTrainProcessor
from lavis_chatbridge.processors.base import load_processors
from lavis_chatbridge.processors.pictures import (
    ImageEvalProcessor,
    ImageTrainProcessor,
    VideoEvalProcessor,
    VideoTrainProcessor,
)
from lavis_chatbridge.processors.text import TextProcessor

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
