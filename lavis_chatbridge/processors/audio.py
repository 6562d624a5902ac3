"""``chatbridge_audio_train`` and ``chatbridge_audio_eval``: a sound, or a video's audio track -> `AudioClips`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from lavis.common.registry import registry

from lavis_chatbridge.config import Settings
from lavis_chatbridge.errors import TooShortError
from lavis_chatbridge.media.audio import open_audio
from lavis_chatbridge.media.types import AudioClips
from lavis_chatbridge.processors import inputs
from lavis_chatbridge.processors.base import ChatBridgeProcessor
from lavis_chatbridge.processors.fbank import FRAME_SAMPLES, RATE, cut_clips, cut_slices_as_original

_SHORTEST_CLIP = 0.1


class AudioSettings(Settings):
    """How sounds are prepared."""

    mel_bins: int = 128
    """128 as BEATs was pre-trained, 64 as the released ChatBridge was trained."""
    clip_frames: int = 1024
    """Length of a clip in frames of 10 ms."""
    max_clips: int = 3
    channel: Literal["mean", "first"] = "mean"
    """Mean of the channels, or the first channel, as in the original."""
    layout: Literal["clips", "original"] = "clips"
    """``clips``: as many clips as the sound fills. ``original``: always ``max_clips``, padded with silence."""
    extractor: dict[str, Any] | None = None
    """A transformers feature extractor (content of ``preprocessor_config.json``) that replaces BEATs' filterbank."""
    clip_seconds: float = 10.0
    """Length of a clip in seconds, with ``extractor``."""

    def check(self) -> Iterator[str]:
        for name in ("mel_bins", "clip_frames"):
            value = getattr(self, name)
            if value < 16 or value % 16:
                yield f"{name} is {value}, expected a multiple of 16, the side of BEATs' patches"
        if self.max_clips < 1:
            yield f"max_clips is {self.max_clips}, expected at least 1"
        if self.extractor is not None and not isinstance(self.extractor.get("sampling_rate"), int):
            yield "extractor has no sampling_rate"
        if self.clip_seconds < _SHORTEST_CLIP:
            yield f"clip_seconds is {self.clip_seconds:g}, expected at least {_SHORTEST_CLIP:g}"


@registry.register_processor("chatbridge_audio_eval")
class AudioEvalProcessor(ChatBridgeProcessor):
    """Deterministic clips of a sound."""

    name = "chatbridge_audio_eval"
    encoder = "audio"
    settings_class = AudioSettings
    settings: AudioSettings

    def __call__(self, source: Any, rng: np.random.Generator | None = None) -> AudioClips:
        settings = self.settings
        if (extractor := settings.extractor) is not None:
            rate = int(extractor["sampling_rate"])
            samples = open_audio(source, rate, settings.channel, limits=self.limits, opener=self.opener)
            if len(samples) < rate // 40:
                raise TooShortError(source, f"{1000 * len(samples) / rate:g} ms of sound are less than 25 ms")
            rng = self._generator(rng)
            return inputs.clips_of(samples, extractor, settings.clip_seconds, settings.max_clips, rng)
        samples = open_audio(source, RATE, settings.channel, limits=self.limits, opener=self.opener)
        if len(samples) < FRAME_SAMPLES:
            raise TooShortError(source, f"{1000 * len(samples) / RATE:g} ms of sound are less than one frame of 25 ms")
        cut = cut_slices_as_original if settings.layout == "original" else cut_clips
        sound = torch.from_numpy(samples)
        return cut(sound, settings.mel_bins, settings.clip_frames, settings.max_clips, self._generator(rng))


@registry.register_processor("chatbridge_audio_train")
class AudioTrainProcessor(AudioEvalProcessor):
    """Random clips of long sounds."""

    name = "chatbridge_audio_train"
    random = True
