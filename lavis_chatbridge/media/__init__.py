"""Opening image, video and audio files safely: path or bytes -> array, or `MediaError`. Knows no normalisation.

What is exported is imported on first use: PyAV, soundfile and Pillow cost time that not every command needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavis_chatbridge.media.audio import open_audio
    from lavis_chatbridge.media.container import has_audio_track
    from lavis_chatbridge.media.image import open_image
    from lavis_chatbridge.media.limits import DEFAULT_LIMITS, Limits
    from lavis_chatbridge.media.source import Sound, Source
    from lavis_chatbridge.media.types import AudioClips, EncodedMedium
    from lavis_chatbridge.media.video import open_video

__all__ = [
    "DEFAULT_LIMITS",
    "AudioClips",
    "EncodedMedium",
    "Limits",
    "Sound",
    "Source",
    "has_audio_track",
    "open_audio",
    "open_image",
    "open_video",
]

_HOMES = {
    "open_image": "image",
    "open_video": "video",
    "open_audio": "audio",
    "has_audio_track": "container",
    "Limits": "limits",
    "DEFAULT_LIMITS": "limits",
    "Sound": "source",
    "Source": "source",
    "AudioClips": "types",
    "EncodedMedium": "types",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
