"""Broken files: whatever is done to a medium, the outcome is a result or a `MediaError`, soon."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media import Limits, has_audio_track, open_audio, open_image, open_video
from tests.fuzzing.mutations import mutated_bytes
from tests.media.making import encoded, photo, sound_file, tone, video_file

LIMITS = Limits(max_pixels=4_000_000, max_seconds=60, max_frames=2000, max_bytes=1 << 28, timeout=5)
PICTURE = Image.fromarray(photo())
SOUND = tone(0.4, 48_000)
PICTURES = {
    "jpg": encoded(PICTURE, "JPEG"),
    "progressive": encoded(PICTURE, "JPEG", progressive=True),
    "png": encoded(PICTURE.convert("RGBA"), "PNG"),
    "palette": encoded(PICTURE.convert("P"), "PNG"),
    "webp": encoded(PICTURE, "WEBP"),
    "gif": encoded(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(9), PICTURE.rotate(30)]),
    "bmp": encoded(PICTURE, "BMP"),
    "tiff": encoded(PICTURE, "TIFF", compression="tiff_lzw"),
}
VIDEOS = {
    "mp4": video_file(10, sound=SOUND),
    "mkv": video_file(10, form="matroska", sound=SOUND),
    "webm": video_file(6, form="webm", codec="libvpx-vp9", b_frames=0, sound=SOUND),
    "avi": video_file(10, form="avi", codec="mpeg4"),
    "ts": video_file(10, form="mpegts"),
}
SOUNDS = {
    "wav": sound_file(SOUND, 48_000),
    "flac": sound_file(SOUND, 48_000, "FLAC"),
    "ogg": sound_file(SOUND, 48_000, "OGG"),
    "mp3": sound_file(SOUND, 48_000, "MP3"),
}


def some_frames(data: bytes) -> np.ndarray:
    return open_video(data, lambda count: [count // 8, count // 2, count - 1], limits=LIMITS)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("files", "opened", "times"),
    [
        (PICTURES, lambda data: open_image(data, limits=LIMITS), 30),
        (VIDEOS, some_frames, 40),
        (SOUNDS, lambda data: open_audio(data, limits=LIMITS), 40),
        (VIDEOS, lambda data: open_audio(data, limits=LIMITS), 15),
        (PICTURES, some_frames, 4),
        (VIDEOS | SOUNDS | PICTURES, lambda data: has_audio_track(data, limits=LIMITS), 3),
    ],
    ids=["pictures", "videos", "sounds", "sound tracks", "animations", "tracks"],
)
def test_mutations(files: dict[str, bytes], opened: Callable[[bytes], Any], times: int) -> None:
    rng = random.Random(20_231)
    results = refusals = 0
    messages: list[str] = []
    for name, data in files.items():
        for _ in range(times):
            begin = time.process_time()  # which other work on the machine does not stretch
            try:
                result = opened(mutated_bytes(data, rng))
            except MediaError as error:
                refusals += 1
                messages.append(str(error))
            else:
                results += 1
                if isinstance(result, np.ndarray):
                    assert result.size > 0
                    assert np.isfinite(result).all()
            assert time.process_time() - begin < 10, name
    assert results > 0
    assert refusals > 0
    assert not any("\n" in message for message in messages)
