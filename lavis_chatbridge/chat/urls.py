"""URLs of media: ``data:``, ``file:``, and ``http(s):`` from allowed hosts."""

from __future__ import annotations

import base64
import time
import urllib.parse
from pathlib import Path

from lavis_chatbridge.config import Settings
from lavis_chatbridge.errors import MediaError

MEBIBYTE = 1 << 20
_REDIRECTS = 3


class Access(Settings):
    """Which URLs may be opened, and how much may come from them."""

    own_folder: Path | None = None
    """If set, ``file:`` URLs are the user's own: any file, by a path relative to this folder."""
    folders: tuple[Path, ...] = ()
    """Folders below which ``file:`` URLs of strangers may lie."""
    hosts: tuple[str, ...] = ()
    """Host names from which ``http:`` and ``https:`` URLs may be fetched."""
    max_bytes: int = 48 * MEBIBYTE
    """Bytes of one medium."""
    seconds: float = 60.0
    """Seconds that fetching one may take."""


def data_url(content: bytes, mime_type: str = "") -> str:
    """Bytes as a URL."""
    return f"data:{mime_type};base64,{base64.b64encode(content).decode('ascii')}"


def open_url(url: str, where: str, access: Access) -> Path | bytes:
    """The path of a ``file:`` URL, the bytes of any other; messages call it ``where`` and name no path.

    Raises:
        MediaError: If it may not be opened, is too large, or cannot be read.
    """
    scheme, _, rest = url.partition(":")
    if scheme.lower() == "file":
        return _file(rest, where, access)
    if scheme.lower() == "data":
        content = _decoded(rest, where, access.max_bytes)
    elif scheme.lower() in ("http", "https"):
        content = _fetched(url, where, access)
    else:
        raise MediaError(where, f"the URL {url[:40]!r} does not begin with data:, file: or http(s):")
    if not content:
        raise MediaError(where, "it is empty")
    return content


def _decoded(rest: str, where: str, limit: int) -> bytes:
    head, comma, data = rest.partition(",")
    if not comma:
        raise MediaError(where, "a data: URL needs a comma before its data")
    content = urllib.parse.unquote_to_bytes(data)
    if head.lower().endswith(";base64"):
        try:
            plain = b"".join(content.split())  # clients break lines and omit padding
            content = base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
        except ValueError:
            raise MediaError(where, "the data is not base64") from None
    if len(content) > limit:
        raise _too_large(where, limit)
    return content


def _file(rest: str, where: str, access: Access) -> Path:
    """A file below an allowed folder, links resolved. Every refusal has the same text: it reveals no file."""
    path = urllib.parse.unquote(rest).removeprefix("//localhost").removeprefix("//")
    if access.own_folder is not None:
        return access.own_folder.absolute() / path
    for folder in access.folders:
        try:
            root = folder.resolve()
            found = (root / path).resolve()
            if found.is_relative_to(root) and found.is_file():
                return found
        except (OSError, ValueError):
            continue
    raise MediaError(where, "no such file is offered")


def _fetched(url: str, where: str, access: Access) -> bytes:
    import httpx

    def check(request: httpx.Request) -> None:
        if request.url.scheme not in ("http", "https") or request.url.host not in access.hosts:
            raise MediaError(where, f"the host {request.url.host!r} is not on the list of allowed hosts")

    end = time.monotonic() + access.seconds
    content = bytearray()
    try:
        with (
            httpx.Client(
                event_hooks={"request": [check]},  # called for every redirect too
                follow_redirects=True,
                max_redirects=_REDIRECTS,
                timeout=min(10.0, access.seconds),
                trust_env=False,
            ) as client,
            client.stream("GET", url) as response,
        ):
            response.raise_for_status()
            for block in response.iter_bytes():
                content += block
                if len(content) > access.max_bytes:
                    raise _too_large(where, access.max_bytes)
                if time.monotonic() > end:
                    raise MediaError(where, f"fetching took longer than {access.seconds:g} s")
    except httpx.HTTPStatusError as error:
        raise MediaError(where, f"the host answers with status {error.response.status_code}") from None
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        raise MediaError(where, f"the URL cannot be fetched ({type(error).__name__})") from error
    return bytes(content)


def _too_large(where: str, limit: int) -> MediaError:
    return MediaError(where, f"it is larger than the limit of {limit} bytes")
