"""Broken files: whatever is done to a medium, opening it gives a result or a `MediaError` of one line."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media import Limits, has_audio_track, modality_of, open_audio, open_image, open_video
from tests.media.making import encoded, photo, sound_file, tone, video_file

LIMITS = Limits(max_pixels=4_000_000, max_seconds=60, max_frames=2000, max_bytes=1 << 28, timeout=10)
PICTURE, SOUND = Image.fromarray(photo()), tone(0.4, 48_000)
FILES = {
    "jpg": encoded(PICTURE, "JPEG"),
    "png": encoded(PICTURE.convert("RGBA"), "PNG"),
    "webp": encoded(PICTURE, "WEBP"),
    "gif": encoded(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(9), PICTURE.rotate(30)]),
    "tiff": encoded(PICTURE, "TIFF", compression="tiff_lzw"),
    "mp4": video_file(10, sound=SOUND),
    "mkv": video_file(10, form="matroska", sound=SOUND),
    "webm": video_file(6, form="webm", codec="libvpx-vp9", b_frames=0, sound=SOUND),
    "avi": video_file(10, form="avi", codec="mpeg4"),
    "ts": video_file(10, form="mpegts"),
    "wav": sound_file(SOUND, 48_000),
    "flac": sound_file(SOUND, 48_000, "FLAC"),
    "ogg": sound_file(SOUND, 48_000, "OGG"),
    "mp3": sound_file(SOUND, 48_000, "MP3"),
}
OPENERS: list[Callable[[bytes], object]] = [
    lambda data: open_image(data, limits=LIMITS),
    lambda data: open_video(data, lambda count: [count // 8, count // 2, count - 1], limits=LIMITS),
    lambda data: open_audio(data, limits=LIMITS),
    lambda data: has_audio_track(data, limits=LIMITS),
    lambda data: modality_of(data, limits=LIMITS),
]


@st.composite
def broken_files(draw: st.DrawFn) -> bytes:
    """A file with bytes replaced, removed, doubled, or its end cut off."""
    data = bytearray(draw(st.sampled_from(list(FILES.values()))))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.one_of(st.integers(0, min(64, len(data))), st.integers(0, len(data))))
        end = min(len(data), start + draw(st.sampled_from([1, 4, 50, 400])))
        piece = bytes(data[start:end])
        data[start:end] = draw(st.sampled_from([b"", bytes(len(piece)), b"\xff" * len(piece), 2 * piece, piece[::-1]]))
        if draw(st.booleans()) and draw(st.booleans()):
            del data[start:]
    return bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(
    max_examples=300,
    deadline=10_000,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(broken_files(), st.sampled_from(OPENERS))
def test_a_broken_file_gives_a_result_or_one_error(data: bytes, opened: Callable[[bytes], object]) -> None:
    message, result = "", None
    try:
        result = opened(data)
    except MediaError as error:
        message = str(error)
    assert "\n" not in message
    if isinstance(result, np.ndarray):
        assert result.size > 0
        assert np.isfinite(result).all()
