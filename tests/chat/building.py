"""A small chat for tests: random weights, the real code path, media and requests built on the spot."""

from __future__ import annotations

import base64
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lavis_chatbridge.chat import Engine, MediaReader, Sampling, Session
from lavis_chatbridge.chat.messages import data_url
from lavis_chatbridge.processors import load_processors
from tests.media.making import encoded, sound_file, tone, video_file
from tests.media.making import photo as picture

TINY_TOKENIZER = Path(__file__).resolve().parents[2] / "lavis_chatbridge" / "assets" / "tiny" / "llm"


def processors() -> Any:
    """Those of the small model: 28-pixel images, two frames of a video, 32 mel bins."""
    settings = {"vis": {"image_size": 28}, "video": {"image_size": 28, "num_frames": 2}, "audio": {"mel_bins": 32}}
    return load_processors({f"{name}_processor": {"eval": values} for name, values in settings.items()})


def engine(model: Any, **settings: Any) -> Engine:
    return Engine(model, MediaReader(model, processors()), **settings)


def session(model: Any, **settings: Any) -> Session:
    """A session of that model with short answers and an engine of its own, whose settings are among ``settings``."""
    names = ("template", "max_context", "keep")
    own = engine(model, **{name: settings.pop(name) for name in names if name in settings})
    settings.setdefault("sampling", Sampling(max_new_tokens=12))
    return Session(model, engine=own, **settings)


def slow_down(model: Any, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let every step of the language model take this much longer, so that a reply cannot end before a test acts."""
    forward = model.llama_model.forward
    slow = functools.wraps(forward)(lambda *args, **more: time.sleep(seconds) or forward(*args, **more))
    monkeypatch.setattr(model.llama_model, "forward", slow)


def wait_until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def png() -> bytes:
    return encoded(Image.fromarray(picture()), "PNG")


def sound(seconds: float = 1.0, loudness: float = 0.5, pitch: float = 440.0) -> bytes:
    return sound_file(tone(seconds, 16_000, pitch, loudness), 16_000)


def video(heard: str = "tone") -> bytes:
    """A short mp4 with a ``"tone"``, ``"silence"`` or ``"nothing"`` as its sound track."""
    track = tone(0.5, 48_000, loudness=0.5 if heard == "tone" else 0.0)
    return video_file(6, sound=None if heard == "nothing" else track)


def image_part(url: str = "") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url or data_url(png(), "image/png")}}


def audio_part() -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound()).decode(), "format": "wav"}}


def video_part(heard: str = "tone") -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_url(video(heard), "video/mp4")}}


def asked(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]
