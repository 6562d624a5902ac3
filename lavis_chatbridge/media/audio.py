"""Opens sounds from a path, bytes or an array, as mono samples at a given rate. Filterbanks are in `processors`."""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from lavis_chatbridge.errors import MediaError, TooShortError
from lavis_chatbridge.media.container import find_stream, first_stream, open_container, packets_of
from lavis_chatbridge.media.source import (
    DEFAULT_LIMITS,
    Limits,
    Sound,
    Source,
    directly,
    file_of,
    guarded,
    head_of,
    is_picture,
    media_errors,
    rated,
)

if TYPE_CHECKING:
    from av import AudioStream
    from av.audio.frame import AudioFrame
    from av.container import InputContainer
    from torch import Tensor

Channel: TypeAlias = Literal["mean", "first"]
_SHORTEST = 0.025  # seconds: one frame of a filterbank
_LOWEST_RATE, _HIGHEST_RATE = 1_000, 768_000
_LOUDEST = 16.0  # float samples above 1 are clipped; a higher peak means another scale, such as int16's
_MOST_CHANNELS = 32  # most channels of an array
_PLANES = 8  # most channels as separate planes in an FFmpeg frame
_BATCH = 64  # frames to mix at once; fewer take more time, more take more memory
_LARGEST_TERM = 1000  # largest term of a resampling ratio; the filter's size grows with its square


def open_audio(
    source: Sound,
    rate: int = 16_000,
    channel: Channel = "mean",
    *,
    limits: Limits = DEFAULT_LIMITS,
    opener: Callable[..., Any] = directly,
) -> np.ndarray:
    """Open a sound, or the audio track of a video, as mono.

    Args:
        source: A path, the bytes of a file, or samples (floats in [-1, 1], or integers, scaled by their type):
            ``[S]``, ``[C,S]`` or ``[S,C]``; the shorter side is the channels (at most 32). Samples alone have the rate
            ``rate``; ``(samples, rate in Hz)`` gives their own.
        rate: Samples per second of the result.
        channel: "mean" of all channels, or the "first" one.
        limits: Bounds on its length and on the time of decoding.
        opener: Calls the decoder: `directly` in this process, or a `DecodingPool` in a limited one.

    Returns:
        float32 ``[S]``. Samples lie in [-1, 1]; the resampling filter may overshoot slightly.

    Raises:
        MediaError: If it cannot be opened, has no sound, or is too long. A truncated file is no error.
    """
    sound, stated = rated(source)
    if isinstance(sound, np.ndarray):
        own_rate, samples = stated or rate, _mono(_channels_first(sound), channel)
    else:
        own_rate, samples = opener(decode_audio, sound, channel, limits=limits)
    with media_errors(sound):
        if samples.size == 0:
            raise MediaError(sound, "it has no sound")
        if not _LOWEST_RATE <= own_rate <= _HIGHEST_RATE:
            raise MediaError(sound, f"a sampling rate of {own_rate} Hz is out of range")
        _check_length(sound, samples.size, own_rate, limits)
        peak = max(float(samples.max()), -float(samples.min()))  # NaN if any sample is NaN
        if not math.isfinite(peak):
            raise MediaError(sound, "its samples are not all finite numbers")
        if peak > _LOUDEST:
            raise MediaError(sound, f"its samples reach {peak:g}, expected floats in [-1, 1]; divide int16's by 32768")
        samples = samples.clip(-1.0, 1.0)
        if own_rate == rate:
            return samples
        import torch

        return _resampler(own_rate, rate)(torch.from_numpy(samples)).numpy()


def require_length(source: object, samples: np.ndarray, rate: int) -> None:
    """Raise a `TooShortError` if a sound (``[S]`` at ``rate`` Hz) is too short for an encoder."""
    if len(samples) < _SHORTEST * rate:
        raise TooShortError(source, f"{1000 * len(samples) / rate:g} ms of sound are less than {1000 * _SHORTEST:g} ms")


@guarded
def decode_audio(
    source: Source, channel: Channel = "mean", *, limits: Limits = DEFAULT_LIMITS
) -> tuple[int, np.ndarray]:
    """The sampling rate of a file, and its samples as mono (float32 ``[S]``): `open_audio` without resampling.

    If a video's sound starts after its first frame, silence fills the gap, so that both have the same time axis.

    Raises:
        MediaError: As in `open_audio`.
    """
    file = file_of(source)
    if is_picture(head := head_of(file)):
        raise MediaError(source, "it is an image")
    if head[8:12] == b"WAVE" and (wave := _wave_samples(file)) is not None:
        rate, samples = wave
        return rate, _mono(samples, channel)
    with open_container(file, limits) as container:
        stream = first_stream(container, "audio", source)
        picture = find_stream(container, "video")
        frames = _frames(container, stream, source)
        first = next(frames)
        rate, silence = first.sample_rate, 0
        if picture is not None and picture.start_time is not None and first.pts is not None:
            late = first.pts * stream.time_base - picture.start_time * picture.time_base  # seconds
            silence = max(0, round(rate * late))
        _check_length(source, silence, rate, limits)
        blocks = [np.zeros(silence, np.float32)]
        decoded = (_samples_of(frame) for frame in chain([first], frames))
        while batch := list(islice(decoded, _BATCH)):
            blocks.append(_mono(np.concatenate(batch, axis=1), channel))
            _check_length(source, sum(map(len, blocks)), rate, limits)
        return rate, np.concatenate(blocks)


@functools.lru_cache(maxsize=32)
def _resampler(source_rate: int, rate: int) -> Callable[[Tensor], Tensor]:
    """Torchaudio's windowed sinc filter, cached: computing it takes longer than resampling 10 s of sound.

    For rates such as 44101 and 16000 Hz, the nearest ratio with terms up to 1000 is used.
    """
    from torchaudio.transforms import Resample

    ratio = Fraction(rate, source_rate).limit_denominator(_LARGEST_TERM)
    return Resample(ratio.denominator, ratio.numerator)


def _check_length(source: object, length: int, rate: int, limits: Limits) -> None:
    if length > limits.max_seconds * max(rate, 1):
        raise MediaError(source, f"it is longer than the limit of {limits.max_seconds:g} s")


def _channels_first(array: np.ndarray) -> np.ndarray:
    """``[C,S]``, also from ``[S]`` and ``[S,C]``."""
    if array.ndim == 1 or array.size == 0 or 1 in array.shape:
        return array.reshape(1, -1)
    if array.ndim != 2 or array.shape[0] == array.shape[1] or min(array.shape) > _MOST_CHANNELS:
        raise MediaError(
            array,
            f"the channel axis of {list(array.shape)} is unclear: expected [S], or [C,S] or [S,C] with at most "
            f"{_MOST_CHANNELS} channels and more samples than channels",
        )
    return array if array.shape[0] < array.shape[1] else array.T


def _mono(samples: np.ndarray, channel: Channel) -> np.ndarray:
    """``[C,S]`` of any type -> float32 ``[S]``."""
    if len(samples) == 1 or channel == "first":
        return np.ascontiguousarray(_scaled(samples[0]))
    scaled = _scaled(samples)
    if len(scaled) == 2:  # NumPy's mean of interleaved stereo takes 30 times longer
        return (scaled[0] + scaled[1]) * np.float32(0.5)
    return scaled.mean(0, dtype=np.float32)


def _scaled(samples: np.ndarray) -> np.ndarray:
    """Samples of any type as float32 in [-1, 1]; unsigned bytes are silent at 128."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128.0) / 128.0
    if samples.dtype == np.int16:
        return samples * np.float32(1 / 32768)
    if samples.dtype.kind == "i":
        return (samples / float(-np.iinfo(samples.dtype).min)).astype(np.float32)
    raise MediaError(samples, f"samples of type {samples.dtype} have no standard scale; use floats or signed integers")


def _wave_samples(file: str | io.BytesIO) -> tuple[int, np.ndarray] | None:
    """Rate and samples (``[C,S]``) of a WAV, three times as fast as FFmpeg; None if broken, empty or compressed."""
    from scipy.io import wavfile

    warnings.filterwarnings("ignore", category=wavfile.WavFileWarning)  # many files have chunks of other programs
    try:
        rate, samples = wavfile.read(file)
    except Exception:  # scipy raises any error for broken files; FFmpeg can read many of them
        return None
    finally:
        if isinstance(file, io.BytesIO):
            file.seek(0)
    return (rate, np.atleast_2d(samples.T)) if samples.size else None


def _frames(container: InputContainer, stream: AudioStream, source: object) -> Iterator[AudioFrame]:
    """The decoded frames. Damaged packets are skipped; more than a tenth of them raise a `MediaError`."""
    import av.error

    packets = faults = rate = 0
    fault = "it has no sound"
    for packet in chain(packets_of(container, stream), [None]):  # None flushes the decoder
        packets += 1
        try:
            decoded = stream.codec_context.decode(packet)
        except av.error.FFmpegError as error:
            faults, fault = faults + 1, f"{type(error).__name__}: {error.strerror}"
            continue
        for frame in decoded:
            if rate not in (0, frame.sample_rate):
                raise MediaError(source, "its sampling rate changes midway")
            rate = frame.sample_rate
            yield frame
    if rate == 0 or faults > max(1, packets // 10):
        raise MediaError(source, fault)


def _samples_of(frame: AudioFrame) -> np.ndarray:
    """A decoded frame as ``[C,S]``."""
    import av

    if frame.format.is_planar and frame.layout.nb_channels >= _PLANES:
        # PyAV reads beyond the end of a full list of planes; FFmpeg puts them into one.
        [frame] = av.AudioResampler(format=frame.format.packed, layout=frame.layout).resample(frame)
    samples = frame.to_ndarray()
    return samples if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels).T
