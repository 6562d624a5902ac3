"""Where a medium comes from, and how every way of failing to open it becomes one ``MediaError``."""

from __future__ import annotations

import io
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lavis_chatbridge.errors import MediaError

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

Source: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | np.ndarray | PILImage"
"""A path, the bytes of a file, a decoded array, or a Pillow image."""
Sound: TypeAlias = "Source | tuple[np.ndarray, float]"
"""The same, or samples with their sampling rate in Hz."""

_PICTURE_HEADS = (b"GIF8", b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")


@contextmanager
def media_errors(source: object, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn whatever is raised inside, but for ``passing``, into ``MediaError(source, cause)``.

    Pillow, PyAV and libsndfile raise some thirty different exceptions at broken files (``SyntaxError``,
    ``struct.error``, ``UnicodeDecodeError``, ``MemoryError`` ... among them), so nothing short of ``Exception`` covers
    them.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (MediaError, *passing)):
            raise
        raise MediaError(source, _cause(error)) from error


def is_file(source: object) -> bool:
    """Whether a source is a path or the bytes of a file: what has yet to be decoded."""
    return isinstance(source, (str, bytes, bytearray, memoryview)) or hasattr(source, "__fspath__")


def file_of(source: Any) -> str | io.BytesIO:
    """The absolute path, or the bytes as a file object.

    A path is made absolute so that no library takes it for a URL. What is not a plain file (a pipe, a device) is
    refused, because reading it may never end.

    Raises:
        MediaError: If there is no such file, it is not a plain one, it is empty, or the source is of no known type.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        if len(source) == 0:
            raise MediaError(source, "it is empty")
        return _Bytes(source)
    if not isinstance(source, (str, os.PathLike)):
        raise MediaError(source, f"a {type(source).__name__} is neither a path, bytes, an array nor a Pillow image")
    with media_errors(source):
        path = os.path.abspath(os.fspath(source))
        try:
            found = os.stat(path)
        except FileNotFoundError:
            raise MediaError(source, "there is no such file") from None
        if not stat.S_ISREG(found.st_mode):
            raise MediaError(source, "it is a folder" if stat.S_ISDIR(found.st_mode) else "it is not a plain file")
        if found.st_size == 0:
            raise MediaError(source, "the file is empty")
        return path


def head_of(file: str | io.BytesIO, size: int = 16) -> bytes:
    """The first bytes of a file, which is left at its start."""
    if isinstance(file, str):
        with open(file, "rb") as opened:
            return opened.read(size)
    head = file.read(size)
    file.seek(0)
    return head


def is_picture(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a picture, animated or not."""
    return head.startswith(_PICTURE_HEADS) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


class _Bytes(io.BytesIO):
    """Where a broken file sends its reader before the start, libsndfile would print a traceback: it gets the start."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to ``offset``, as in ``io.BytesIO``."""
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return super().seek(0)


class Deadline:
    """Raises once the decoding of ``source`` has taken longer than ``seconds``."""

    def __init__(self, source: object, seconds: float) -> None:
        self._source, self._seconds = source, seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        """Raises MediaError: If the time is up."""
        if time.monotonic() > self._end:
            raise MediaError(self._source, f"decoding took longer than {self._seconds:g} s")


def _cause(error: Exception) -> str:
    """One line that says what went wrong, without addresses of objects in memory."""
    name = type(error).__name__
    if name == "UnidentifiedImageError":
        return "it is not a picture of a known format"
    text = " ".join(str(error).split())
    return f"{name}: {text[:300]}" if text else name
