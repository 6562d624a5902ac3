"""Broken files give a result or one `MediaError`; a decoding process that fails costs only its medium."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media import Limits, has_audio_track, modality_of, open_audio, open_image, open_video
from lavis_chatbridge.media.audio import decode_audio
from lavis_chatbridge.media.pool import DecodingPool
from lavis_chatbridge.media.source import directly
from lavis_chatbridge.media.video import uniform_frame_indices
from tests.media.making import encoded, photo, sound_file, tone, video_file

MEMORY = 96 << 20
PICTURE = encoded(Image.fromarray(photo()).convert("RGBA"), "PNG")
VIDEO = video_file(30, sound=tone(1.2, 48_000))
SOME = partial(uniform_frame_indices, frames=3)


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodingPool]:
    with DecodingPool(1, MEMORY, 60.0) as made:
        yield made


def does(source: str, *, limits: Limits) -> int:
    """Does what the source's name says, in a decoding process; returns the process's number."""
    if source == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if source == "breaks":  # as a process that dies before its pool knows which medium it has taken
        raise BrokenProcessPool("All workers expired")
    if source == "hangs":
        time.sleep(60)
    if source.endswith("writes"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        Path(source).write_text("a file")
    return os.getpid()


def test_results_are_the_same_as_without_processes(pool: DecodingPool, tmp_path: Path) -> None:
    path = tmp_path / "a\udcff.mp4"  # a name that is not UTF-8
    path.write_bytes(VIDEO)
    for got, expected in (
        (pool(open_image, memoryview(PICTURE)), open_image(PICTURE)),
        (pool(open_video, path, SOME), open_video(path, SOME)),
        (open_audio(path, 48_000, "first", opener=pool), open_audio(path, 48_000, "first")),
        (pool(open_image, photo()), photo()),
    ):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    assert [pool(has_audio_track, source) for source in (path, PICTURE, photo())] == [True, False, False]


def test_errors_are_the_same_as_without_processes(pool: DecodingPool, tmp_path: Path) -> None:
    for function, args, source, limits in (
        (open_image, (), PICTURE, Limits(max_pixels=100)),
        (open_video, (SOME,), tmp_path / "none", Limits()),
        (decode_audio, (), VIDEO, Limits(max_seconds=0.1)),
    ):
        messages = []
        for call in (directly, pool):
            with pytest.raises(MediaError) as error:
                call(function, source, *args, limits=limits)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_a_process_that_fails_costs_its_medium(pool: DecodingPool, tmp_path: Path) -> None:
    large = encoded(Image.new("1", (7000, 7000)), "PNG")  # 6 MB, of which decoding makes 147
    for function, source, error, message in (
        (does, "dies", MediaError, "its decoder crashed"),
        (does, "breaks", MediaError, "its decoder crashed"),
        (open_image, large, MediaError, "more than 96 MiB of memory"),
        (does, str(tmp_path / "writes"), OSError, "File too large"),
    ):
        with pytest.raises(error, match=message):
            pool(function, source)
        assert np.array_equal(pool(open_image, PICTURE), open_image(PICTURE))
    os.kill(pool(does, "nothing"), signal.SIGKILL)
    time.sleep(0.5)
    assert np.array_equal(pool(open_image, PICTURE), open_image(PICTURE)), "a process that dies idle costs nothing"


def test_a_process_that_hangs_costs_its_medium() -> None:
    with DecodingPool(1, MEMORY, 1.0) as pool:
        with pytest.raises(MediaError, match="decoding took longer than 1 s"):
            pool(does, "hangs")
        assert np.array_equal(pool(open_image, PICTURE), open_image(PICTURE))


LIMITS = Limits(max_pixels=4_000_000, max_seconds=60, max_frames=2000, max_bytes=1 << 28, timeout=10)
STILL, SOUND = Image.fromarray(photo()), tone(0.4, 48_000)
FILES = [
    *(encoded(STILL, form) for form in ("JPEG", "WEBP")),
    encoded(STILL.convert("RGBA"), "PNG"),
    encoded(STILL, "GIF", save_all=True, append_images=[STILL.rotate(9), STILL.rotate(30)]),
    encoded(STILL, "TIFF", compression="tiff_lzw"),
    *(video_file(10, form=form, sound=SOUND) for form in ("mp4", "matroska")),
    video_file(6, form="webm", codec="libvpx-vp9", b_frames=0, sound=SOUND),
    *(video_file(10, form=form) for form in ("avi", "mpegts")),
    *(sound_file(SOUND, 48_000, form) for form in ("WAV", "FLAC", "OGG", "MP3")),
]
OPENERS: list[Callable[..., Any]] = [
    *(open_image, open_audio, has_audio_track, modality_of),
    partial(open_video, choose=lambda count: [count // 8, count // 2, count - 1]),
]


@st.composite
def broken_files(draw: st.DrawFn) -> bytes:
    """A file with bytes replaced, removed, doubled, or its end cut off."""
    data = bytearray(draw(st.sampled_from(FILES)))
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
def test_a_broken_file_gives_a_result_or_one_error(data: bytes, opened: Callable[..., Any]) -> None:
    try:
        result = opened(data, limits=LIMITS)
    except MediaError as error:
        result = str(error)
    assert not isinstance(result, str) or "\n" not in result
    assert not isinstance(result, np.ndarray) or (result.size > 0 and np.isfinite(result).all())
