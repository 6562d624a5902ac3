"""The audio processor: which clips, how much of them is sound, both layouts, extractors, golden numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lavis_chatbridge.errors import ConfigError, MediaError, TooShortError
from lavis_chatbridge.media import open_audio
from lavis_chatbridge.processors import AudioEvalProcessor, AudioTrainProcessor
from lavis_chatbridge.processors.audio import AudioSettings, fbank, fbank_clips, frame_count
from tests.media.making import sound_file, tone

RATE = 16_000
TOLERANCE = 2e-4  # of golden filterbanks: on some CPUs torchaudio's own is 1.6e-4 away from the stored one


def noise(seconds: float) -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal(round(seconds * RATE), np.float32)


def test_ten_seconds_are_one_clip_and_silence_is_no_padding() -> None:
    clips = AudioEvalProcessor()(sound_file(tone(10.0, 44_100), 44_100))
    assert (clips.fbank.shape, clips.fbank.dtype) == ((1, 1024, 128), torch.float32)
    assert (clips.frames.tolist(), clips.frames.dtype) == ([998], torch.int64)
    assert not clips.fbank[0, 998:].any()
    silent = AudioEvalProcessor()(np.zeros(32_000, np.float32))
    assert silent.frames.tolist() == [198]
    assert silent.fbank[0, :198].max() < -1.0


@pytest.mark.parametrize(("max_clips", "expected"), [(1, [2]), (2, [1, 4]), (3, [0, 2, 4]), (7, [0, 1, 2, 3, 4, 5, 6])])
def test_clips_are_evenly_spaced_parts_of_the_whole_fbank(max_clips: int, expected: list[int]) -> None:
    samples = noise(66)[: 1024 * 160 * 6 + 160 * 20 + 240]  # 6 clips and 20 frames
    samples = samples if max_clips > 6 else samples[: 1024 * 160 * 6 + 240]
    got = fbank_clips(samples, AudioSettings(mel_bins=64, max_clips=max_clips))
    whole = fbank(torch.from_numpy(samples), 64)
    for clip, frames, number in zip(got.fbank, got.frames, expected, strict=True):
        part = whole[number * 1024 : (number + 1) * 1024]
        assert int(frames) == len(part)
        torch.testing.assert_close(clip[: len(part)], part, atol=1e-5, rtol=0)
        assert not clip[len(part) :].any()


def test_training_takes_random_clips() -> None:
    samples = noise(62)
    processor = AudioTrainProcessor.from_config({"max_clips": 2, "mel_bins": 64, "clip_frames": 512})
    sampled = [processor(samples, np.random.default_rng(seed)).fbank for seed in (1, 1, 2, 3, 4)]
    assert torch.equal(sampled[0], sampled[1])
    assert any(not torch.equal(sampled[0], other) for other in sampled[2:])
    assert any(not torch.equal(sampled[0], processor(samples).fbank) for _ in range(9))
    whole = fbank(torch.from_numpy(samples), 64)
    starts = range(0, len(whole) - 512, 512)
    assert all(any(torch.allclose(clip, whole[i : i + 512], atol=1e-5) for i in starts) for clip in sampled[0])


def test_no_clip_is_padding_only() -> None:
    for frames in (1, 15, 16, 17, 1023, 1024, 1025, 1039, 1040, 2048, 2064, 5000):
        samples = noise(1)[:1].repeat(400 + 160 * (frames - 1))
        assert frame_count(len(samples)) == frames
        clips = fbank_clips(samples, AudioSettings(mel_bins=64, max_clips=4))
        assert clips.frames.min() >= min(frames, 16)
        assert 0 <= frames - int(clips.frames.sum()) < 16 or frames > 4 * 1024


def test_clips_of_whisper(tmp_path: Path) -> None:
    from transformers import WhisperFeatureExtractor

    WhisperFeatureExtractor(feature_size=80, chunk_length=2).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    encoder = {"encoder": "transformers", "weights": str(tmp_path)}
    processor, sound = AudioEvalProcessor.from_config({"encoder": encoder, "max_clips": 2}), tone(2.5, RATE)
    clips = processor(sound)
    assert clips.fbank.shape == (2, 80, 200)
    assert clips.frames.tolist() == [200, 50]
    torch.testing.assert_close(clips.fbank[0], processor(sound[: 2 * RATE]).fbank[0])
    assert len(processor(sound[: int(2.05 * RATE)]).fbank) == 1  # 50 ms make no clip of their own
    assert len(processor(noise(9)).fbank) == 2
    with pytest.raises(TooShortError, match="less than 25 ms"):
        processor(sound[:100])


def test_waveforms_are_padded_behind_the_sound() -> None:
    extractor = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": RATE, "padding_value": 0.0}
    clips = AudioEvalProcessor.from_config({"extractor": extractor, "clip_seconds": 1})(np.ones(24_000, np.float32))
    assert clips.fbank.shape == (2, RATE)
    assert clips.frames.tolist() == [RATE, RATE // 2]
    assert not clips.fbank[1, RATE // 2 :].any()


def test_refusals() -> None:
    with pytest.raises(MediaError, match="10 ms of sound are less than 25 ms"):
        AudioEvalProcessor()(sound_file(tone(0.01, 8000), 8000))
    assert AudioEvalProcessor()(np.zeros(400, np.float32)).frames.tolist() == [1]
    for wrong, words in (
        ({"extractor": {}}, "extractor has no sampling_rate"),
        ({"clip_seconds": 0.01}, "clip_seconds is 0.01, expected at least 0.1"),
        ({"extractor": {"sampling_rate": RATE, "feature_extractor_type": "NoExtractor"}}, "no feature extractor"),
    ):
        with pytest.raises(ConfigError, match=words):
            AudioEvalProcessor.from_config(wrong)(noise(1))


def test_fbank_slices(golden_dir: Path) -> None:
    """Stored are slices or every eighth frame of them (-1 is silence), or where in the filterbank they start."""
    numbers = json.loads((golden_dir / "audio" / "fbank_info.json").read_text())
    stored = {name: torch.from_numpy(v) for name, v in np.load(golden_dir / "audio" / "fbank_slices.npz").items()}
    cases = {name: info for name, info in numbers.items() if ".mel" in name}
    assert len(cases) == 16
    for name, info in cases.items():
        clip, mel = name.split(".")[:2]
        bins, length = int(mel.removeprefix("mel")), info["target_length"]
        samples = open_audio(golden_dir / "audio" / f"{clip}.wav", channel="first")
        assert len(samples) == numbers[f"{clip}.num_samples_16k"]
        assert frame_count(len(samples)) == numbers[f"{clip}.num_frames"]
        original = {"mel_bins": bins, "clip_frames": length, "max_clips": info["sample_num"], "layout": "original"}
        got, frames = fbank_clips(samples, AudioSettings.model_construct(**original))
        assert list(got.shape) == info["shape"], name
        assert frames.tolist() == [length] * info["sample_num"], "no frame counts as padding"
        assert got.abs().sum(dtype=torch.float64).item() == pytest.approx(info["abs_sum"], rel=1e-5), name
        if "sum" not in info:
            whole = torch.nn.functional.pad(fbank(torch.from_numpy(samples), bins), (0, 0, 0, 2 * length))
            rows = [whole[start * length : (start + 1) * length] for start in info["slice_start_index"]]
            torch.testing.assert_close(got, torch.stack(rows), atol=1e-6, rtol=0)
            continue
        assert got.sum(dtype=torch.float64).item() == pytest.approx(info["sum"], abs=1e-5 * info["abs_sum"]), name
        key = info["slices_are_rows_of"].split(" ")[0]
        step = 1 if key in stored else 8
        stack = stored[key if step == 1 else f"{key}.every8th_frame"]
        rows = [stack[row] if row >= 0 else torch.zeros_like(stack[0]) for row in info["slice_rows"]]
        torch.testing.assert_close(got[:, ::step], torch.stack(rows), atol=TOLERANCE, rtol=0)
        if f"{name}.slice0" in stored:
            torch.testing.assert_close(got[0], stored[f"{name}.slice0"], atol=TOLERANCE, rtol=0)
