"""A small chat for tests: random weights, the real code path, media built on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lavis_chatbridge.chat import Engine, MediaReader, Sampling, Session
from lavis_chatbridge.processors import load_processors
from tests.media.making import photo, sound_file, tone, video_file

TINY_TOKENIZER = Path(__file__).resolve().parents[2] / "lavis_chatbridge" / "assets" / "tiny" / "llm"


def processors() -> Any:
    """Those of the small model: 28-pixel images, two frames of a video, 32 mel bins."""
    return load_processors(
        {
            "vis_processor": {"eval": {"name": "chatbridge_image_eval", "image_size": 28}},
            "video_processor": {"eval": {"name": "chatbridge_video_eval", "image_size": 28, "num_frames": 2}},
            "audio_processor": {"eval": {"name": "chatbridge_audio_eval", "mel_bins": 32}},
        }
    )


def engine(model: Any, **settings: Any) -> Engine:
    """An engine of that model."""
    return Engine(model, MediaReader(model, processors()), **settings)


def session(model: Any, **settings: Any) -> Session:
    """A session of that model with short answers and an engine of its own, whose settings are among ``settings``."""
    names = ("template", "max_context", "keep")
    own = engine(model, **{name: settings.pop(name) for name in names if name in settings})
    settings.setdefault("sampling", Sampling(max_new_tokens=12))
    return Session(model, engine=own, **settings)


def picture() -> np.ndarray:
    """A picture of four colours."""
    return photo()


def sound(seconds: float = 1.0, loudness: float = 0.5, pitch: float = 440.0) -> bytes:
    """A tone as a wav file."""
    return sound_file(tone(seconds, 16_000, pitch, loudness), 16_000)


def video(heard: str = "tone") -> bytes:
    """A short mp4 with a ``"tone"``, ``"silence"`` or ``"nothing"`` as its sound track."""
    if heard == "nothing":
        return video_file(6)
    return video_file(6, sound=tone(0.5, 48_000, loudness=0.5 if heard == "tone" else 0.0))
