"""Mono samples become BEATs' input: sound is cut into clips of equal length, each a normalised log-mel filterbank.

A frame of the filterbank depends on its own 25 ms of sound only, so the frames of a part equal that part of the frames
of the whole, and only the chosen clips are computed. Legend: `S` samples, `N` clips, `F` frames of a clip, `M` mel
bins.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor
from torchaudio.compliance import kaldi

from lavis_chatbridge.media.frames import one_of_each
from lavis_chatbridge.media.types import AudioClips

RATE = 16_000
FRAME_SAMPLES, SHIFT_SAMPLES = 400, 160
"""25 ms and 10 ms."""

MEAN, STD = 15.41663, 6.55582
"""BEATs' statistics; the deviation counts twice (BEATs.py, preprocess)."""

SILENCE = (8.0 - MEAN) / (2.0 * STD)
"""The filterbank of a silent sound has no value above this: its samples stay below the rounding of 16 bits."""

_PREEMPHASIS = 0.97
_FFT_SAMPLES = 512
_FLOOR = torch.finfo(torch.float32).eps

SHORTEST_TAIL = 16
"""The rest of a sound with fewer frames makes no clip of its own: this is one patch of BEATs."""


def is_silent(clips: AudioClips) -> bool:
    """Whether a sound is digital silence."""
    return all(bool((bank[: int(n)] <= SILENCE).all()) for bank, n in zip(clips.fbank, clips.frames, strict=True))


def cut_clips(
    samples: Tensor, mel_bins: int, clip_frames: int, max_clips: int, rng: np.random.Generator | None = None
) -> AudioClips:
    """Cut a sound into as many clips as it fills, at most ``max_clips``; zeros fill up the last one.

    Args:
        samples: ``[S]`` at 16 kHz; at least one frame.
        mel_bins: `M`.
        clip_frames: `F`.
        max_clips: A longer sound is divided into this many stretches, of which one clip each is taken.
        rng: With it a random clip of each stretch is taken; without it the middle one.
    """
    total = frame_count(len(samples))
    clips = -(-total // clip_frames)
    if clips > 1 and total - (clips - 1) * clip_frames < SHORTEST_TAIL:
        clips -= 1
    chosen = list(range(clips)) if clips <= max_clips else one_of_each(range(clips), max_clips, rng)
    lengths = torch.tensor([min(clip_frames, total - clip * clip_frames) for clip in chosen])
    return AudioClips(_clips(samples, chosen, mel_bins, clip_frames), lengths)


def cut_slices_as_original(
    samples: Tensor, mel_bins: int, clip_frames: int, slices: int, rng: np.random.Generator | None = None
) -> AudioClips:
    """Always ``slices`` clips, silence among them, as the original's reader cuts them for its checkpoints.

    Zeros lengthen the sound to at least ``slices`` clips, and by a whole clip if it fills its last one; one clip of
    each of ``slices`` stretches is taken. All frames count as sound (original: custom_datasets/valor_data/data.py).
    Arguments as those of `cut_clips`.
    """
    total = frame_count(len(samples))
    stacked = (total + max(slices * clip_frames - total, clip_frames - total % clip_frames)) // clip_frames
    chosen = one_of_each(range(stacked), slices, rng)
    return AudioClips(_clips(samples, chosen, mel_bins, clip_frames), torch.full((slices,), clip_frames))


def _clips(samples: Tensor, chosen: list[int], mel_bins: int, clip_frames: int) -> Tensor:
    """``[len(chosen), F, M]``: the clips with these numbers, zeros after the end of the sound."""
    clips = samples.new_zeros(len(chosen), clip_frames, mel_bins)
    for row, clip in enumerate(chosen):
        start = clip * clip_frames * SHIFT_SAMPLES
        part = samples[start : start + (clip_frames - 1) * SHIFT_SAMPLES + FRAME_SAMPLES]
        if len(part) >= FRAME_SAMPLES:
            frames = fbank(part, mel_bins)
            clips[row, : len(frames)] = frames
    return clips


def frame_count(samples: int) -> int:
    """The number of whole frames in this many samples."""
    return max(0, 1 + (samples - FRAME_SAMPLES) // SHIFT_SAMPLES)


def fbank(samples: Tensor, mel_bins: int) -> Tensor:
    """Normalised log-mel filterbank: ``torchaudio.compliance.kaldi.fbank``, with its constant parts kept.

    The operations have torchaudio's order: for nearly silent sound, another order of rounding shows in the logarithm.

    Args:
        samples: ``[S]`` at 16 kHz, in [-1, 1]; at least one frame.
        mel_bins: `M`.

    Returns:
        ``[frame_count(S), M]``.
    """
    frames = samples.unfold(0, FRAME_SAMPLES, SHIFT_SAMPLES) * 32768.0
    frames -= frames.mean(1, keepdim=True)
    before = torch.cat([frames[:, :1], frames[:, :-1]], 1)
    frames -= before.mul_(_PREEMPHASIS)
    window, banks = _window_and_banks(mel_bins)
    spectrum = torch.fft.rfft(frames.mul_(window), n=_FFT_SAMPLES).abs().square_()
    energies = spectrum @ banks.T
    return energies.clamp_(min=_FLOOR).log_().sub_(MEAN).div_(2.0 * STD)


@functools.cache
def _window_and_banks(mel_bins: int) -> tuple[Tensor, Tensor]:
    """Kaldi's "povey" window ``[400]`` and the weights of the mel bins ``[M, 257]``."""
    window = torch.hann_window(FRAME_SAMPLES, periodic=False) ** 0.85
    banks, _ = kaldi.get_mel_banks(mel_bins, _FFT_SAMPLES, float(RATE), 20.0, 0.0, 100.0, -500.0, 1.0)
    return window, torch.nn.functional.pad(banks, (0, 1))
