"""Sounds of every kind become the right mono samples, and what cannot be opened is one `MediaError`."""

from __future__ import annotations

import struct
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media import Limits, has_audio_track, open_audio
from tests.media.making import encoded, sound_alone, sound_file, tone, video_file


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 44101, 48000, 96000])
def test_any_rate(rate: int) -> None:
    got = open_audio((tone(2.0, rate), rate))
    assert got.dtype == np.float32
    assert len(got) == pytest.approx(32_000, abs=2)
    np.testing.assert_allclose(got[200:-200], tone(2.0, 16_000)[200 : len(got) - 200], atol=0.02)


def test_scales() -> None:
    samples = tone(0.25, 16_000, loudness=0.9)
    wav = {"PCM_U8": 0.01, "PCM_16": 1e-4, "PCM_24": 1e-6, "PCM_32": 1e-6, "FLOAT": 1e-7, "DOUBLE": 1e-7, "ULAW": 0.02}
    cases = [("WAV", subtype, tolerance) for subtype, tolerance in wav.items()]
    for form, subtype, tolerance in cases + [(form, "PCM_16", 1e-4) for form in ("FLAC", "AIFF", "CAF", "AU")]:
        got = open_audio(sound_file(samples, 16_000, form, subtype))
        np.testing.assert_allclose(got, samples, atol=tolerance, err_msg=f"{form} {subtype}")


@pytest.mark.parametrize(("form", "codec"), [("ogg", "libopus"), ("mp3", "mp3"), ("mp4", "aac")])
def test_lossy_formats(form: str, codec: str) -> None:
    """Encoders pad; the padding before the sound is not part of it."""
    got, sound = open_audio(sound_alone(form, codec, 2.0), 48_000), tone(2.0, 48_000)
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


def test_arrays_with_their_own_rate() -> None:
    slow = tone(0.1, 8000)
    assert len(open_audio((slow, 8000))) == 1600
    np.testing.assert_array_equal(open_audio((slow, np.float64(8000.0))), open_audio((slow, 8000)))
    for rate in (0, 8000.5, "8000", float("nan")):
        with pytest.raises(MediaError, match=r"array of shape \(800,\)"):
            open_audio((slow, rate))  # type: ignore[arg-type]
    with pytest.raises(MediaError, match="an array and its sampling rate"):
        open_audio((8000, slow))  # type: ignore[arg-type]


def test_what_cannot_be_opened_says_why() -> None:
    good = sound_file(tone(0.5, 16_000), 16_000)
    for source, words in (
        (video_file(3), "no audio track"),
        (encoded(Image.new("RGB", (4, 4)), "PNG"), "it is an image"),
        (sound_file(np.zeros(0, np.float32), 16_000), "has no sound"),
        (np.array([0.0, np.nan] * 500, np.float32), "not all finite"),
        (sound_file(tone(0.5, 500, 50), 500), "500 Hz is out of range"),
        (tone(0.1, 16_000) * 32768, r"its samples reach 16384, expected floats in \[-1, 1\]"),
        (sound_file(tone(0.1, 16_000) * 32768, 16_000, subtype="FLOAT"), "its samples reach 16384"),
        (np.zeros((2, 2), np.float32), "the channel axis of"),
        (np.zeros((33, 400), np.float32), "the channel axis of"),
        (np.zeros((2, 2, 2)), "the channel axis of"),
        (np.zeros(9, np.uint16), "no standard scale"),
        (b"junk" * 50, "damaged"),
        (good[:20], "damaged"),
    ):
        with pytest.raises(MediaError, match=words):
            open_audio(source)  # type: ignore[arg-type]
    for long in (good, video_file(3, sound=tone(1.0, 48_000))):
        with pytest.raises(MediaError, match=r"limit of 0\.1 s"):
            open_audio(long, limits=Limits(max_seconds=0.1))


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


@pytest.mark.parametrize(("layout", "codec"), [("7.1", "libopus"), ("7.1", "flac"), ("hexadecagonal", "wavpack")])
def test_eight_channels_and_more(layout: str, codec: str) -> None:
    """PyAV reads beyond the planes of such frames, which kills the process."""
    gains = np.linspace(0, 1, av.AudioLayout(layout).nb_channels + 1)[1:]
    data = sound_alone("matroska", codec, 1.0, layout, gains.tolist())
    for channel, gain in (("first", gains[0]), ("mean", gains.mean())):
        heard = open_audio(data, 48_000, channel)[5000:40_000]  # type: ignore[arg-type]
        assert np.abs(heard).max() == pytest.approx(0.5 * gain, rel=0.25)
