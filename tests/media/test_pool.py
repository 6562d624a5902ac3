"""Media opened in limited processes: the results are the same, and a process that fails costs its medium only."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media import Limits, has_audio_track, open_audio, open_image, open_video
from lavis_chatbridge.media.audio import decode_audio
from lavis_chatbridge.media.pool import DecodingPool
from lavis_chatbridge.media.source import directly
from lavis_chatbridge.media.video import uniform_frame_indices
from tests.media.making import encoded, photo, tone, video_file

MEMORY = 96 << 20
PICTURE = encoded(Image.fromarray(photo()).convert("RGBA"), "PNG")
VIDEO = video_file(30, sound=tone(1.2, 48_000))
SOME = partial(uniform_frame_indices, frames=3)


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodingPool]:
    with DecodingPool(1, MEMORY, 60.0) as made:
        yield made


def dies(source: object, *, limits: Limits) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kills_its_pool(source: object, *, limits: Limits) -> None:
    """What a process does that dies before its pool knows which medium it has taken."""
    raise BrokenProcessPool("All workers expired")


def number(source: object, *, limits: Limits) -> int:
    return os.getpid()


def hangs(source: object, *, limits: Limits) -> None:
    time.sleep(60)


def writes(source: str, *, limits: Limits) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    Path(source).write_text("a file")


def is_answered(pool: DecodingPool) -> bool:
    return np.array_equal(pool(open_image, PICTURE), open_image(PICTURE))


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
        (open_image, (), b"no medium", Limits()),
        (open_image, (), PICTURE, Limits(max_pixels=100)),
        (open_video, (SOME,), tmp_path / "none", Limits()),
        (open_video, (SOME,), VIDEO, Limits(max_frames=3)),
        (decode_audio, (), VIDEO, Limits(max_seconds=0.1)),
    ):
        messages = []
        for call in (directly, pool):
            with pytest.raises(MediaError) as error:
                call(function, source, *args, limits=limits)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    assert is_answered(pool)


@pytest.mark.parametrize("function", [dies, kills_its_pool])
def test_a_process_that_dies_costs_its_medium(pool: DecodingPool, function: Callable[..., None]) -> None:
    with pytest.raises(MediaError, match="its decoder crashed"):
        pool(function, "a.png")
    assert is_answered(pool)


def test_an_idle_process_that_dies_costs_nothing(pool: DecodingPool) -> None:
    os.kill(pool(number, "a.png"), signal.SIGKILL)
    time.sleep(0.5)
    assert is_answered(pool)


def test_a_process_that_hangs_costs_its_medium() -> None:
    with DecodingPool(1, MEMORY, 1.0) as pool:
        begin = time.monotonic()
        with pytest.raises(MediaError, match="decoding took longer than 1 s"):
            pool(hangs, "a.png")
        assert time.monotonic() - begin < 30
        assert is_answered(pool)


def test_a_medium_that_takes_too_much_memory(pool: DecodingPool) -> None:
    large = encoded(Image.new("1", (7000, 7000)), "PNG")  # 6 MB, of which decoding makes 147
    with pytest.raises(MediaError, match="more than 96 MiB of memory"):
        pool(open_image, large)
    assert is_answered(pool)


def test_a_process_writes_no_files(pool: DecodingPool, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File too large"):
        pool(writes, str(tmp_path / "a.txt"))
    assert is_answered(pool)
