"""From a request's media to files in a folder that is removed with the request.

``data:`` URLs and bare base64 are decoded, ``file:`` URLs are looked for below the folders that the server allows, and
``http(s)`` URLs are fetched where that is switched on. No message names a path of the server.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from lavis_chatbridge.chat.media import Medium
from lavis_chatbridge.chat.server import fetch
from lavis_chatbridge.chat.server.errors import RequestError, timed_out, too_large
from lavis_chatbridge.chat.server.folder import RequestFile, RequestFolder
from lavis_chatbridge.chat.server.requests import Attachment
from lavis_chatbridge.chat.server.settings import ServerSettings

_BLOCK = 1 << 20
_STRETCH = 1 << 16
_WHITE_SPACE = dict.fromkeys(map(ord, " \t\r\n\v\f"))


def save(
    attachments: Sequence[Attachment], folder: RequestFolder, settings: ServerSettings, deadline: float
) -> list[Path]:
    """Write the media of a request into a folder of its own.

    Args:
        attachments: What the request brings.
        folder: An empty folder; once it is closed, nothing more is written.
        settings: What is allowed.
        deadline: The moment (``time.monotonic``) at which to give up.

    Raises:
        RequestError: If one is not allowed, too large, or cannot be had.
        FolderClosedError: If the request ended meanwhile.
    """
    with folder.writing():
        for number, attachment in enumerate(attachments):
            with folder.create(str(number)) as file:
                _write(attachment, file, settings, deadline)
    return [folder.path / str(number) for number in range(len(attachments))]


def media_of(attachments: Sequence[Attachment], paths: Sequence[Path], hear_videos: bool) -> list[list[Medium]]:
    """Each attachment as what the model is given: a video may be followed by its sound track.

    Media are called by their place in the request, so that what is said of them names no file.
    """
    result = []
    for attachment, path in zip(attachments, paths, strict=True):
        media = [Medium(attachment.kind, path, name=attachment.where)]
        if attachment.kind == "video" and hear_videos:
            media.append(Medium("audio", path, track=True, name=f"{attachment.where}: its sound track"))
        result.append(media)
    return result


def _write(attachment: Attachment, file: RequestFile, settings: ServerSettings, deadline: float) -> None:
    where, limit = attachment.where, settings.max_medium
    if attachment.data:
        file.write(_decoded(attachment.data, limit, where))
        return
    scheme, _, rest = attachment.url.partition(":")
    scheme = scheme.lower()
    if scheme == "data":
        file.write(_data_url(rest, limit, where))
    elif scheme == "file":
        _copy(attachment.url, file, settings, where)
    elif scheme in ("http", "https"):
        if not settings.allow_urls:
            raise RequestError(
                400, f"{where}: this server fetches no URLs; send the bytes as a data: URL", "url_not_allowed", where
            )
        try:
            fetch.fetch(attachment.url, file, limit, deadline)
        except fetch.TooLargeError:
            raise too_large(where, limit, where) from None
        except fetch.TooSlowError:
            raise timed_out(settings.timeout) from None
        except fetch.FetchError as error:
            raise RequestError(400, f"{where}: {error}", "url_not_fetched", where) from error
    else:
        known = ["data:", *(["file:"] if settings.folders else []), *(["http(s):"] if settings.allow_urls else [])]
        raise RequestError(400, f"{where}: the URL begins with none of {', '.join(known)}", "invalid_url", where)


def _data_url(rest: str, limit: int, where: str) -> bytes:
    head, comma, data = rest.partition(",")
    if not comma:
        raise RequestError(400, f"{where}: a data: URL has a comma in front of its data", "invalid_url", where)
    if head.lower().endswith(";base64"):
        return _decoded(data, limit, where)
    content = _unescaped(data)
    if len(content) > limit:
        raise too_large(where, limit, where)
    return content


def _unescaped(text: str) -> bytes:
    """The bytes that ``%41`` and its like stand for, a stretch at a time: each takes a hundred bytes of memory."""
    pieces, at = [], 0
    while at < len(text):
        end = min(at + _STRETCH, len(text))
        if end < len(text):  # an escape is not cut in two
            last = text.rfind("%", end - 2, end)
            end = last if last > at else end
        pieces.append(urllib.parse.unquote_to_bytes(text[at:end].encode("utf-8", "replace")))
        at = end
    return b"".join(pieces)


def _decoded(data: str, limit: int, where: str) -> bytes:
    if len(data) > limit * 4 // 3 + 4 + data.count("\n"):
        raise too_large(where, limit, where)
    try:
        # Clients break long lines, leave out the padding, or escape it in a URL.
        plain = _unescaped(data).decode("latin-1") if "%" in data else data
        plain = plain.translate(_WHITE_SPACE)
        content = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(400, f"{where}: the data is not base64", "invalid_base64", where) from None
    if not content:
        raise RequestError(400, f"{where}: the data is empty", "invalid_media", where)
    if len(content) > limit:
        raise too_large(where, limit, where)
    return content


def _copy(url: str, file: RequestFile, settings: ServerSettings, where: str) -> None:
    """Copy a file below one of the folders.

    Whether a file is missing, lies elsewhere or may not be read is not told: a client could look around with it.
    """
    refused = RequestError(400, f"{where}: this server offers no such file", "file_not_available", where)
    try:
        parsed = urllib.parse.urlsplit(url)
    except ValueError:  # half a bracket, say
        raise refused from None
    if parsed.netloc not in ("", "localhost") or parsed.query or parsed.fragment:
        raise refused
    path = urllib.parse.unquote(parsed.path)
    for folder in settings.folders:
        opened = _opened_below(folder, path)
        if opened is None:
            continue
        with opened:
            count = 0
            while block := opened.read(_BLOCK):
                count += len(block)
                if count > settings.max_medium:
                    raise too_large(where, settings.max_medium, where)
                file.write(block)
        return
    raise refused


def _opened_below(folder: Path, path: str) -> BinaryIO | None:
    """A plain file below a folder, links followed first; none if there is none."""
    try:
        root = os.path.realpath(folder)
        real = os.path.realpath(os.path.join(root, path))
        if os.path.commonpath([root, real]) != root:
            return None
        # A pipe would be waited for without the first flag; the second is for a link put there since.
        handle = os.open(real, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            return None
        return os.fdopen(handle, "rb")
    except (OSError, ValueError):
        return None


def remaining(deadline: float) -> float:
    """Seconds that are left, never below 0."""
    return max(0.0, deadline - time.monotonic())
