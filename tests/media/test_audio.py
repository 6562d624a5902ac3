"""Sounds of every kind become the right mono samples, and what cannot be opened is one `MediaError`."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media import Limits, open_audio
from lavis_chatbridge.media.container import has_audio_track
from tests.media.making import encoded, sound_file, tone, video_file


def pitch(samples: np.ndarray, rate: int = 16_000) -> float:
    """The strongest frequency, in Hz."""
    return float(np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax() * rate / len(samples))


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
def test_any_rate(rate: int) -> None:
    got = open_audio(sound_file(tone(1.0, rate), rate))
    assert got.dtype == np.float32
    assert len(got) == 16_000
    assert pitch(got) == pytest.approx(440, abs=1.5)
    assert np.abs(got[500:-500]).max() == pytest.approx(0.5, abs=0.01)


def test_rates_without_a_common_divisor() -> None:
    got = open_audio((tone(2.0, 44_101), 44_101))
    assert len(got) == pytest.approx(32_000, abs=2)
    assert pitch(got) == pytest.approx(440, abs=1)
    np.testing.assert_allclose(got[200:-200], tone(2.0, 16_000)[200 : len(got) - 200], atol=0.01)


@pytest.mark.parametrize(
    ("form", "subtype", "tolerance"),
    [
        ("WAV", "PCM_U8", 0.01),
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "PCM_32", 1e-6),
        ("WAV", "FLOAT", 1e-7),
        ("WAV", "DOUBLE", 1e-7),
        ("WAV", "ULAW", 0.02),
        ("FLAC", "PCM_16", 1e-4),
        ("AIFF", "PCM_16", 1e-4),
        ("CAF", "PCM_16", 1e-4),
        ("AU", "PCM_16", 1e-4),
    ],
)
def test_scales(form: str, subtype: str, tolerance: float) -> None:
    samples = tone(0.25, 16_000, loudness=0.9)
    got = open_audio(sound_file(samples, 16_000, form, subtype))
    np.testing.assert_allclose(got, samples, atol=tolerance)


@pytest.mark.parametrize(("form", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")])
def test_lossy_formats(form: str, subtype: str) -> None:
    got = open_audio(sound_file(tone(1.0, 48_000), 48_000, form, subtype))
    assert len(got) == pytest.approx(16_000, abs=900)
    assert pitch(got) == pytest.approx(440, abs=2)
    assert np.sqrt((got**2).mean()) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)


@pytest.mark.parametrize("form", ["mp4", "matroska", "webm"])
def test_sound_tracks_of_videos(form: str, tmp_path: Path) -> None:
    codec: dict[str, Any] = {"codec": "libvpx-vp9", "b_frames": 0} if form == "webm" else {}
    path = tmp_path / f"clip.{form}"
    path.write_bytes(video_file(5, form=form, sound=tone(1.0, 48_000), **codec))
    for source in (path, path.read_bytes()):
        got = open_audio(source)
        assert len(got) == pytest.approx(16_000, abs=900)
        assert pitch(got) == pytest.approx(440, abs=2)


def test_tags_that_are_not_utf_8_do_not_cost_the_file() -> None:
    sound = sound_file(tone(0.25, 16_000), 16_000)
    title = "Ganz schön ".encode("latin-1") + b"."
    tags = b"INFOINAM" + struct.pack("<I", len(title)) + title
    body = sound[8:] + b"LIST" + struct.pack("<I", len(tags)) + tags
    tagged = b"RIFF" + struct.pack("<I", len(body)) + body
    assert has_audio_track(tagged)
    np.testing.assert_array_equal(open_audio(tagged), open_audio(sound))


def test_channels() -> None:
    left, right = tone(0.5, 16_000, 300.0, 0.4), tone(0.5, 16_000, 900.0, 0.2)
    data = sound_file(np.stack([left, right]), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(open_audio(data), (left + right) / 2, atol=1e-6)
    np.testing.assert_allclose(open_audio(data, channel="first"), left, atol=1e-6)
    six = sound_file(np.stack([left] * 5 + [right]), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(open_audio(six), (5 * left + right) / 6, atol=1e-6)


def test_float_samples_on_the_scale_of_int16_are_refused() -> None:
    for source in (tone(0.1, 16_000) * 32768, sound_file(tone(0.1, 16_000) * 32768, 16_000, subtype="FLOAT")):
        with pytest.raises(MediaError, match=r"its samples reach 16384, expected floats in \[-1, 1\]"):
            open_audio(source)


def test_arrays_with_their_own_rate() -> None:
    slow = tone(0.1, 8000)
    assert len(open_audio((slow, 8000))) == 1600
    np.testing.assert_array_equal(open_audio((slow, np.float64(8000.0))), open_audio((slow, 8000)))
    for rate in (0, 8000.5, "8000", None, float("nan")):
        with pytest.raises(MediaError, match=r"array of shape \(800,\)"):
            open_audio((slow, rate))  # type: ignore[arg-type]
    for pair in ((8000, slow), (slow, 8000, 1), (b"wav", 8000)):
        with pytest.raises(MediaError, match="an array and its sampling rate"):
            open_audio(pair)  # type: ignore[arg-type]


def test_arrays_with_channels_first_or_last() -> None:
    left, right = tone(0.1, 16_000), tone(0.1, 16_000, 660.0)
    for channels in (np.stack([left, right]), np.stack([left, right], axis=1)):
        np.testing.assert_array_equal(open_audio(channels), (left + right) / 2)
        np.testing.assert_array_equal(open_audio(channels, channel="first"), left)
    np.testing.assert_array_equal(open_audio(left[:, None]), left)
    for unclear in (np.zeros((2, 2), np.float32), np.zeros((400, 33), np.float32), np.zeros((33, 400), np.float32)):
        with pytest.raises(MediaError, match="the channel axis of"):
            open_audio(unclear)


def test_silent_short_and_long() -> None:
    assert not open_audio(sound_file(np.zeros(8000, np.float32), 8000)).any()
    assert len(open_audio(sound_file(tone(0.01, 8000), 8000))) == 160
    long = sound_file(np.stack([tone(130, 8000)] * 2), 8000)
    assert len(open_audio(long)) == 130 * 16_000


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    good = sound_file(tone(0.5, 16_000), 16_000)
    with pytest.raises(MediaError, match="no such file"):
        open_audio(tmp_path / "none.wav")
    with pytest.raises(MediaError, match="no audio track"):
        open_audio(video_file(3))
    with pytest.raises(MediaError, match="it is an image"):
        open_audio(encoded(Image.new("RGB", (4, 4)), "PNG"))
    with pytest.raises(MediaError, match="holds no sound"):
        open_audio(sound_file(np.zeros(0, np.float32), 16_000))
    with pytest.raises(MediaError, match=r"limit of 0\.1 s"):
        open_audio(good, limits=Limits(max_seconds=0.1))
    with pytest.raises(MediaError, match=r"limit of 0\.1 s"):
        open_audio(video_file(3, sound=tone(1.0, 48_000)), limits=Limits(max_seconds=0.1))
    with pytest.raises(MediaError, match="not all finite"):
        open_audio(np.array([0.0, np.nan] * 500, np.float32))
    with pytest.raises(MediaError, match="500 Hz is out of range"):
        open_audio(sound_file(tone(0.5, 500, 50), 500))
    for source in (b"junk" * 50, good[:20], np.zeros((2, 2, 2)), np.zeros(9, np.uint16), 3):
        with pytest.raises(MediaError):
            open_audio(source)  # type: ignore[arg-type]


def test_a_wav_whose_recorder_was_killed_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    good = bytearray(sound_file(tone(0.5, 16_000), 16_000))
    start = good.index(b"data") + 4
    good[start : start + 4] = good[4:8] = bytes(4)
    path = tmp_path / "killed.wav"
    path.write_bytes(good)
    for source in (bytes(good), path):
        np.testing.assert_allclose(open_audio(source), tone(0.5, 16_000), atol=1e-4)


def test_headers_that_lie_about_the_length() -> None:
    good = bytearray(sound_file(tone(0.5, 16_000), 16_000))
    start = good.index(b"data") + 4
    good[start : start + 4] = struct.pack("<I", 0x7FFFFFF0)  # 18 hours
    good[4:8] = struct.pack("<I", 0x7FFFFFFF)
    assert len(open_audio(bytes(good))) == 8000
    flac = bytearray(sound_file(tone(0.5, 16_000), 16_000, "FLAC"))
    flac[21:26] = bytes([flac[21] & 0xF0 | 0x0F]) + b"\xff\xff\xff\xff"  # the total of samples in STREAMINFO: 50 days
    with pytest.raises(MediaError):
        open_audio(bytes(flac))


def test_a_flac_that_was_written_into_a_pipe_does_not_say_how_long_it_is() -> None:
    samples = tone(0.5, 16_000)
    flac = bytearray(sound_file(samples, 16_000, "FLAC"))
    flac[21:26] = bytes([flac[21] & 0xF0, 0, 0, 0, 0])
    np.testing.assert_allclose(open_audio(bytes(flac)), samples, atol=1e-4)
    with pytest.raises(MediaError, match=r"longer than the limit of 0\.1 s"):
        open_audio(bytes(flac), limits=Limits(max_seconds=0.1))


def surround(layout: str, codec: str, gains: list[float]) -> bytes:
    """A second of a tone in Matroska, in each channel as loud as its gain."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream: Any = container.add_stream(codec, rate=48_000, layout=layout)
        form, samples = stream.codec_context.format, np.outer(tone(1.0, 48_000), gains).astype(np.float32)
        for start in range(0, len(samples), 960):
            packed = np.ascontiguousarray(samples[start : start + 960].reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
            frame.sample_rate, frame.pts = 48_000, start
            for part in av.AudioResampler(format=form, layout=layout, rate=48_000).resample(frame):
                container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("layout", "codec"), [("7.1", "libopus"), ("7.1", "flac"), ("7.1", "aac"), ("hexadecagonal", "wavpack")]
)
def test_eight_channels_and_more(layout: str, codec: str) -> None:
    """PyAV reads beyond the planes of such frames, which kills the process."""
    count = av.AudioLayout(layout).nb_channels
    gains = [(number + 1) / count for number in range(count)]
    first = open_audio(surround(layout, codec, gains), rate=48_000, channel="first")
    assert np.abs(first[5000:40_000]).max() == pytest.approx(0.5 / count, rel=0.25)
    mean = open_audio(surround(layout, codec, gains), rate=48_000)
    assert pitch(mean, 48_000) == pytest.approx(440, abs=2)
    if codec == "flac":
        assert np.abs(mean).max() == pytest.approx(0.5 * np.mean(gains), rel=1e-3)
