"""Media for tests, made on the spot: pictures, videos and sounds of known content."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import soundfile
from PIL import Image


def photo(height: int = 48, width: int = 64) -> np.ndarray:
    """A picture whose four quarters are red, green, blue and yellow: uint8 ``[H,W,3]``."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (220, 20, 20)
    pixels[: height // 2, width // 2 :] = (20, 220, 20)
    pixels[height // 2 :, : width // 2] = (20, 20, 220)
    pixels[height // 2 :, width // 2 :] = (220, 220, 20)
    return pixels


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """The bytes of a picture file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def tone(seconds: float, rate: int, pitch: float = 440.0, loudness: float = 0.5) -> np.ndarray:
    """A sine: float32 ``[S]``."""
    return (loudness * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def sound_file(samples: np.ndarray, rate: int, form: str = "WAV", subtype: str | None = None) -> bytes:
    """The bytes of a sound file; ``samples`` are ``[S]`` or ``[C,S]``."""
    file = io.BytesIO()
    soundfile.write(file, np.atleast_2d(samples).T, rate, format=form, subtype=subtype)
    return file.getvalue()


def level(index: int) -> int:
    """The brightness that marks the ``index``-th frame of `video_file`."""
    return 16 + 7 * (index % 32)


def video_file(
    frames: int = 30,
    *,
    size: tuple[int, int] = (64, 48),
    form: str = "mp4",
    codec: str = "libx264",
    times: list[int] | None = None,
    rotation: int = 0,
    sound: np.ndarray | None = None,
    gop: int = 12,
    b_frames: int = 2,
    options: dict[str, str] | None = None,
) -> bytes:
    """The bytes of a video whose ``i``-th frame has the brightness ``level(i)``, marked red in its upper left.

    ``times`` are the frames' times in units of 1/100 s; ``sound`` is a track at 48 kHz, ``[S]``.
    """
    file = io.BytesIO()
    width, height = size
    with av.open(file, "w", format=form) as container:
        stream: Any = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.time_base = Fraction(1, 100)
        if rotation:
            stream.set_display_rotation(rotation)
        track: Any = None if sound is None else container.add_stream("aac" if form == "mp4" else "libopus", rate=48_000)
        for index in range(frames):
            pixels = np.full((height, width, 3), level(index), np.uint8)
            pixels[: height // 3, : width // 3] = (230, 20, 20)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = 4 * index if times is None else times[index]
            frame.time_base = Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if track is not None and sound is not None:
            _add_sound(container, track, sound)
    return file.getvalue()


def _add_sound(container: Any, track: Any, sound: np.ndarray) -> None:
    for start in range(0, len(sound), 960):
        block = np.ascontiguousarray(np.tile(sound[None, start : start + 960], (2, 1)), np.float32)
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, start, Fraction(1, 48_000)
        container.mux(track.encode(frame))
    container.mux(track.encode(None))
