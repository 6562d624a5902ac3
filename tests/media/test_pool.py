"""Media opened by worker processes: the same as here, and errors where a worker is killed, hangs or takes too much."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavis_chatbridge import media
from lavis_chatbridge.errors import ChatBridgeError, MediaError
from lavis_chatbridge.media import Limits, pool
from lavis_chatbridge.media.pool import DecodingPool
from tests.media.making import encoded, photo, sound_file, tone, video_file

MEMORY = 96 << 20
SECRET = "a-token-of-the-test"


@pytest.fixture(scope="module")
def opener() -> Iterator[DecodingPool]:
    with pytest.MonkeyPatch.context() as patch, DecodingPool(1, MEMORY, 60.0) as made:
        patch.setenv("CHATBRIDGE_TOKENS", SECRET)
        yield made
        processes = made.processes
    assert processes
    assert not any(Path("/proc", str(process)).exists() for process in processes)


PICTURE = encoded(Image.fromarray(photo()).convert("RGBA"), "PNG")
VIDEO = video_file(30, sound=tone(1.2, 48_000))
SOUND = sound_file(np.stack([tone(0.5, 44_100), tone(0.5, 44_100, 700)]), 44_100, "FLAC")


def some(count: int) -> list[int]:
    return [count - 1, 0, 5, 5]


def is_answered(opener: DecodingPool) -> bool:
    return np.array_equal(opener.open_image(PICTURE), media.open_image(PICTURE))


def test_arrays_are_the_same_as_without_workers(opener: DecodingPool, tmp_path: Path):
    path = tmp_path / "a\udcff.mp4"  # a name that is not UTF-8
    path.write_bytes(VIDEO)
    blue = (0, 0, 255)
    for got, expected in (
        (opener.open_image(PICTURE, background=blue), media.open_image(PICTURE, background=blue)),
        (opener.open_video(path, some), media.open_video(path, some)),
        (opener.open_video(memoryview(PICTURE), lambda n: [0] * 3), media.open_video(PICTURE, lambda n: [0] * 3)),
        (opener.open_audio(SOUND), media.open_audio(SOUND)),
        (opener.open_audio(path, 48_000, "first"), media.open_audio(path, 48_000, "first")),
        (opener.open_image(photo()), photo()),
        (opener.open_audio(tone(1, 8000), source_rate=8000), media.open_audio(tone(1, 8000), source_rate=8000)),
    ):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    jpeg = encoded(Image.fromarray(photo(480, 640)), "JPEG")
    assert opener.open_image(jpeg, at_least=100).shape == media.open_image(jpeg, at_least=100).shape != (480, 640, 3)
    assert [opener.has_audio_track(source) for source in (path, SOUND, PICTURE, photo())] == [True, True, False, False]


def test_errors_are_the_same_as_without_workers(opener: DecodingPool, tmp_path: Path):
    for source, limits in (
        (b"no medium", Limits()),
        (b"", Limits()),
        (tmp_path / "none", Limits()),
        (tmp_path, Limits()),
        (5, Limits()),
        (VIDEO, Limits(max_frames=3, max_seconds=0.1)),
        (PICTURE, Limits(max_pixels=100)),
    ):
        for open_it in (
            lambda by: by.open_image(source, limits=limits),  # noqa: B023
            lambda by: by.open_video(source, some, limits=limits),  # noqa: B023
            lambda by: by.open_audio(source, limits=limits),  # noqa: B023
        ):
            if source is PICTURE and limits == Limits():
                continue
            told = []
            for by in (media, opener):
                with pytest.raises(MediaError) as error:
                    open_it(by)
                told.append(str(error.value))
            assert told[0] == told[1]
    with pytest.raises(ValueError, match=r"of 30 frames, \[30\] were chosen"):
        opener.open_video(VIDEO, lambda count: [count])
    assert is_answered(opener)


def test_a_worker_that_is_killed(opener: DecodingPool):
    def kill(count: int) -> list[int]:
        os.kill(opener.processes[0], signal.SIGKILL)
        return some(count)

    with pytest.raises(MediaError, match="its decoder ended with status -9"):
        opener.open_video(VIDEO, kill)
    assert is_answered(opener)
    os.kill(opener.processes[0], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while opener.processes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_answered(opener)  # one that ended between two media costs none of them


def test_a_worker_that_hangs():
    def stop(count: int) -> list[int]:
        os.kill(opener.processes[0], signal.SIGSTOP)
        return some(count)

    with DecodingPool(1, MEMORY, 3.0) as opener:
        before = opener.processes
        with pytest.raises(MediaError, match="decoding took longer than 3 s"):
            opener.open_video(VIDEO, stop)
        assert is_answered(opener)
        assert opener.processes != before


def test_a_medium_that_takes_too_much_memory(opener: DecodingPool):
    large = encoded(Image.new("1", (7000, 7000)), "PNG")  # 6 MB, of which decoding makes 147
    before = opener.processes
    with pytest.raises(MediaError, match="more than 96 MiB of memory"):
        opener.open_image(large)
    assert is_answered(opener)
    assert opener.processes != before


def test_a_worker_has_little(opener: DecodingPool):
    assert is_answered(opener)
    process = Path("/proc", str(opener.processes[0]))
    lines = (process / "limits").read_text().splitlines()
    limits = {line[:26].strip(): line[26:].split()[:2] for line in lines}
    assert limits["Max file size"] == limits["Max core file size"] == ["0", "0"]
    assert MEMORY < int(limits["Max address space"][1]) < MEMORY + (2 << 30)
    assert int(limits["Max cpu time"][0]) < 120
    assert SECRET.encode() not in (process / "environ").read_bytes()


LIES = {
    "nothing": b"",
    "no JSON": b"{\n",
    "no mapping": b"[]\n",
    "no array": b"{}\n",
    "an array of objects": b'{"dtype": "object", "shape": [1, 1, 3], "last": false}\n        ',
    "another form": b'{"dtype": "uint8", "shape": [3], "last": false}\nabc',
    "too large": b'{"dtype": "uint8", "shape": [90000, 90000, 3], "last": false}\n',
    "infinite": b'{"dtype": "uint8", "shape": [1, Infinity, 3], "last": false}\n',
    "negative": b'{"dtype": "uint8", "shape": [-1, -1, 3], "last": false}\n',
    "half an array": b'{"dtype": "uint8", "shape": [1, 2, 3], "last": false}\nabc',
    "no end of a line": b"[" * 100_000,
}


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.replace(" ", "-"))
def test_what_a_worker_sends_is_checked(monkeypatch: pytest.MonkeyPatch, lie: str):
    """A decoder that a file has taken over may send anything."""
    send = "import sys; send = sys.stdout.buffer.write; send(b'{}\\n'); sys.stdout.flush(); sys.stdin.readline(); "
    monkeypatch.setattr(pool, "_START", f"{send}send({LIES[lie]!r})")
    with DecodingPool(1) as opener, pytest.raises(MediaError, match=r"its decoder ended|sent nothing"):
        opener.open_image("a.png")


def test_workers_that_do_not_start_are_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pool, "_START", "raise SystemExit(3)")
    with pytest.raises(ChatBridgeError, match="does not start"):
        DecodingPool(2)


def test_sounds_and_repeated_frames_count_as_bytes():
    for source in (SOUND, VIDEO):
        with pytest.raises(MediaError, match=r"samples at .* Hz exceed 1000 bytes"):
            media.open_audio(source, limits=Limits(max_bytes=1000))
    media.open_video(VIDEO, lambda count: [0], limits=Limits(max_bytes=3 * 64 * 48))
    with pytest.raises(MediaError, match="2 frames of 64 x 48 pixels exceed"):
        media.open_video(VIDEO, lambda count: [0, 0], limits=Limits(max_bytes=3 * 64 * 48))
