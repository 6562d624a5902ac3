"""The audio processor: how many clips, which, how much of them is sound; both layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchaudio.compliance import kaldi

from lavis_chatbridge.errors import ConfigError, MediaError
from lavis_chatbridge.processors import AudioEvalProcessor, AudioTrainProcessor
from lavis_chatbridge.processors.audio import cut_clips, fbank, frame_count
from tests.media.making import sound_file, tone


def noise(seconds: float) -> torch.Tensor:
    return 0.1 * torch.randn(round(seconds * 16_000), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mel_bins", [64, 128])
def test_fbank_is_torchaudios(mel_bins: int) -> None:
    samples = noise(3) * torch.linspace(0, 2, 48_000)
    samples[20_000:24_000] = 0.0
    expected = kaldi.fbank(samples[None] * 32768.0, num_mel_bins=mel_bins, sample_frequency=16_000)
    torch.testing.assert_close(fbank(samples, mel_bins), (expected - 15.41663) / (2 * 6.55582), atol=1e-6, rtol=0)


def test_ten_seconds_are_one_clip() -> None:
    clips = AudioEvalProcessor()(sound_file(tone(10.0, 44_100), 44_100))
    assert (clips.fbank.shape, clips.fbank.dtype) == ((1, 1024, 128), torch.float32)
    assert (clips.frames.tolist(), clips.frames.dtype) == ([998], torch.int64)
    assert not clips.fbank[0, 998:].any()
    assert clips.fbank[0, :998].abs().min(dim=1).values.max() > 0


@pytest.mark.parametrize(("max_clips", "expected"), [(1, [2]), (2, [1, 4]), (3, [0, 2, 4]), (7, [0, 1, 2, 3, 4, 5, 6])])
def test_clips_are_evenly_spaced_parts_of_the_whole_fbank(max_clips: int, expected: list[int]) -> None:
    samples = noise(66)[: 1024 * 160 * 6 + 160 * 20 + 240]  # 6 clips and 20 frames
    samples = samples if max_clips > 6 else samples[: 1024 * 160 * 6 + 240]
    got, whole = cut_clips(samples, 64, 1024, max_clips), fbank(samples, 64)
    for clip, frames, number in zip(got.fbank, got.frames, expected, strict=True):
        part = whole[number * 1024 : (number + 1) * 1024]
        assert int(frames) == len(part)
        torch.testing.assert_close(clip[: len(part)], part, atol=1e-5, rtol=0)
        assert not clip[len(part) :].any()


def test_training_takes_random_clips() -> None:
    samples = noise(62)
    processor = AudioTrainProcessor.from_config({"max_clips": 2, "mel_bins": 64, "clip_frames": 512})
    sampled = [processor(samples.numpy(), np.random.default_rng(seed)).fbank for seed in (1, 1, 2, 3, 4)]
    assert torch.equal(sampled[0], sampled[1])
    assert any(not torch.equal(sampled[0], other) for other in sampled[2:])
    whole = fbank(samples, 64)
    starts = range(0, len(whole) - 512, 512)
    assert all(any(torch.allclose(clip, whole[i : i + 512], atol=1e-5) for i in starts) for clip in sampled[0])


def test_no_clip_is_padding_only() -> None:
    for frames in (1, 15, 16, 17, 1023, 1024, 1025, 1039, 1040, 2048, 2064, 5000):
        samples = noise(1)[:1].repeat(400 + 160 * (frames - 1))
        assert frame_count(len(samples)) == frames
        clips = cut_clips(samples, 64, 1024, 4)
        assert clips.frames.min() >= min(frames, 16)
        assert 0 <= frames - int(clips.frames.sum()) < 16 or frames > 4 * 1024


def test_silence_is_sound() -> None:
    clips = AudioEvalProcessor()(np.zeros(32_000, np.float32))
    assert clips.frames.tolist() == [198]
    assert clips.fbank[0, :198].max() < -1.0  # far below BEATs' mean, unlike the zeros of the padding
    assert torch.isfinite(clips.fbank).all()


def test_the_originals_layout_counts_everything_as_sound() -> None:
    settings = {"layout": "original", "max_clips": 3, "mel_bins": 64, "channel": "first"}
    clips = AudioEvalProcessor.from_config(settings)(noise(5).numpy())
    assert clips.fbank.shape == (3, 1024, 64)
    assert clips.frames.tolist() == [1024] * 3
    assert clips.fbank[0].any()
    assert not clips.fbank[1:].any()


def test_refusals() -> None:
    with pytest.raises(MediaError, match="10 ms of sound are less than 25 ms"):
        AudioEvalProcessor()(sound_file(tone(0.01, 8000), 8000))
    assert AudioEvalProcessor()(np.zeros(400, np.float32)).frames.tolist() == [1]
    for wrong, words in (
        ({"mel_bins": 100}, "multiple of 16"),
        ({"max_clips": 0}, "max_clips"),
        ({"melbins": 64}, "mel_bins"),
    ):
        with pytest.raises(ConfigError, match=words):
            AudioEvalProcessor.from_config(wrong)
