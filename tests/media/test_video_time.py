"""Chosen frames are those that FFmpeg shows, for any container, codec, cut, delay, orientation and frame rate.

``MEDIA_EXAMPLES=20000`` tries that many clips instead of 60.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavis_chatbridge.media import open_audio, open_video
from tests.media.making import ORIENTATIONS, cut, number_of, numbered, stored_as, tone, video_file

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


@dataclass(frozen=True)
class Clip:
    """What a video is made of; times and gaps in units of 1/100 s."""

    form: str
    codec: str
    gaps: tuple[int, ...]
    gop: int
    b_frames: int
    orientation: int
    cut: int
    sound_start: int
    choice: tuple[float, ...]

    def made(self) -> bytes:
        times = [0, *np.cumsum(self.gaps).tolist()]
        seconds = (times[-1] + 4 - self.sound_start) / 100
        sound = tone(seconds, 48_000) if seconds > 0.1 else None
        data = video_file(
            len(times),
            size=(96, 64),  # x265 aborts below 64 pixels
            form=self.form,
            codec=self.codec,
            times=times,
            orientation=ORIENTATIONS[self.orientation],
            gop=self.gop,
            b_frames=self.b_frames,
            options=STEADY.get(self.codec),
            drawn=numbered,
            sound=sound,
            sound_start=self.sound_start / 100,
        )
        return cut(data, self.cut / 100, self.form) if self.cut else data


@st.composite
def clips(draw: st.DrawFn) -> Clip:
    form, codec = draw(st.sampled_from(AVAILABLE))
    count = draw(st.integers(0, 40))
    constant = form == "avi" or draw(st.booleans())  # AVI has one frame rate
    gap = st.integers(2, 60)
    gaps = [4] * count if constant else draw(st.lists(gap, min_size=count, max_size=count))
    edits = form in ("mp4", "mov")
    reorders = codec == "libx264" or (codec == "libx265" and count > 3)  # x265 fails for shorter clips with B-frames
    cuts = edits and codec != "libsvtav1"  # PyAV copies no stream whose decoder is libdav1d
    return Clip(
        form,
        codec,
        tuple(gaps),
        gop=draw(st.sampled_from([1, 5, 12, 250])),
        b_frames=draw(st.integers(0, 3)) if reorders else 0,
        orientation=draw(st.integers(0, 7)) if edits else 0,
        cut=draw(st.integers(0, sum(gaps) // 2)) if cuts else 0,
        sound_start=draw(st.sampled_from([0, 0, 30, 100])) if form != "avi" else 0,
        choice=tuple(draw(st.lists(st.floats(0, 0.999), min_size=1, max_size=6))),
    )


def shown_by_ffmpeg(data: bytes) -> tuple[list[np.ndarray], list[int], int]:
    """All frames that FFmpeg's plain decoding gives, their times, and the end of the last one."""
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    with av.open(io.BytesIO(data)) as container:
        last = max((p for p in container.demux(video=0) if p.size and not p.is_discard), key=lambda p: p.pts or 0)
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
def test_chosen_frames_are_those_that_ffmpeg_shows(clip: Clip) -> None:
    data = clip.made()
    frames, times, end = shown_by_ffmpeg(data)
    indices = [int(share * len(frames)) for share in clip.choice]
    counts: list[int] = []
    got = open_video(data, lambda count: (counts.append(count), indices)[1])  # type: ignore[func-returns-value]
    assert counts == [len(frames)]
    wanted = indices if clip.form == "avi" else [shown_in_the_middle(times, end, index) for index in indices]
    for picture, rank in zip(got, wanted, strict=True):
        assert np.array_equal(stored_as(picture, ORIENTATIONS[clip.orientation]), frames[rank])
        assert number_of(picture) == number_of(upright(frames[rank], clip.orientation))
    if set(clip.gaps) <= {4}:
        assert wanted == indices
        assert [number_of(picture) - number_of(got[0]) for picture in got] == [i - indices[0] for i in indices]


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A stored frame as its display matrix shows it, turned by the inverse of `stored_as`."""
    a, b, c, d = ORIENTATIONS[orientation]
    return stored_as(pixels, (a, c, b, d))


@pytest.mark.parametrize(("form", "codec"), [f for f in AVAILABLE if f[0] in ("mp4", "mov", "matroska", "webm")])
def test_sound_and_picture_agree_in_length(form: str, codec: str) -> None:
    options: dict[str, Any] = {"b_frames": 0} if codec in ("libvpx-vp9", "libsvtav1") else {}
    for start in (0.0, 0.7):
        sound = tone(2.0 - start, 48_000)
        data = video_file(50, form=form, codec=codec, sound=sound, sound_start=start, drawn=numbered, **options)
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
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        frame.colorspace, frame.color_range = matrix, 2 if full else 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    got = open_video(file.getvalue(), lambda count: [0])[0, 20, 20].astype(int)
    assert np.abs(got - (254, 0, 0)).max() <= 3
