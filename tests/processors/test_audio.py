"""The audio processor: how many clips, which, how much of them is sound; both layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchaudio.compliance import kaldi

from lavis_chatbridge.errors import ConfigError, MediaError
from lavis_chatbridge.processors import AudioEvalProcessor, AudioTrainProcessor
from lavis_chatbridge.processors.fbank import cut_clips, fbank, frame_count
from tests.media.making import sound_file, tone


def noise(seconds: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(round(seconds * 16_000), generator=generator)


@pytest.mark.parametrize("mel_bins", [64, 128])
def test_fbank_is_torchaudios(mel_bins: int) -> None:
    samples = noise(3) * torch.linspace(0, 2, 48_000)
    samples[20_000:24_000] = 0.0
    expected = kaldi.fbank(samples[None] * 32768.0, num_mel_bins=mel_bins, sample_frequency=16_000)
    torch.testing.assert_close(fbank(samples, mel_bins), (expected - 15.41663) / (2 * 6.55582), atol=1e-6, rtol=0)


def test_ten_seconds_are_one_clip() -> None:
    clips = AudioEvalProcessor()(sound_file(tone(10.0, 44_100), 44_100))
    assert clips.fbank.shape == (1, 1024, 128)
    assert clips.fbank.dtype == torch.float32
    assert clips.frames.tolist() == [998]
    assert clips.frames.dtype == torch.int64
    assert not clips.fbank[0, 998:].any()
    assert clips.fbank[0, :998].abs().min(dim=1).values.max() > 0


def test_clips_are_the_fbank_of_the_whole() -> None:
    samples = noise(25)
    whole = fbank(samples, 64)
    clips = cut_clips(samples, 64, 1024, 3)
    assert clips.frames.tolist() == [1024, 1024, 2498 - 2048]
    for clip in range(3):
        part = whole[clip * 1024 : (clip + 1) * 1024]
        torch.testing.assert_close(clips.fbank[clip, : len(part)], part, atol=1e-5, rtol=0)
    assert not clips.fbank[2, 450:].any()


@pytest.mark.parametrize(("max_clips", "expected"), [(1, [2]), (2, [1, 4]), (3, [0, 2, 4])])
def test_the_clips_of_long_sounds_are_evenly_spaced(max_clips: int, expected: list[int]) -> None:
    samples = noise(65)  # 6 clips and a third
    got = cut_clips(samples[: 1024 * 160 * 6 + 240], 64, 1024, max_clips)
    whole = fbank(samples, 64)
    for clip, number in zip(got.fbank, expected, strict=True):
        torch.testing.assert_close(clip, whole[number * 1024 : (number + 1) * 1024], atol=1e-5, rtol=0)


def test_training_takes_random_clips() -> None:
    samples = noise(62)
    processor = AudioTrainProcessor.from_config({"max_clips": 2, "mel_bins": 64, "clip_frames": 512})
    drawn = [processor(samples.numpy(), np.random.default_rng(seed)).fbank for seed in (1, 1, 2, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert any(not torch.equal(drawn[0], other) for other in drawn[2:])
    whole = fbank(samples, 64)
    starts = range(0, len(whole) - 512, 512)
    assert all(any(torch.allclose(clip, whole[i : i + 512], atol=1e-5) for i in starts) for clip in drawn[0])


def test_no_clip_is_padding_only() -> None:
    for frames in (1, 15, 16, 17, 1023, 1024, 1025, 1039, 1040, 2048, 2064, 5000):
        samples = noise(1)[:1].repeat(400 + 160 * (frames - 1))
        assert frame_count(len(samples)) == frames
        clips = cut_clips(samples, 64, 1024, 4)
        assert clips.frames.min() >= min(frames, 16)
        assert clips.frames.max() <= 1024
        assert 0 <= frames - int(clips.frames.sum()) < 16 or frames > 4 * 1024


def test_silence_is_sound() -> None:
    clips = AudioEvalProcessor()(np.zeros(32_000, np.float32))
    assert clips.frames.tolist() == [198]
    assert clips.fbank[0, :198].max() < -1.0  # far below BEATs' mean, unlike the zeros of the padding
    assert torch.isfinite(clips.fbank).all()


def test_the_originals_layout_counts_everything_as_sound() -> None:
    processor = AudioEvalProcessor.from_config(
        {"layout": "original", "max_clips": 3, "mel_bins": 64, "channel": "first"}
    )
    clips = processor(noise(5).numpy())
    assert clips.fbank.shape == (3, 1024, 64)
    assert clips.frames.tolist() == [1024] * 3
    assert clips.fbank[0].any()
    assert not clips.fbank[1:].any()


def test_too_short_and_missing() -> None:
    with pytest.raises(MediaError, match="10 ms of sound are less than one frame of 25 ms"):
        AudioEvalProcessor()(sound_file(tone(0.01, 8000), 8000))
    assert AudioEvalProcessor()(np.zeros(400, np.float32)).frames.tolist() == [1]
    with pytest.raises(MediaError, match="no such file"):
        AudioTrainProcessor()("none.wav")


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError, match="multiple of 16"):
        AudioEvalProcessor.from_config({"mel_bins": 100})
    with pytest.raises(ConfigError, match="max_clips"):
        AudioEvalProcessor.from_config({"max_clips": 0})
    with pytest.raises(ConfigError, match="did you mean 'mel_bins'"):
        AudioTrainProcessor.from_config({"melbins": 64})
