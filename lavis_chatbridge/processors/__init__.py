"""LAVIS processors of ChatBridge: image, video, audio and text. Importing this registers them."""

from __future__ import annotations

from lavis_chatbridge.processors.audio import AudioEvalProcessor, AudioTrainProcessor
from lavis_chatbridge.processors.image import ImageEvalProcessor, ImageTrainProcessor
from lavis_chatbridge.processors.loading import load_processors
from lavis_chatbridge.processors.text import TextProcessor
from lavis_chatbridge.processors.video import VideoEvalProcessor, VideoTrainProcessor

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
