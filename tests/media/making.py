"""Media for tests, built on the spot: images, videos and sounds of known content."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
import soundfile
from PIL import Image

ORIENTATIONS: list[tuple[int, int, int, int]] = [
    (1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0),
    (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0),
]  # fmt: skip
"""``a b c d`` of a display matrix, which shows pixel (x, y) at (a x + c y, b x + d y): none, turns, mirror images."""


def photo(height: int = 48, width: int = 64) -> np.ndarray:
    """An image whose four quarters are red, green, blue and yellow: uint8 ``[H,W,3]``."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (220, 20, 20)
    pixels[: height // 2, width // 2 :] = (20, 220, 20)
    pixels[height // 2 :, : width // 2] = (20, 20, 220)
    pixels[height // 2 :, width // 2 :] = (220, 220, 20)
    return pixels


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """The bytes of an image file."""
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


def numbered(index: int, width: int, height: int) -> np.ndarray:
    """A frame that shows ``index`` as eight black or white bars, with a red corner: uint8 ``[H,W,3]``."""
    bits = np.unpackbits(np.array([index], np.uint8))
    pixels = np.repeat(np.repeat((bits * 255)[None, :, None], height, 0), width // 8, 1).repeat(3, 2).astype(np.uint8)
    pixels[: height // 4, : width // 4] = (230, 20, 20)
    return pixels


def number_of(pixels: np.ndarray) -> int:
    """The number that an upright frame of `numbered` shows."""
    bars = pixels[-1].mean(1).reshape(8, -1).mean(1) > 127
    return int(np.packbits(bars)[0])


def stored_as(pixels: np.ndarray, orientation: tuple[int, int, int, int]) -> np.ndarray:
    """The frame that a display matrix of this orientation shows as ``pixels``."""
    a, b, c, d = orientation
    if a == 0:
        return pixels[::b, ::c].transpose(1, 0, 2)
    return pixels[::d, ::a]


def video_file(
    frames: int = 30,
    *,
    size: tuple[int, int] = (64, 48),
    form: str = "mp4",
    codec: str = "libx264",
    times: Sequence[int] | None = None,
    orientation: tuple[int, int, int, int] = (1, 0, 0, 1),
    pixel_aspect: Fraction = Fraction(1),
    sound: np.ndarray | None = None,
    sound_start: float = 0.0,
    gop: int = 12,
    b_frames: int = 2,
    options: dict[str, str] | None = None,
    drawn: Callable[[int, int, int], np.ndarray] = numbered,
) -> bytes:
    """The bytes of a video whose ``i``-th frame is ``drawn(i, width, height)``.

    ``times`` are the frames' times in units of 1/100 s; ``sound`` is a track at 48 kHz, ``[S]``.
    """
    file = io.BytesIO()
    width, height = size
    with av.open(file, "w", format=form) as container:
        stream: Any = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height = size if orientation[0] else (height, width)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.time_base = Fraction(1, 100)
        stream.codec_context.sample_aspect_ratio = pixel_aspect
        if orientation != (1, 0, 0, 1):
            a, b, c, d = (value << 16 for value in orientation)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        track: Any = None
        if sound is not None:
            track = container.add_stream("libopus" if form in ("webm", "matroska") else "aac", rate=48_000)
        for index in range(frames):
            pixels = np.ascontiguousarray(stored_as(drawn(index, width, height), orientation))
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = 4 * index if times is None else times[index]
            frame.time_base = Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if track is not None and sound is not None:
            add_sound(container, track, sound, sound_start)
    return file.getvalue()


def add_sound(
    container: Any, track: Any, sound: np.ndarray, start: float = 0.0, gains: Sequence[float] = (1, 1)
) -> None:
    """Encode and mux ``sound`` (48 kHz, ``[S]``) as a track that starts at ``start`` seconds; a gain per channel."""
    for offset in range(0, len(sound), 960):
        packed = np.outer(sound[offset : offset + 960], gains).astype(np.float32).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=track.layout.name)
        frame.sample_rate, frame.time_base = 48_000, Fraction(1, 48_000)
        frame.pts = offset + round(start * 48_000)
        container.mux(track.encode(frame))
    container.mux(track.encode(None))


def sound_alone(
    form: str = "webm", codec: str = "libopus", seconds: float = 0.5, layout: str = "stereo", gains: Any = (1, 1)
) -> bytes:
    """The bytes of a container with only a tone, by default as browsers record voices."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        track = container.add_stream(codec, rate=48_000, layout=layout)
        add_sound(container, track, tone(seconds, 48_000), gains=gains)
    return file.getvalue()


def cut(data: bytes, seconds: float, form: str = "mp4") -> bytes:
    """A copy of an mp4 or mov whose edit list hides the first ``seconds``, as ``ffmpeg -ss -c copy`` makes it."""
    file = io.BytesIO()
    with (
        av.open(io.BytesIO(data)) as source,
        av.open(file, "w", format=form, options={"avoid_negative_ts": "disabled"}) as target,
    ):
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.size == 0 or packet.time_base is None:
                continue
            offset = round(seconds / packet.time_base)
            packet.pts, packet.dts = (packet.pts or 0) - offset, (packet.dts or 0) - offset
            packet.stream = streams[packet.stream_index]
            target.mux(packet)
    return file.getvalue()
