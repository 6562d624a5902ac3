"""Opens image, video and audio files: returns an array or raises `MediaError`. Knows no normalisation.

Names are imported on first use: PyAV, soundfile and Pillow are slow to import, and not every command needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavis_chatbridge.media.audio import open_audio
    from lavis_chatbridge.media.container import has_audio_track, modality_of
    from lavis_chatbridge.media.image import open_image
    from lavis_chatbridge.media.source import DEFAULT_LIMITS, Limits, Sound, Source
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
    "modality_of",
    "open_audio",
    "open_image",
    "open_video",
]

_MODULES = {
    "audio": ("open_audio",),
    "container": ("has_audio_track", "modality_of"),
    "image": ("open_image",),
    "source": ("DEFAULT_LIMITS", "Limits", "Sound", "Source"),
    "types": ("AudioClips", "EncodedMedium"),
    "video": ("open_video",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
