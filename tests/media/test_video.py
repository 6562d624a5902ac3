"""Chosen frames of every kind of video are the right ones, and what cannot be opened is one `MediaError`."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media import Limits, modality_of, open_video
from lavis_chatbridge.media import video as video_module
from tests.media.making import ORIENTATIONS, encoded, level, sound_alone, sound_file, tone, video_file


def these(*indices: int) -> Callable[[int], Sequence[int]]:
    return lambda count: indices


def noting(counts: list[int], choose: Callable[[int], Sequence[int]]) -> Callable[[int], Sequence[int]]:
    def noted(count: int) -> Sequence[int]:
        counts.append(count)
        return choose(count)

    return noted


def decoded_fully(data: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


VIDEOS: dict[str, dict[str, Any]] = {
    "mp4": {},
    "mp4, one group": {"gop": 250, "b_frames": 3, "options": {"x264-params": "b-pyramid=normal"}},
    "mp4, open groups": {"options": {"x264-params": "open-gop=1"}},
    "mp4, gradual refresh": {"options": {"x264-params": "intra-refresh=1:keyint=10"}, "gop": 60},
    "mp4 av1": {"codec": "libsvtav1", "b_frames": 0},
    "mkv": {"form": "matroska"},
    "webm vp9": {"form": "webm", "codec": "libvpx-vp9", "b_frames": 0},
    "avi mpeg4": {"form": "avi", "codec": "mpeg4"},
    "avi h264": {"form": "avi"},
    "ts mpeg2": {"form": "mpegts", "codec": "mpeg2video"},
}


@pytest.mark.parametrize("name", VIDEOS)
def test_chosen_frames_equal_those_of_a_full_decoding(name: str) -> None:
    if VIDEOS[name].get("codec", "libx264") not in av.codecs_available:
        pytest.skip("this build of FFmpeg cannot make such a video")
    data = video_file(40, **VIDEOS[name])
    every = decoded_fully(data)
    rng = np.random.default_rng(3)
    counts: list[int] = []
    choices = [[index] for index in range(40)] + [rng.integers(40, size=5).tolist() for _ in range(20)]
    for indices in choices:
        got = open_video(data, noting(counts, lambda count, indices=indices: indices))  # type: ignore[misc]
        assert np.array_equal(got, np.stack([every[index] for index in indices])), indices
    assert set(counts) == {40}
    assert abs(int(got[0, -1, -1, 0]) - level(indices[0])) <= 3


def test_only_needed_frames_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    frames_of = video_module._Decoder._frames

    def counting(self: Any, packet: Any) -> list:
        frames = frames_of(self, packet)
        seen.append(len(frames))
        return frames

    monkeypatch.setattr(video_module._Decoder, "_frames", counting)
    open_video(video_file(96, gop=12, b_frames=0), these(12, 60))
    assert sum(seen) == 2  # both stand alone
    seen.clear()
    open_video(video_file(96, gop=96, b_frames=3), these(60))
    assert sum(seen) < 40  # of 61: those that no other refers to are skipped


@pytest.mark.parametrize("form", ["mp4", "matroska"])
def test_a_variable_frame_rate_counts_time(form: str) -> None:
    slides = video_file(4, times=[0, 100, 110, 120], form=form)  # the first is shown for 1 s of 1.24
    got = open_video(slides, lambda count: range(3))
    assert np.abs(got[:, -1, -1, 0].astype(int) - [level(i) for i in (0, 0, 0)]).max() <= 3


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animated_pictures(form: str) -> None:
    frames = [Image.new("RGB", (16, 12), (40 * index, 0, 90)) for index in range(6)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=50, **options)
    got = open_video(data, lambda count: [0, count - 2, count - 1])
    assert got.shape == (3, 12, 16, 3)
    assert np.abs(got[:, 5, 5, 0].astype(int) - [0, 160, 200]).max() <= 3


def test_still_pictures_and_arrays() -> None:
    still = Image.new("RGB", (16, 12), (1, 2, 3))
    for source in (encoded(still, "JPEG"), still):
        assert open_video(source, lambda count: [count - 1] * 2).shape == (2, 12, 16, 3)
    array = np.random.default_rng(0).integers(0, 255, (7, 4, 6, 3), dtype=np.uint8)
    assert np.array_equal(open_video(array, these(6, 2)), array[[6, 2]])
    assert open_video(array[..., 0], these(0)).shape == (1, 4, 6, 3)


@pytest.mark.parametrize("orientation", [ORIENTATIONS[0], ORIENTATIONS[1]])
def test_pixels_that_are_not_square_are_stretched(orientation: tuple[int, int, int, int]) -> None:
    data = video_file(3, pixel_aspect=Fraction(4, 3), orientation=orientation)
    assert open_video(data, these(1)).shape == ((1, 48, 85, 3) if orientation == ORIENTATIONS[0] else (1, 64, 64, 3))


def test_interlaced_frames_are_read() -> None:
    flags = {"flags": "+ildct+ilme", "x264-params": "tff=1"}
    got = open_video(video_file(20, options=flags), these(0, 10, 19))
    assert np.abs(got[:, -1, -1, 0].astype(int) - [level(i) for i in (0, 10, 19)]).max() <= 3


def test_a_header_that_states_too_many_frames(tmp_path: Path) -> None:
    """The header of a download that stopped comes first and counts all frames of the whole file."""
    path = tmp_path / "stopped.mp4"
    with av.open(io.BytesIO(video_file(90))) as source, av.open(path, "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux():
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    data, counts = path.read_bytes(), list[int]()
    got = open_video(data[: len(data) * 3 // 4], noting(counts, lambda count: [0, count - 1]))
    assert 30 < counts[0] < 80
    assert np.abs(got[:, -1, -1, 0].astype(int) - [level(0), level(counts[0] - 1)]).max() <= 8


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no such file"):
        open_video(tmp_path / "none.mp4", these(0))
    with pytest.raises(MediaError, match="no video track"):
        open_video(sound_file(tone(0.1, 8000), 8000), these(0))
    with pytest.raises(MediaError, match="more than the limit of 100"):
        open_video(video_file(2), these(0), limits=Limits(max_pixels=100))
    with pytest.raises(MediaError, match="more than 5 frames"):
        open_video(video_file(9), these(0), limits=Limits(max_frames=5))
    with pytest.raises(MediaError, match="exceed 20000 bytes"):
        open_video(video_file(9), lambda count: range(count), limits=Limits(max_bytes=20_000))
    for source in (b"junk" * 50, video_file(9)[:200], np.zeros((4, 4)), 3):
        with pytest.raises(MediaError):
            open_video(source, these(0))  # type: ignore[arg-type]


def test_playlists_reach_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "secret.ts").write_bytes(video_file(5, form="mpegts"))
    lists = {
        "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n",
        "list.mp4": "ffconcat version 1.0\nfile secret.ts\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(MediaError):
            open_video(tmp_path / name, these(0))
    with pytest.raises(MediaError, match="no such file"):
        open_video("http://127.0.0.1:9/a.mp4", these(0))


def test_modality_by_content() -> None:
    voice = sound_alone()
    image = encoded(Image.new("L", (4, 4)), "PNG")
    sources = (image, video_file(2), video_file(2, sound=tone(0.2, 48_000)), sound_file(tone(0.1, 8000), 8000), voice)
    assert [modality_of(source) for source in sources] == ["image", "video", "video", "audio", "audio"]
    with pytest.raises(MediaError, match="no video track; it holds only sound"):
        open_video(voice, these(0))
    with pytest.raises(MediaError, match="damaged, or not an audio or video file of a known format"):
        modality_of(b"junk" * 50)
