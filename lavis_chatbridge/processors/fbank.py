"""Converts mono samples to BEATs' input: clips of equal length, each a normalised log-mel filterbank.

A frame of the filterbank depends only on its own 25 ms of sound, so only the chosen clips are computed.

Legend: `S` samples, `N` clips, `F` frames of a clip, `M` mel bins.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor
from torchaudio.compliance import kaldi

from lavis_chatbridge.media.frames import clip_indices, one_of_each
from lavis_chatbridge.media.types import AudioClips

RATE = 16_000
FRAME_SAMPLES, SHIFT_SAMPLES = 400, 160
"""25 ms and 10 ms at 16 kHz."""

MEAN, STD = 15.41663, 6.55582
"""BEATs' statistics; features are divided by 2 x STD (BEATs.py, preprocess)."""

SILENCE = (8.0 - MEAN) / (2.0 * STD)
"""The highest filterbank value of a silent sound: its samples are below 16-bit rounding."""

_FFT_SAMPLES = 512
_SHORTEST_TAIL = 16
"""Side of BEATs' patches. A remainder with fewer frames is dropped."""


def is_silent(clips: AudioClips) -> bool:
    """Whether a sound is digital silence."""
    return all(bool((bank[: int(n)] <= SILENCE).all()) for bank, n in zip(clips.fbank, clips.frames, strict=True))


def cut_clips(
    samples: Tensor, mel_bins: int, clip_frames: int, max_clips: int, rng: np.random.Generator | None = None
) -> AudioClips:
    """Cut a sound into as many clips as it fills, at most ``max_clips``; the last one is zero-padded.

    Args:
        samples: ``[S]`` at 16 kHz; at least one frame.
        mel_bins: `M`.
        clip_frames: `F`.
        max_clips: A longer sound is divided into this many equal segments, and one clip of each is used.
        rng: Chooses a random clip of each segment; None: the middle one.
    """
    total = frame_count(len(samples))
    chosen = clip_indices(total, clip_frames, _SHORTEST_TAIL, max_clips, rng)
    lengths = torch.tensor([min(clip_frames, total - clip * clip_frames) for clip in chosen])
    return AudioClips(_clips(samples, chosen, mel_bins, clip_frames), lengths)


def cut_slices_as_original(
    samples: Tensor, mel_bins: int, clip_frames: int, slices: int, rng: np.random.Generator | None = None
) -> AudioClips:
    """Always ``slices`` clips, as the original's checkpoints need them (original: custom_datasets/valor_data/data.py).

    The sound is zero-padded to at least ``slices`` clips, and by one more clip if its last one is full; one clip of
    each of ``slices`` segments is used. No frame counts as padding.
    """
    total = frame_count(len(samples))
    stacked = (total + max(slices * clip_frames - total, clip_frames - total % clip_frames)) // clip_frames
    chosen = one_of_each(range(stacked), slices, rng)
    return AudioClips(_clips(samples, chosen, mel_bins, clip_frames), torch.full((slices,), clip_frames))


def _clips(samples: Tensor, chosen: list[int], mel_bins: int, clip_frames: int) -> Tensor:
    """``[len(chosen), F, M]``: the clips with these indices, zero-padded after the end of the sound."""
    clips = samples.new_zeros(len(chosen), clip_frames, mel_bins)
    for row, clip in enumerate(chosen):
        start = clip * clip_frames * SHIFT_SAMPLES
        part = samples[start : start + (clip_frames - 1) * SHIFT_SAMPLES + FRAME_SAMPLES]
        if len(part) >= FRAME_SAMPLES:
            frames = fbank(part, mel_bins)
            clips[row, : len(frames)] = frames
    return clips


def frame_count(samples: int) -> int:
    """The number of complete frames in ``samples`` samples."""
    return max(0, 1 + (samples - FRAME_SAMPLES) // SHIFT_SAMPLES)


def fbank(samples: Tensor, mel_bins: int) -> Tensor:
    """Normalised log-mel filterbank ``[frame_count(S), M]`` of ``[S]`` samples in [-1, 1] at 16 kHz.

    The same as ``torchaudio.compliance.kaldi.fbank``, but faster: window and mel banks are cached. The operations are
    in torchaudio's order: for nearly silent sound, the logarithm amplifies rounding differences.
    """
    frames = samples.unfold(0, FRAME_SAMPLES, SHIFT_SAMPLES) * 32768.0
    frames -= frames.mean(1, keepdim=True)
    before = torch.cat([frames[:, :1], frames[:, :-1]], 1)
    frames -= before.mul_(0.97)
    window, banks = _window_and_banks(mel_bins)
    spectrum = torch.fft.rfft(frames.mul_(window), n=_FFT_SAMPLES).abs().square_()
    energies = spectrum @ banks.T
    return energies.clamp_(min=torch.finfo(torch.float32).eps).log_().sub_(MEAN).div_(2.0 * STD)


@functools.cache
def _window_and_banks(mel_bins: int) -> tuple[Tensor, Tensor]:
    """Kaldi's "povey" window ``[400]`` and the weights of the mel bins ``[M, 257]``."""
    window = torch.hann_window(FRAME_SAMPLES, periodic=False) ** 0.85
    banks, _ = kaldi.get_mel_banks(mel_bins, _FFT_SAMPLES, float(RATE), 20.0, 0.0, 100.0, -500.0, 1.0)
    return window, torch.nn.functional.pad(banks, (0, 1))
