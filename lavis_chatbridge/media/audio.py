"""Opens sounds: path, bytes or array -> mono samples at one rate. Knows nothing of filterbanks."""

from __future__ import annotations

import functools
import io
import math
import numbers
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import numpy as np

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media.container import first_stream, open_container
from lavis_chatbridge.media.limits import DEFAULT_LIMITS, Limits
from lavis_chatbridge.media.source import Deadline, Sound, Source, file_of, head_of, is_picture, media_errors

Channel: TypeAlias = Literal["mean", "first"]
_LOWEST_RATE, _HIGHEST_RATE = 1_000, 768_000
_BLOCK = 1 << 20  # sample frames read at once, so that stereo never lies in memory whole
_UNKNOWN_LENGTH = (1 << 63) - 1  # libsndfile's word for a flac that was written into a pipe
_MOST_CHANNELS = 32  # of an array
_PLANES = 8  # of sound that a frame of FFmpeg has room for
_LARGEST_KERNEL = 4_000_000
_ROLLOFF, _ZERO_CROSSINGS = 0.99, 6  # of torchaudio's resampler


def open_audio(
    source: Sound,
    rate: int = 16_000,
    channel: Channel = "mean",
    *,
    source_rate: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> np.ndarray:
    """Open a sound, or the sound track of a video, as mono.

    Args:
        source: A path, the bytes of a file, or samples (floats in [-1, 1], or integers, scaled by their type), alone or
            as ``(samples, rate in Hz)``: ``[S]``, ``[C,S]`` or ``[S,C]``, of which the shorter side is the channels (at
            most 32). wav, flac, ogg, aiff and their kin are read by libsndfile, everything else by FFmpeg.
        rate: Samples per second of the result.
        channel: "mean" of all channels, or the "first" one.
        source_rate: Samples per second of an array without one; ``rate`` if not given. Files state their own.
        limits: Bounds on its length and on the time of decoding.

    Returns:
        float32 ``[S]``. Samples lie in [-1, 1] but for the ringing of the resampling filter.

    Raises:
        MediaError: If it cannot be opened, holds no sound, or is too long. What is left of a cut-off file is returned.
    """
    sound, stated = rated(source)
    with media_errors(sound):
        if isinstance(sound, np.ndarray):
            own_rate, samples = stated or source_rate or rate, _array_samples(sound, channel)
        else:
            own_rate, samples = decode_audio(sound, channel, limits=limits)
        return finish_audio(sound, own_rate, samples, rate, limits)


def rated(source: Any) -> tuple[Any, int | None]:
    """A sound, and its sampling rate in Hz where it comes as a pair of both.

    Raises:
        MediaError: If a pair is not of samples and a rate.
    """
    if not isinstance(source, tuple):
        return source, None
    samples, rate = source if len(source) == 2 else (None, None)
    if not isinstance(samples, np.ndarray):
        raise MediaError(source, "a pair that stands for a sound is of an array and its sampling rate in Hz")
    with media_errors(samples):  # some whole numbers are no floats
        number = float(rate) if isinstance(rate, numbers.Real) else 0.0
    if not number.is_integer() or number < 1:
        raise MediaError(samples, f"its sampling rate is {rate!r:.80}, expected a whole number of Hz")
    return samples, int(number)


def decode_audio(
    source: Source, channel: Channel = "mean", *, limits: Limits = DEFAULT_LIMITS
) -> tuple[int, np.ndarray]:
    """The first half of `open_audio`: the sampling rate of a file, and its samples as mono (float32 ``[S]``).

    Raises:
        MediaError: As `open_audio`.
    """
    with media_errors(source):
        return _file_samples(file_of(source), source, channel, limits)


def finish_audio(source: object, own_rate: int, samples: np.ndarray, rate: int, limits: Limits) -> np.ndarray:
    """The second half of `open_audio`: samples of one rate, checked, at another.

    Raises:
        MediaError: If there are none, too many, or others than numbers; or if ``own_rate`` is out of range.
    """
    if samples.size == 0:
        raise MediaError(source, "it holds no sound")
    if not _LOWEST_RATE <= own_rate <= _HIGHEST_RATE:
        raise MediaError(source, f"a sampling rate of {own_rate} Hz is out of range")
    if samples.size > limits.max_seconds * own_rate:
        raise MediaError(source, _too_long(limits))
    if not np.isfinite(samples).all():
        raise MediaError(source, "its samples are not all finite numbers")
    return resample(samples.clip(-1.0, 1.0), own_rate, rate)


def resample(samples: np.ndarray, source_rate: int, rate: int) -> np.ndarray:
    """``samples`` (float32 ``[S]``) from one rate to another, by windowed sinc interpolation as torchaudio does it."""
    if source_rate == rate:
        return samples
    import torch

    common = math.gcd(source_rate, rate)
    old, new = source_rate // common, rate // common
    if new * old > _LARGEST_KERNEL:  # torchaudio holds a filter of about this many numbers
        return _resample_by_sample(samples, old, new)
    return _resampler(old, new)(torch.from_numpy(samples)).numpy()


@functools.lru_cache(maxsize=32)
def _resampler(old: int, new: int) -> Any:
    """The resampler of one ratio. Its filter takes longer to compute than 10 s of sound to resample, so it is kept."""
    from torchaudio.transforms import Resample

    return Resample(old, new, lowpass_filter_width=_ZERO_CROSSINGS, rolloff=_ROLLOFF)


def _resample_by_sample(samples: np.ndarray, old: int, new: int) -> np.ndarray:
    """The same filter, its weights computed for each sample of the result: for ratios such as 44101 : 16000."""
    cutoff = min(old, new) * _ROLLOFF / old  # of the lowpass, in units of the old sampling rate
    reach = math.ceil(_ZERO_CROSSINGS / cutoff)
    padded = np.pad(samples, (reach, reach + 1)).astype(np.float64)
    pieces = []
    total = math.ceil(len(samples) * new / old)
    for start in range(0, total, 1 << 14):
        moments = np.arange(start, min(start + (1 << 14), total)) * old / new
        nearest = np.floor(moments).astype(np.int64)
        taps = nearest[:, None] + np.arange(-reach, reach + 2)
        distance = ((taps - moments[:, None]) * cutoff).clip(-_ZERO_CROSSINGS, _ZERO_CROSSINGS)
        weights = np.sinc(distance) * np.cos(distance * np.pi / _ZERO_CROSSINGS / 2) ** 2 * cutoff
        pieces.append((padded[(taps + reach).clip(0, len(padded) - 1)] * weights).sum(1))
    return np.concatenate(pieces).astype(np.float32)


def _too_long(limits: Limits) -> str:
    return f"it is longer than the limit of {limits.max_seconds:g} s"


def _check_length(source: object, length: int, rate: int, limits: Limits) -> None:
    if length > limits.max_seconds * max(rate, 1):
        raise MediaError(source, _too_long(limits))
    if 4 * length > limits.max_bytes:
        raise MediaError(source, f"{length} samples at {rate} Hz exceed {limits.max_bytes} bytes")


def _array_samples(array: np.ndarray, channel: Channel) -> np.ndarray:
    if array.ndim not in (1, 2):
        raise MediaError(array, "a sound has the shape [S], [C,S] or [S,C]")
    return _to_mono(_scaled(np.atleast_2d(array) if array.ndim == 1 else _channels_first(array)), channel)


def _channels_first(array: np.ndarray) -> np.ndarray:
    """``[C,S]``, also where the channels come last, as soundfile gives them."""
    if array.size == 0 or 1 in array.shape:
        return array.reshape(1, -1)
    if array.shape[0] == array.shape[1] or min(array.shape) > _MOST_CHANNELS:
        raise MediaError(
            array,
            f"which side of {list(array.shape)} is the channels? expected [S], or [C,S] or [S,C] with at most "
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
    raise MediaError(samples, f"samples of type {samples.dtype} have no agreed scale; give floats or signed integers")


def _file_samples(file: str | io.BytesIO, source: object, channel: Channel, limits: Limits) -> tuple[int, np.ndarray]:
    """The sampling rate of a file and its samples as mono."""
    import soundfile

    head = head_of(file)
    if is_picture(head):
        raise MediaError(source, "it is a picture")
    if head.startswith((b"RIFF", b"RF64", b"fLaC", b"OggS", b"FORM", b".snd", b"caff")) and head[8:12] != b"AVI ":
        try:
            return _sndfile_samples(file, source, channel, limits)
        except soundfile.LibsndfileError:
            if isinstance(file, io.BytesIO):
                file.seek(0)  # FFmpeg reads some that libsndfile does not: Ogg with a video, rare codecs in wav
    return _ffmpeg_samples(file, source, channel, limits)


def _sndfile_samples(
    file: str | io.BytesIO, source: object, channel: Channel, limits: Limits
) -> tuple[int, np.ndarray]:
    import soundfile

    deadline = Deadline(source, limits.timeout)
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
        return sound.samplerate, _joined(blocks)


def _ffmpeg_samples(file: str | io.BytesIO, source: object, channel: Channel, limits: Limits) -> tuple[int, np.ndarray]:
    """Damaged packets are left out, as every player does; a file with more than a tenth of them is refused."""
    import av.error

    with open_container(file, limits) as container:
        stream = first_stream(container, "audio", source)
        rate, length, faults, count = 0, 0, 0, 0
        fault = "its sound track holds no sound"
        blocks: list[np.ndarray] = []
        deadline = Deadline(source, limits.timeout)
        for packet in _packets(container, stream):
            deadline.check()
            count += 1
            try:
                frames = stream.codec_context.decode(packet)
            except av.error.FFmpegError as error:
                faults, fault = faults + 1, f"{type(error).__name__}: {error.strerror}"
                continue
            for frame in frames:
                rate = rate or frame.sample_rate
                if frame.sample_rate != rate:
                    raise MediaError(source, "its sampling rate changes midway")
                blocks.append(_to_mono(_frame_samples(frame), channel))
                length += len(blocks[-1])
            _check_length(source, length, rate, limits)
        if length == 0 or faults > max(1, count // 10):
            raise MediaError(source, fault)
        return rate, _joined(blocks)


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """Compressed pieces of a track, then the sign to hand out the rest; where reading fails, the file ends."""
    import av.error

    try:
        yield from container.demux(stream)
    except av.error.FFmpegError:
        yield None


def _frame_samples(frame: Any) -> np.ndarray:
    """A decoded frame as float32 ``[C,S]``."""
    import av

    if frame.format.is_planar and frame.layout.nb_channels >= _PLANES:
        # PyAV looks for the end of the planes beyond the end of their list: these are laid into one by FFmpeg.
        [frame] = av.AudioResampler(format=frame.format.packed, layout=frame.layout).resample(frame)
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    return _scaled(samples)


def _joined(blocks: list[np.ndarray]) -> np.ndarray:
    if not blocks:
        return np.empty(0, np.float32)
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
