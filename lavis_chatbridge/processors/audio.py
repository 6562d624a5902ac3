"""``chatbridge_audio_train`` and ``chatbridge_audio_eval``: a sound, or a video's audio track -> `AudioClips`.

BEATs reads clips of equal length, each a normalised log-mel filterbank; other encoders read the features of their own
transformers extractor. A frame of the filterbank depends only on its own 25 ms of sound, so only the chosen clips are
computed.

Shapes: ``S`` samples, ``N`` clips, ``F`` frames of a clip, ``M`` mel bins.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from lavis.common.registry import registry
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchaudio.compliance import kaldi

from lavis_chatbridge.config import Settings
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.media.audio import open_audio, require_length
from lavis_chatbridge.media.source import AudioClips
from lavis_chatbridge.media.video import one_of_each
from lavis_chatbridge.processors.base import PREPROCESSOR, Processor

RATE = 16_000
FRAME_SAMPLES, SHIFT_SAMPLES = 400, 160
"""25 ms and 10 ms at 16 kHz."""

MEAN, STD = 15.41663, 6.55582
"""BEATs' statistics; features are divided by 2 x STD (BEATs.py, preprocess)."""

SILENCE = (8.0 - MEAN) / (2.0 * STD)
"""The highest filterbank value of a silent sound: its samples are below 16-bit rounding."""

_SHORTEST_TAIL = 16
"""Side of BEATs' patches. A remainder with fewer frames is dropped."""
_SHORTEST_CLIP = 0.1  # seconds


class AudioSettings(Settings):
    """How sounds are prepared."""

    mel_bins: int = Field(default=128, ge=16, multiple_of=16)
    """128 as in BEATs' pre-training, 64 as in the released ChatBridge."""
    clip_frames: int = Field(default=1024, ge=16, multiple_of=16)
    """Length of a clip in frames of 10 ms; like ``mel_bins``, a multiple of the side of BEATs' patches."""
    max_clips: PositiveInt = 3
    channel: Literal["mean", "first"] = "mean"
    """Mean of the channels, or the first channel, as in the original."""
    layout: Literal["clips", "original"] = "clips"
    """``clips``: as many clips as the sound fills. ``original``: always ``max_clips``, padded with silence."""
    extractor: dict[str, Any] | None = None
    """A transformers feature extractor (content of ``preprocessor_config.json``) that replaces BEATs' filterbank."""
    clip_seconds: float = Field(default=10.0, ge=_SHORTEST_CLIP)
    """Length of a clip in seconds, with ``extractor``."""

    def check(self) -> Iterator[str]:
        if self.extractor is not None and not isinstance(self.extractor.get("sampling_rate"), int):
            yield "extractor has no sampling_rate"


@registry.register_processor("chatbridge_audio_eval")
class AudioEvalProcessor(Processor):
    """Deterministic clips of a sound."""

    name = "chatbridge_audio_eval"
    encoder = "audio"
    revision = 2
    settings_class = AudioSettings
    settings: AudioSettings

    def __call__(self, source: Any, rng: np.random.Generator | None = None) -> AudioClips:
        rng = (rng or np.random.default_rng()) if self.random else None
        rate = RATE if self.settings.extractor is None else self.settings.extractor["sampling_rate"]
        samples = open_audio(source, rate, self.settings.channel, limits=self.limits, opener=self.opener)
        require_length(source, samples, rate)
        cut = fbank_clips if self.settings.extractor is None else _extracted_clips
        return cut(samples, self.settings, rng)


@registry.register_processor("chatbridge_audio_train")
class AudioTrainProcessor(AudioEvalProcessor):
    """Random clips of long sounds."""

    name = "chatbridge_audio_train"
    random = True


def fbank_clips(samples: np.ndarray, settings: AudioSettings, rng: np.random.Generator | None = None) -> AudioClips:
    """Filterbank clips of a sound (``[S]`` at 16 kHz, at least one frame), zero-padded after its end.

    The layout "original" counts no frame as padding, as the original's checkpoints need it.
    """
    total, clip_frames, count = frame_count(len(samples)), settings.clip_frames, settings.max_clips
    if settings.layout == "original":
        chosen = original_clip_indices(total, clip_frames, count, rng)
        lengths = [clip_frames] * count
    else:
        chosen = clip_indices(total, clip_frames, _SHORTEST_TAIL, count, rng)
        lengths = [min(clip_frames, total - clip * clip_frames) for clip in chosen]
    clips = torch.zeros(len(chosen), clip_frames, settings.mel_bins)
    for row, clip in enumerate(chosen):
        start = clip * clip_frames * SHIFT_SAMPLES
        part = samples[start : start + (clip_frames - 1) * SHIFT_SAMPLES + FRAME_SAMPLES]
        if len(part) >= FRAME_SAMPLES:
            frames = fbank(torch.from_numpy(part), settings.mel_bins)
            clips[row, : len(frames)] = frames
    return AudioClips(clips, torch.tensor(lengths))


def clip_indices(
    length: int, clip: int, shortest: float, most: int, rng: np.random.Generator | None = None
) -> list[int]:
    """Indices of the clips to use: all, or one of each of ``most`` segments (random with ``rng``, else the middle one).

    ``length`` of the sound, ``clip`` and ``shortest`` have one unit; a remainder shorter than ``shortest`` is dropped.
    """
    count = -(-length // clip)
    if count > 1 and length - (count - 1) * clip < shortest:
        count -= 1
    return list(range(count)) if count <= most else one_of_each(range(count), most, rng)


def original_clip_indices(length: int, clip: int, count: int, rng: np.random.Generator | None = None) -> list[int]:
    """Indices of always ``count`` clips, as the original chooses its slices (custom_datasets/valor_data/data.py).

    The sound is padded to at least ``count`` clips, and by one more clip if its last one is full.
    """
    padded = (length + max(count * clip - length, clip - length % clip)) // clip
    return one_of_each(range(padded), count, rng)


def frame_count(samples: int) -> int:
    """The number of complete frames in ``samples`` samples."""
    return max(0, 1 + (samples - FRAME_SAMPLES) // SHIFT_SAMPLES)


def fbank(samples: Tensor, mel_bins: int) -> Tensor:
    """Normalised log-mel filterbank ``[frame_count(S), M]`` of ``[S]`` samples in [-1, 1] at 16 kHz."""
    energies = kaldi.fbank(samples[None] * 32768.0, num_mel_bins=mel_bins, sample_frequency=RATE)
    return (energies - MEAN) / (2.0 * STD)


def is_silent(clips: AudioClips) -> bool:
    """Whether a sound is digital silence."""
    return all(bool((bank[: int(n)] <= SILENCE).all()) for bank, n in zip(clips.fbank, clips.frames, strict=True))


def _extracted_clips(samples: np.ndarray, settings: AudioSettings, rng: np.random.Generator | None) -> AudioClips:
    """Clips of a sound (``[S]`` at the extractor's rate) as the features of a transformers extractor."""
    extractor = _extractor(json.dumps(settings.extractor, sort_keys=True))
    rate = extractor.sampling_rate
    length = int(settings.clip_seconds * rate)
    chosen = clip_indices(len(samples), length, _SHORTEST_CLIP * rate, settings.max_clips, rng)
    clips = [samples[clip * length : (clip + 1) * length] for clip in chosen]
    each = [next(iter(extractor(clip, sampling_rate=rate, return_tensors="pt").values()))[0] for clip in clips]
    features = pad_sequence(each, batch_first=True)  # waveforms differ in length; other features are equally long
    lengths = torch.tensor([len(clip) for clip in clips])
    if features.dim() == 2:  # [N, S] waveforms
        return AudioClips(features, lengths)
    if features.dim() == 3 and features.shape[2] > features.shape[1]:  # [N, M, F] of Whisper
        return AudioClips(features, (-(-lengths // getattr(extractor, "hop_length", 1))).clamp(max=features.shape[2]))
    return AudioClips(features, torch.full_like(lengths, features.shape[-2]))  # trained on padded windows


@functools.lru_cache(maxsize=4)
def _extractor(described: str) -> Any:
    import transformers

    values = json.loads(described)
    name = values.get("feature_extractor_type")
    built = getattr(transformers, str(name), None)
    if built is None or not issubclass(built, transformers.FeatureExtractionMixin):
        raise ConfigError(f"{PREPROCESSOR}: transformers has no feature extractor {name!r} (feature_extractor_type)")
    return built.from_dict(values)
