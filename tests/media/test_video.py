"""Chosen frames are those that FFmpeg shows, for any container, codec, cut, delay, orientation and frame rate.

``MEDIA_EXAMPLES=20000`` tries that many clips instead of 60.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media import Limits, modality_of, open_audio, open_video
from lavis_chatbridge.media import video as video_module
from tests.media.making import (
    ORIENTATIONS,
    cut,
    encoded,
    number_of,
    sound_alone,
    sound_file,
    stored_as,
    tone,
    video_file,
)

os.environ.setdefault("SVT_LOG", "0")  # the AV1 encoder is silent
STEADY = {"libx264": {"sc_threshold": "0"}, "libx265": {"x265-params": "scenecut=0:log-level=none"}}
FORMATS = {
    "mp4": ("libx264", "libx265", "libsvtav1"),
    "mov": ("libx264", "libx265"),
    "matroska": ("libx264", "libx265", "libvpx-vp9"),
    "webm": ("libvpx-vp9", "libsvtav1"),
    "avi": ("libx264", "mpeg4"),
}
AVAILABLE = [(form, codec) for form, codecs in FORMATS.items() for codec in codecs if codec in av.codecs_available]


def these(*indices: int) -> Callable[[int], Sequence[int]]:
    return lambda count: indices


@st.composite
def clips(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `video_file`, the start that an edit list hides (in 1/100 s), and the chosen shares of frames."""
    form, codec = draw(st.sampled_from(AVAILABLE))
    count = draw(st.integers(0, 40))
    constant = form == "avi" or draw(st.booleans())  # AVI has one frame rate
    gaps = [4] * count if constant else draw(st.lists(st.integers(2, 60), min_size=count, max_size=count))
    edits = form in ("mp4", "mov")
    reorders = codec == "libx264" or (codec == "libx265" and count > 3)  # x265 fails for shorter clips with B-frames
    cuts = edits and codec != "libsvtav1"  # PyAV copies no stream whose decoder is libdav1d
    return {
        "form": form,
        "codec": codec,
        "times": [0, *np.cumsum(gaps).tolist()],
        "gop": draw(st.sampled_from([1, 5, 12, 250])),
        "b_frames": draw(st.integers(0, 3)) if reorders else 0,
        "orientation": ORIENTATIONS[draw(st.integers(0, 7)) if edits else 0],
        "sound_start": draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])) if form != "avi" else 0.0,
        "hidden": draw(st.integers(0, sum(gaps) // 2)) if cuts else 0,
        "choice": draw(st.lists(st.floats(0, 0.999), min_size=1, max_size=6)),
    }


def made(hidden: int, choice: list[float], times: list[int], **clip: Any) -> bytes:
    seconds = (times[-1] + 4) / 100 - clip["sound_start"]
    sound = tone(seconds, 48_000) if seconds > 0.1 else None
    own = {"size": (96, 64), "options": STEADY.get(clip["codec"])}  # x265 aborts below 64 pixels
    data = video_file(len(times), times=times, sound=sound, **own, **clip)
    return cut(data, hidden / 100, clip["form"]) if hidden else data


def shown_by_ffmpeg(data: bytes) -> tuple[list[np.ndarray], list[int], int]:
    """All frames that FFmpeg's plain decoding gives, their times, and the end of the last one."""
    with av.open(io.BytesIO(data)) as container:
        packets = list(container.demux(video=0))
        frames = [frame for packet in packets for frame in packet.decode()]
    last = max((p for p in packets if p.size and not p.is_discard), key=lambda p: p.pts or 0)
    pixels = [frame.to_ndarray(format="rgb24") for frame in frames]
    return pixels, [frame.pts or 0 for frame in frames], (last.pts or 0) + (last.duration or 0)


def shown_in_the_middle(times: list[int], end: int, index: int) -> int:
    """The frame in the middle of the ``index``-th of equal parts of the time; at a constant rate, ``index``."""
    if len(times) == 1:
        return 0
    gap = (times[-1] - times[0]) / (len(times) - 1)
    uneven = max(abs(time - times[0] - number * gap) for number, time in enumerate(times)) >= gap / 2
    if not uneven and end < times[-1] + 1.5 * gap:
        return index
    part = ((end if end > times[-1] else times[-1] + gap) - times[0]) / len(times)
    return bisect_right(times, times[0] + (index + 0.5) * part) - 1


@settings(
    max_examples=int(os.environ.get("MEDIA_EXAMPLES", "60")),
    deadline=None,
    derandomize="MEDIA_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(clips())
def test_chosen_frames_are_those_that_ffmpeg_shows(clip: dict[str, Any]) -> None:
    data = made(**clip)
    frames, times, end = shown_by_ffmpeg(data)
    indices = [int(share * len(frames)) for share in clip["choice"]]
    counts: list[int] = []
    got = open_video(data, lambda count: (counts.append(count), indices)[1])  # type: ignore[func-returns-value]
    assert counts == [len(frames)]
    wanted = indices if clip["form"] == "avi" else [shown_in_the_middle(times, end, index) for index in indices]
    for picture, rank in zip(got, wanted, strict=True):
        assert np.array_equal(stored_as(picture, clip["orientation"]), frames[rank])
    if set(np.diff(clip["times"])) <= {4}:
        assert wanted == indices
        assert [number_of(picture) - number_of(got[0]) for picture in got] == [i - indices[0] for i in indices]


VIDEOS: dict[str, dict[str, Any]] = {
    "one group": {"gop": 250, "b_frames": 3, "options": {"x264-params": "b-pyramid=normal"}},
    "open groups": {"options": {"x264-params": "open-gop=1"}},
    "gradual refresh": {"options": {"x264-params": "intra-refresh=1:keyint=10"}, "gop": 60},
    "interlaced": {"options": {"flags": "+ildct+ilme", "x264-params": "tff=1"}},
    "ts mpeg2": {"form": "mpegts", "codec": "mpeg2video"},
}


@pytest.mark.parametrize("name", VIDEOS)
def test_every_choice_of_frames_equals_a_full_decoding(name: str) -> None:
    data = video_file(40, **VIDEOS[name])
    every = np.stack(shown_by_ffmpeg(data)[0])
    assert len(every) == 40
    rng = np.random.default_rng(3)
    for indices in [[index] for index in range(40)] + [rng.integers(40, size=5).tolist() for _ in range(20)]:
        got = open_video(data, these(*indices))
        assert np.array_equal(got, every[indices]), indices


def test_a_damaged_frame_is_replaced_by_the_nearest_intact_one() -> None:
    data = video_file(8, gop=1, b_frames=0)
    with av.open(io.BytesIO(data)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for damaged in packets[3:6]:
        data = data.replace(damaged, bytes(len(damaged)))
    assert [number_of(frame) for frame in open_video(data, range)] == [0, 1, 2, 2, 2, 6, 6, 7]
    with pytest.raises(MediaError, match="most of the chosen frames cannot be decoded"):
        open_video(data, these(3, 4))


def test_only_needed_frames_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    frames_of = video_module._Video._frames

    def counting(self: Any, packet: Any) -> list:
        frames = frames_of(self, packet)
        seen.append(len(frames))
        return frames

    monkeypatch.setattr(video_module._Video, "_frames", counting)
    open_video(video_file(96, gop=12, b_frames=0, options=STEADY["libx264"]), these(12, 60))
    assert sum(seen) == 2  # both stand alone
    seen.clear()
    open_video(video_file(96, gop=96, b_frames=3, options=STEADY["libx264"]), these(60))
    assert sum(seen) < 40  # of 61: those that no other refers to are skipped


@pytest.mark.parametrize(("form", "codec"), [f for f in AVAILABLE if f[0] != "avi"])
def test_sound_and_picture_agree_in_length(form: str, codec: str) -> None:
    options: dict[str, Any] = {"b_frames": 0} if codec in ("libvpx-vp9", "libsvtav1") else {}
    for start in (0.0, 0.7):
        sound = tone(2.0 - start, 48_000)
        data = video_file(50, form=form, codec=codec, sound=sound, sound_start=start, **options)
        heard = open_audio(data)
        assert len(heard) / 16_000 == pytest.approx(2.0, abs=0.03)
        assert not np.abs(heard[: int(16_000 * start) - 500]).any() or start == 0.0
        assert np.abs(heard[int(16_000 * start) + 500 :][:800]).max() > 0.3
        if form in ("mp4", "mov") and codec != "libsvtav1":
            shorter = cut(data, 0.5, form)
            assert len(open_audio(shorter)) / 16_000 == pytest.approx(1.5, abs=0.06)
            assert open_video(shorter, lambda count: range(count)).shape[0] == pytest.approx(37.5, abs=1.0)


@pytest.mark.parametrize(("matrix", "full"), [(1, False), (1, True), (5, False), (9, False)])
def test_colours_follow_the_matrix_and_range_of_the_file(matrix: int, full: bool) -> None:
    red = np.full((48, 64, 3), (254, 0, 0), np.uint8)
    frame = av.VideoFrame.from_ndarray(red, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=matrix, src_color_range=2, dst_color_range=2 if full else 1
    )
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for target in (stream.codec_context, frame):
            target.colorspace, target.color_range = matrix, 2 if full else 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    got = open_video(file.getvalue(), these(0))[0, 20, 20].astype(int)
    assert np.abs(got - (254, 0, 0)).max() <= 3


def test_pixels_that_are_not_square_are_stretched() -> None:
    for orientation, shape in ((ORIENTATIONS[0], (1, 48, 85, 3)), (ORIENTATIONS[1], (1, 64, 64, 3))):
        data = video_file(3, pixel_aspect=Fraction(4, 3), orientation=orientation)
        assert open_video(data, these(1)).shape == shape


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animated_pictures(form: str) -> None:
    frames = [Image.new("RGB", (16, 12), (40 * index, 0, 90)) for index in range(6)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=50, **options)
    got = open_video(data, lambda count: [0, count - 2, count - 1])
    assert got.shape == (3, 12, 16, 3)
    assert np.abs(got[:, -1, -1, 0].astype(int) - [0, 160, 200]).max() <= 3


def test_still_pictures_and_arrays() -> None:
    still = Image.new("RGB", (16, 12), (1, 2, 3))
    for source in (encoded(still, "JPEG"), still):
        assert open_video(source, lambda count: [count - 1] * 2).shape == (2, 12, 16, 3)
    array = np.random.default_rng(0).integers(0, 255, (7, 4, 6, 3), dtype=np.uint8)
    assert np.array_equal(open_video(array, these(6, 2)), array[[6, 2]])
    assert open_video(array[..., 0], these(0)).shape == (1, 4, 6, 3)


def test_a_header_that_states_too_many_frames(tmp_path: Path) -> None:
    """The header of a download that stopped comes first and counts all frames of the whole file."""
    path = tmp_path / "stopped.mp4"
    with (
        av.open(io.BytesIO(video_file(90, b_frames=0))) as source,
        av.open(path, "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux():
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    data, counts = path.read_bytes(), list[int]()
    got = open_video(data[: len(data) * 3 // 4], lambda count: (counts.append(count), [0, count - 1])[1])  # type: ignore[func-returns-value]
    assert 30 < counts[0] < 80
    assert [number_of(frame) for frame in got] == [0, counts[0] - 1]


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    """Playlists reach no other file."""
    (tmp_path / "secret.ts").write_bytes(video_file(5, form="mpegts"))
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(hls)
    whole = video_file(9)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile secret.ts\n")
    for source, limits, words in (
        ("http://127.0.0.1:9/a.mp4", Limits(), "no such file"),
        (sound_file(tone(0.1, 8000), 8000), Limits(), "no video track"),
        (video_file(2), Limits(max_pixels=100), "more than the limit of 100"),
        (video_file(9), Limits(max_frames=5), "more than 5 frames"),
        (video_file(9), Limits(max_bytes=20_000), "exceed 20000 bytes"),
        (tmp_path / "list.m3u8", Limits(), "Invalid argument"),
        (tmp_path / "list.mp4", Limits(), "Invalid argument"),
        (b"junk" * 50, Limits(), "cut off or damaged, or not an audio or video file of a known format"),
        (video_file(9)[:200], Limits(), "cut off or damaged"),
        (whole[: whole.index(b"moov") + 100], Limits(), "no video track; the file is cut off or damaged"),
        (whole[: whole.index(b"stsd") + 150], Limits(), "it is cut off"),
        (np.zeros((4, 4)), Limits(), "a video has the shape"),
    ):
        with pytest.raises(MediaError, match=words):
            open_video(source, lambda count: range(count), limits=limits)  # type: ignore[arg-type]


def test_modality_by_content() -> None:
    voice = sound_alone()
    image = encoded(Image.new("L", (4, 4)), "PNG")
    sources = (image, video_file(2), video_file(2, sound=tone(0.2, 48_000)), sound_file(tone(0.1, 8000), 8000), voice)
    assert [modality_of(source) for source in sources] == ["image", "video", "video", "audio", "audio"]
    with pytest.raises(MediaError, match="no video track; it has only sound"):
        open_video(voice, these(0))
    with pytest.raises(MediaError, match="damaged"):
        modality_of(b"junk" * 50)
