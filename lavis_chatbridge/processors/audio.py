"""``chatbridge_audio_train`` and ``chatbridge_audio_eval``: a sound, or a video's audio track -> `AudioClips`.

BEATs reads filterbank clips; other encoders read the features of their own transformers extractor.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from lavis.common.registry import registry
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lavis_chatbridge.config import Settings
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.media.audio import open_audio, require_length
from lavis_chatbridge.media.frames import clip_indices
from lavis_chatbridge.media.types import AudioClips
from lavis_chatbridge.processors.base import Processor
from lavis_chatbridge.processors.fbank import RATE, cut_clips, cut_slices_as_original
from lavis_chatbridge.processors.inputs import PREPROCESSOR

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
        settings, rng = self.settings, self._generator(rng)
        rate = RATE if settings.extractor is None else int(settings.extractor["sampling_rate"])
        samples = open_audio(source, rate, settings.channel, limits=self.limits, opener=self.opener)
        require_length(source, samples, rate)
        if settings.extractor is not None:
            return _extracted(samples, settings, settings.extractor, rng)
        cut = cut_slices_as_original if settings.layout == "original" else cut_clips
        return cut(torch.from_numpy(samples), settings.mel_bins, settings.clip_frames, settings.max_clips, rng)


@registry.register_processor("chatbridge_audio_train")
class AudioTrainProcessor(AudioEvalProcessor):
    """Random clips of long sounds."""

    name = "chatbridge_audio_train"
    random = True


def _extracted(
    samples: np.ndarray, settings: AudioSettings, extractor: Mapping[str, Any], rng: np.random.Generator | None
) -> AudioClips:
    """Clips of a sound (``[S]`` at the extractor's rate) as the features of a transformers extractor."""
    rate = int(extractor["sampling_rate"])
    length = int(settings.clip_seconds * rate)
    chosen = clip_indices(len(samples), length, _SHORTEST_CLIP * rate, settings.max_clips, rng)
    clips = [samples[clip * length : (clip + 1) * length] for clip in chosen]
    built = _extractor(json.dumps(dict(extractor), sort_keys=True))
    each = [next(iter(built(clip, sampling_rate=rate, return_tensors="pt").values()))[0] for clip in clips]
    features = pad_sequence(each, batch_first=True)  # waveforms differ in length; other features are equally long
    return AudioClips(features, _valid(features, clips, getattr(built, "hop_length", 1)))


def _valid(features: Tensor, clips: list[np.ndarray], hop: int) -> Tensor:
    """``[N]`` number of valid steps of each clip; all steps if the encoder was trained on padded windows."""
    lengths = torch.tensor([len(clip) for clip in clips])
    if features.dim() == 2:  # [N, S] waveforms
        return lengths
    if features.dim() == 3 and features.shape[2] > features.shape[1]:  # [N, M, F] of Whisper
        return (-(-lengths // hop)).clamp(max=features.shape[2])
    return torch.full((len(clips),), features.shape[-2])


@functools.lru_cache(maxsize=4)
def _extractor(described: str) -> Any:
    import transformers

    values = json.loads(described)
    name = values.get("feature_extractor_type")
    built = getattr(transformers, str(name), None)
    if built is None or not issubclass(built, transformers.FeatureExtractionMixin):
        raise ConfigError(f"{PREPROCESSOR}: transformers has no feature extractor {name!r} (feature_extractor_type)")
    return built.from_dict(values)
