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
from lavis_chatbridge.media import Limits, has_audio_track, open_audio
from tests.media.making import add_sound, encoded, sound_file, tone, video_file


def pitch(samples: np.ndarray, rate: int = 16_000) -> float:
    """The strongest frequency, in Hz."""
    return float(np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax() * rate / len(samples))


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 44101, 48000, 96000])
def test_any_rate(rate: int) -> None:
    got = open_audio((tone(2.0, rate), rate))
    assert got.dtype == np.float32
    assert len(got) == pytest.approx(32_000, abs=2)
    np.testing.assert_allclose(got[200:-200], tone(2.0, 16_000)[200 : len(got) - 200], atol=0.02)


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


@pytest.mark.parametrize(("form", "codec"), [("ogg", "libopus"), ("mp3", "mp3"), ("mp4", "aac")])
def test_lossy_formats(form: str, codec: str) -> None:
    """Encoders pad; the padding before the sound is not part of it."""
    sound, file = tone(2.0, 48_000), io.BytesIO()
    with av.open(file, "w", format=form) as container:
        add_sound(container, container.add_stream(codec, rate=48_000), sound)
    got = open_audio(file.getvalue(), 48_000)
    assert len(got) == pytest.approx(len(sound), abs=1200)
    np.testing.assert_allclose(got[2000:-4000], sound[2000 : len(got) - 4000], atol=0.04)


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
    stereo = np.stack([left, right])
    for source in (sound_file(stereo, 16_000, subtype="FLOAT"), stereo, stereo.T):
        np.testing.assert_allclose(open_audio(source), (left + right) / 2, atol=1e-6)
        np.testing.assert_allclose(open_audio(source, channel="first"), left, atol=1e-6)
    six = sound_file(np.stack([left] * 5 + [right]), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(open_audio(six), (5 * left + right) / 6, atol=1e-6)
    np.testing.assert_array_equal(open_audio(left[:, None]), left)
    for unclear in (np.zeros((2, 2), np.float32), np.zeros((33, 400), np.float32)):
        with pytest.raises(MediaError, match="the channel axis of"):
            open_audio(unclear)


def test_float_samples_on_the_scale_of_int16_are_refused() -> None:
    for source in (tone(0.1, 16_000) * 32768, sound_file(tone(0.1, 16_000) * 32768, 16_000, subtype="FLOAT")):
        with pytest.raises(MediaError, match=r"its samples reach 16384, expected floats in \[-1, 1\]"):
            open_audio(source)


def test_arrays_with_their_own_rate() -> None:
    slow = tone(0.1, 8000)
    assert len(open_audio((slow, 8000))) == 1600
    np.testing.assert_array_equal(open_audio((slow, np.float64(8000.0))), open_audio((slow, 8000)))
    for rate in (0, 8000.5, "8000", float("nan")):
        with pytest.raises(MediaError, match=r"array of shape \(800,\)"):
            open_audio((slow, rate))  # type: ignore[arg-type]
    with pytest.raises(MediaError, match="an array and its sampling rate"):
        open_audio((8000, slow))  # type: ignore[arg-type]


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
    for long in (good, video_file(3, sound=tone(1.0, 48_000))):
        with pytest.raises(MediaError, match=r"limit of 0\.1 s"):
            open_audio(long, limits=Limits(max_seconds=0.1))
    with pytest.raises(MediaError, match="not all finite"):
        open_audio(np.array([0.0, np.nan] * 500, np.float32))
    with pytest.raises(MediaError, match="500 Hz is out of range"):
        open_audio(sound_file(tone(0.5, 500, 50), 500))
    for source in (b"junk" * 50, good[:20], np.zeros((2, 2, 2)), np.zeros(9, np.uint16), 3):
        with pytest.raises(MediaError):
            open_audio(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("stated", [0, 0x7FFFFFF0])
def test_a_wav_with_a_wrong_length_is_read_as_far_as_it_goes(stated: int, tmp_path: Path) -> None:
    """A recorder that is killed leaves the length 0; a header may also state 18 hours."""
    good = bytearray(sound_file(tone(0.5, 16_000), 16_000))
    start = good.index(b"data") + 4
    good[start : start + 4] = good[4:8] = struct.pack("<I", stated)
    path = tmp_path / "killed.wav"
    path.write_bytes(good)
    for source in (bytes(good), path):
        np.testing.assert_allclose(open_audio(source), tone(0.5, 16_000), atol=1e-4)


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


@pytest.mark.parametrize(("layout", "codec"), [("7.1", "libopus"), ("7.1", "flac"), ("hexadecagonal", "wavpack")])
def test_eight_channels_and_more(layout: str, codec: str) -> None:
    """PyAV reads beyond the planes of such frames, which kills the process."""
    count = av.AudioLayout(layout).nb_channels
    gains = [(number + 1) / count for number in range(count)]
    first = open_audio(surround(layout, codec, gains), rate=48_000, channel="first")
    assert np.abs(first[5000:40_000]).max() == pytest.approx(0.5 / count, rel=0.25)
    assert pitch(open_audio(surround(layout, codec, gains), rate=48_000), 48_000) == pytest.approx(440, abs=2)
