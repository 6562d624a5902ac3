"""Opens image, video and audio files: returns an array or raises `MediaError`. Nothing is normalised here."""

from lavis_chatbridge.media.audio import open_audio
from lavis_chatbridge.media.container import has_audio_track, modality_of
from lavis_chatbridge.media.image import open_image
from lavis_chatbridge.media.source import DEFAULT_LIMITS, Limits, Sound, Source
from lavis_chatbridge.media.video import open_video

__all__ = [
    "DEFAULT_LIMITS",
    "Limits",
    "Sound",
    "Source",
    "has_audio_track",
    "modality_of",
    "open_audio",
    "open_image",
    "open_video",
]
