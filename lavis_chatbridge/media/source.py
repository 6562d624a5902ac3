"""The types of media (unopened, opened, encoded), and the guard that gives opening its limits and one error class."""

from __future__ import annotations

import functools
import io
import numbers
import os
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, TimeoutError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeAlias, TypeVar

import numpy as np

from lavis_chatbridge.errors import MediaError

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from torch import Tensor


Source: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | np.ndarray | PILImage"
"""A path, the bytes of a file, a decoded array, or a Pillow image."""
Sound: TypeAlias = "Source | tuple[np.ndarray, float]"
"""A `Source`, or samples with their sampling rate in Hz."""

P = ParamSpec("P")
R = TypeVar("R")

_CAUSES = {
    "UnidentifiedImageError": "it is not an image of a known format",  # Pillow's
    "InvalidDataError": "it is cut off or damaged, or not an audio or video file of a known format",  # PyAV's
    "EOFError": "it is cut off",
}
_PICTURE_HEADS = (b"GIF8", b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")
_HEIF_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@dataclass(frozen=True)
class Limits:
    """Limits on opening one medium; exceeding one raises a `MediaError`."""

    max_pixels: int = 89_478_485
    """Pixels of an image or a video frame; the default is Pillow's limit for warnings."""
    max_seconds: float = 3600.0
    """Length of a sound in seconds."""
    max_frames: int = 500_000
    """Number of frames of a video or an animated image."""
    max_bytes: int = 1 << 31
    """Size of a video's chosen frames in bytes."""
    timeout: float | None = 60.0
    """Time limit of decoding in seconds; None: no limit (a `pool.DecodingPool` has its own)."""


DEFAULT_LIMITS = Limits()


class AudioClips(NamedTuple):
    """One sound as filterbank clips."""

    fbank: Tensor
    """``[N, F, M]`` normalised log-mel filterbank: clips, frames of 10 ms, mel bins."""
    frames: Tensor
    """``[N]`` number of valid frames of each clip; the rest of its ``F`` frames is padding."""


class EncodedMedium(NamedTuple):
    """The output of frozen encoder and layer norm for one medium, as stored in feature caches."""

    tokens: Tensor
    """``[T, N, D]``: frames or clips, tokens of each, encoder width."""
    mask: Tensor
    """``[T, N]`` bool, true where a token represents content (false for padded audio)."""


def guarded(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function of ``(source, ..., limits=...)`` to raise only `MediaError`, and to stop at a time limit.

    Files are opened in another thread. Python cannot end a call into a C library, so after ``limits.timeout`` the
    thread is abandoned with the lowest priority, and the caller gets `MediaError`.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        source: Any = args[0]
        limits: Any = kwargs.get("limits", DEFAULT_LIMITS)
        if limits.timeout is None or not is_file(source):
            with media_errors(source):
                return function(*args, **kwargs)
        result: Future[R] = Future()

        def run() -> None:
            try:
                with media_errors(source):
                    result.set_result(function(*args, **kwargs))
            except BaseException as error:
                result.set_exception(error)

        decoder = threading.Thread(target=run, name="decoder", daemon=True)
        decoder.start()
        try:
            return result.result(limits.timeout)
        except TimeoutError:
            with suppress(OSError, AttributeError):  # only Linux has thread priorities
                os.setpriority(os.PRIO_PROCESS, decoder.native_id or 0, 19)
            raise MediaError(source, f"decoding took longer than {limits.timeout:g} s") from None

    return call


@contextmanager
def media_errors(source: object) -> Iterator[None]:
    """Turn every exception into a `MediaError` of one line, without memory addresses.

    Catches ``Exception``, because Pillow and PyAV raise some thirty different classes for broken files
    (``SyntaxError``, ``struct.error``, ``UnicodeDecodeError``, ``MemoryError`` ...).
    """
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        name, text = type(error).__name__, " ".join(str(error).split())
        cause = _CAUSES.get(name) or (f"{name}: {text[:300]}" if text else name)
        raise MediaError(source, cause) from error


def directly(function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
    """Call ``function`` in this process: the alternative to a `pool.DecodingPool`."""
    return function(*args, **kwargs)


def is_file(source: object) -> bool:
    """Whether a source is a path or the bytes of a file, which must be decoded."""
    return isinstance(source, (str, bytes, bytearray, memoryview)) or hasattr(source, "__fspath__")


def file_of(source: object) -> str | io.BytesIO:
    """The absolute path, or the bytes as a file object.

    Paths are made absolute, so that no library interprets them as URLs. Pipes and devices are rejected, because
    reading them may never end.

    Raises:
        MediaError: If the file does not exist, is not a regular file or is empty, or the source has an unknown type.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        if len(source) == 0:
            raise MediaError(source, "it is empty")
        return io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike)):
        given = "None" if source is None else type(source).__name__
        raise MediaError(source, f"expected a path, bytes, an array or a Pillow image, found {given}")
    with media_errors(source):
        path = os.path.abspath(os.fspath(source))
        try:
            found = os.stat(path)
        except FileNotFoundError:
            raise MediaError(source, "there is no such file") from None
        if not stat.S_ISREG(found.st_mode):
            raise MediaError(source, "it is a folder" if stat.S_ISDIR(found.st_mode) else "it is not a regular file")
        if found.st_size == 0:
            raise MediaError(source, "the file is empty")
        return path


def head_of(file: str | io.BytesIO) -> bytes:
    """The first 16 bytes of a file."""
    if isinstance(file, str):
        with open(file, "rb") as opened:
            return opened.read(16)
    return bytes(file.getbuffer()[:16])


def is_picture(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is an image, animated or not."""
    return head.startswith(_PICTURE_HEADS) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or is_heif(head)


def is_heif(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is an AVIF or HEIC image, in MPEG-4's container."""
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS


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
