"""Opens sounds: a path, bytes or an array become mono samples at one rate. Knows no filterbanks."""

from __future__ import annotations

import functools
import io
import math
import numbers
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media.container import find_stream, first_stream, open_container, packets_of
from lavis_chatbridge.media.source import (
    DEFAULT_LIMITS,
    Deadline,
    Limits,
    Sound,
    Source,
    directly,
    file_of,
    guarded,
    head_of,
    is_picture,
    media_errors,
)

if TYPE_CHECKING:
    from torch import Tensor

Channel: TypeAlias = Literal["mean", "first"]
_LOWEST_RATE, _HIGHEST_RATE = 1_000, 768_000
_LOUDEST = 16.0  # float samples above 1 are clipped; a higher peak than this means another scale, such as int16's
_BLOCK = 1 << 20  # samples per read, so that a long stereo file is never in memory at once
_UNKNOWN_LENGTH = (1 << 63) - 1  # libsndfile's length of a flac that was written to a pipe
_MOST_CHANNELS = 32  # of an array
_PLANES = 8  # that a frame of FFmpeg has room for
_LARGEST_KERNEL = 4_000_000
_SNDFILE_HEADS = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"FORM", b".snd", b"caff")


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
        with media_errors(sound):
            own_rate, samples = stated or rate, _to_mono(_scaled(_channels_first(sound)), channel)
    else:
        own_rate, samples = opener(decode_audio, sound, channel, limits=limits)
    return finish_audio(sound, own_rate, samples, rate, limits)


def rated(source: Any) -> tuple[Any, int | None]:
    """Split ``(samples, rate in Hz)``; the rate of any other source is None.

    Raises:
        MediaError: If a pair is not an array and a rate.
    """
    if not isinstance(source, tuple):
        return source, None
    samples, rate = source if len(source) == 2 else (None, None)
    if not isinstance(samples, np.ndarray):
        raise MediaError(source, "expected a sound as a pair of an array and its sampling rate in Hz")
    if not isinstance(rate, numbers.Real) or not float(rate).is_integer() or rate < 1:
        raise MediaError(samples, f"its sampling rate is {rate!r}, expected a whole number of Hz")
    return samples, int(float(rate))


@guarded
def decode_audio(
    source: Source, channel: Channel = "mean", *, limits: Limits = DEFAULT_LIMITS
) -> tuple[int, np.ndarray]:
    """The sampling rate of a file, and its samples as mono (float32 ``[S]``): `open_audio` without resampling.

    Raises:
        MediaError: As `open_audio`.
    """
    file = file_of(source)
    head = head_of(file)
    if is_picture(head):
        raise MediaError(source, "it is an image")
    if head.startswith(_SNDFILE_HEADS) and head[8:12] != b"AVI ":
        if (decoded := _sndfile_samples(file, source, channel, limits)) is not None:
            return decoded
        if isinstance(file, io.BytesIO):
            file.seek(0)
    return _ffmpeg_samples(file, source, channel, limits)


def finish_audio(source: object, own_rate: int, samples: np.ndarray, rate: int, limits: Limits) -> np.ndarray:
    """Check decoded samples, clip them to [-1, 1] and resample them.

    Raises:
        MediaError: If there are none or too many, if they are not finite or not in [-1, 1], or ``own_rate`` is out of
            range.
    """
    with media_errors(source):
        if samples.size == 0:
            raise MediaError(source, "it holds no sound")
        if not _LOWEST_RATE <= own_rate <= _HIGHEST_RATE:
            raise MediaError(source, f"a sampling rate of {own_rate} Hz is out of range")
        _check_length(source, samples.size, own_rate, limits)
        peak = max(float(samples.max()), -float(samples.min()))  # NaN if any sample is
        if not math.isfinite(peak):
            raise MediaError(source, "its samples are not all finite numbers")
        if peak > _LOUDEST:
            raise MediaError(source, f"its samples reach {peak:g}, expected floats in [-1, 1]; divide int16's by 32768")
        return resample(samples if peak <= 1.0 else samples.clip(-1.0, 1.0), own_rate, rate)


def resample(samples: np.ndarray, source_rate: int, rate: int) -> np.ndarray:
    """``samples`` (float32 ``[S]``) from one rate to another, with torchaudio's windowed sinc filter."""
    if source_rate == rate:
        return samples
    import torch

    common = math.gcd(source_rate, rate)
    old, new = source_rate // common, rate // common
    if new * old > _LARGEST_KERNEL:  # torchaudio's filter has about this many weights: for ratios such as 44101 : 16000
        return _resample_by_ffmpeg(samples, source_rate, rate)
    return _resampler(old, new)(torch.from_numpy(samples)).numpy()


@functools.lru_cache(maxsize=32)
def _resampler(old: int, new: int) -> Callable[[Tensor], Tensor]:
    """The resampler of one ratio; computing its filter takes longer than resampling 10 s of sound."""
    from torchaudio.transforms import Resample

    return Resample(old, new)


def _resample_by_ffmpeg(samples: np.ndarray, source_rate: int, rate: int) -> np.ndarray:
    import av

    resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)
    blocks = []
    for start in range(0, len(samples), _BLOCK):
        frame = av.AudioFrame.from_ndarray(samples[None, start : start + _BLOCK], format="fltp", layout="mono")
        frame.sample_rate = source_rate
        blocks += [part.to_ndarray()[0] for part in resampler.resample(frame)]
    blocks += [part.to_ndarray()[0] for part in resampler.resample(None)]
    return np.concatenate(blocks)


def _check_length(source: object, length: int, rate: int, limits: Limits) -> None:
    if length > limits.max_seconds * max(rate, 1):
        raise MediaError(source, f"it is longer than the limit of {limits.max_seconds:g} s")
    if 4 * length > limits.max_bytes:
        raise MediaError(source, f"{length} samples at {rate} Hz exceed {limits.max_bytes} bytes")


def _channels_first(array: np.ndarray) -> np.ndarray:
    """``[C,S]``, also from ``[S]``, and from ``[S,C]`` as soundfile gives it."""
    if array.ndim not in (1, 2):
        raise MediaError(array, "a sound has the shape [S], [C,S] or [S,C]")
    if array.ndim == 1 or array.size == 0 or 1 in array.shape:
        return array.reshape(1, -1)
    if array.shape[0] == array.shape[1] or min(array.shape) > _MOST_CHANNELS:
        raise MediaError(
            array,
            f"the channel axis of {list(array.shape)} is unclear: expected [S], or [C,S] or [S,C] with at most "
            f"{_MOST_CHANNELS} channels and more samples than channels",
        )
    return array if array.shape[0] < array.shape[1] else array.T


def _to_mono(samples: np.ndarray, channel: Channel) -> np.ndarray:
    """``[C,S]`` -> ``[S]``."""
    if len(samples) == 1 or channel == "first":
        return np.ascontiguousarray(samples[0])
    if len(samples) == 2:
        return (samples[0] + samples[1]) * np.float32(0.5)
    return samples.mean(0, dtype=np.float32)


def _scaled(samples: np.ndarray) -> np.ndarray:
    """Samples of any type as float32 in [-1, 1]; unsigned bytes are silent at 128."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128.0) / 128.0
    if samples.dtype.kind == "i":
        return (samples / float(-np.iinfo(samples.dtype).min)).astype(np.float32)
    raise MediaError(samples, f"samples of type {samples.dtype} have no standard scale; use floats or signed integers")


def _sndfile_samples(
    file: str | io.BytesIO, source: object, channel: Channel, limits: Limits
) -> tuple[int, np.ndarray] | None:
    """Rate and samples; None if FFmpeg should try: Ogg with a video, rare codecs, a wav whose header has length 0.

    A recorder that is killed leaves such a wav, because it writes the length last.
    """
    import soundfile

    deadline = Deadline(source, limits.timeout)
    try:
        with soundfile.SoundFile(file) as sound:
            if sound.frames != _UNKNOWN_LENGTH:
                _check_length(source, sound.frames, sound.samplerate, limits)
            blocks, length = [], 0
            while True:
                deadline.check()
                block = sound.read(min(_BLOCK, max(sound.frames - length, 1)), dtype="float32", always_2d=True)
                if len(block) == 0:
                    break
                length += len(block)
                _check_length(source, length, sound.samplerate, limits)
                blocks.append(_to_mono(block.T, channel))
            return (sound.samplerate, np.concatenate(blocks)) if blocks else None
    except soundfile.LibsndfileError:
        return None


def _ffmpeg_samples(file: str | io.BytesIO, source: object, channel: Channel, limits: Limits) -> tuple[int, np.ndarray]:
    """Rate and samples. Damaged packets are left out; a file with more than a tenth of them is refused.

    If a video's sound starts after its first frame, silence fills the gap, so that both have the same time axis.
    """
    import av.error

    with open_container(file, limits) as container:
        stream = first_stream(container, "audio", source)
        picture = find_stream(container, "video")
        rate, length, faults, count = 0, 0, 0, 0
        fault = "it holds no sound"
        blocks: list[np.ndarray] = []
        deadline = Deadline(source, limits.timeout)
        for packet in chain(packets_of(container, stream), [None]):
            deadline.check()
            count += 1
            try:
                frames = stream.codec_context.decode(packet)
            except av.error.FFmpegError as error:
                faults, fault = faults + 1, f"{type(error).__name__}: {error.strerror}"
                continue
            for frame in frames:
                if not blocks:
                    rate = frame.sample_rate
                    silence = _seconds_before(frame, stream, picture)
                    _check_length(source, round(silence * rate), rate, limits)
                    blocks.append(np.zeros(round(silence * rate), np.float32))
                if frame.sample_rate != rate:
                    raise MediaError(source, "its sampling rate changes midway")
                blocks.append(_to_mono(_frame_samples(frame), channel))
                length += len(blocks[-1])
            _check_length(source, length, rate, limits)
        if length == 0 or faults > max(1, count // 10):
            raise MediaError(source, fault)
        return rate, np.concatenate(blocks)


def _seconds_before(frame: Any, stream: Any, picture: Any) -> float:
    """Seconds from the first frame of a video to the first frame of its sound; 0 if sound comes first or alone."""
    if picture is None or picture.start_time is None or frame.pts is None:
        return 0.0
    return max(0.0, float(frame.pts * stream.time_base - picture.start_time * picture.time_base))


def _frame_samples(frame: Any) -> np.ndarray:
    """A decoded frame as float32 ``[C,S]``."""
    import av

    if frame.format.is_planar and frame.layout.nb_channels >= _PLANES:
        # PyAV reads beyond the end of a full list of planes; FFmpeg puts them into one.
        [frame] = av.AudioResampler(format=frame.format.packed, layout=frame.layout).resample(frame)
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    return _scaled(samples)
