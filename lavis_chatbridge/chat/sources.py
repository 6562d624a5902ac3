"""Where media come from: their modality, URLs (``data:``, ``file:``, ``http(s):``), and names of this machine."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import time
import urllib.parse
from pathlib import Path

from lavis_chatbridge import media
from lavis_chatbridge.config import Settings
from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.prompting.pieces import Modality

MEBIBYTE = 1 << 20
ANY_FILE = (Path("/"),)
_REDIRECTS = 3
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
_SUFFIXES: dict[Modality, tuple[str, ...]] = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    "video": (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg"),
    "audio": (".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aiff", ".aif", ".weba"),
}


class Access(Settings):
    """Which URLs may be opened, and how much may come from them."""

    folders: tuple[Path, ...] = ()
    """Folders below which ``file:`` URLs may lie."""
    hosts: tuple[str, ...] = ()
    """Host names from which ``http:`` and ``https:`` URLs may be fetched."""
    max_bytes: int = 48 * MEBIBYTE
    """Bytes of one medium."""
    seconds: float = 60.0
    """Seconds that fetching one may take."""


def open_url(url: str, where: str, access: Access, folder: Path = Path()) -> Path | bytes:
    """The path of a ``file:`` URL, the bytes of any other.

    Args:
        url: The URL.
        where: What messages call it; they name no path.
        access: What may be opened.
        folder: What a relative ``file:`` URL is relative to, if it lies in no folder of ``access``.

    Raises:
        MediaError: If it may not be opened, is too large, or cannot be read.
    """
    scheme, _, rest = url.partition(":")
    scheme = scheme.lower()
    if scheme == "data":
        return _decoded(rest, where, access.max_bytes)
    if scheme == "file":
        return _file(url, where, access, folder)
    if scheme in ("http", "https"):
        return _fetched(url, where, access)
    raise MediaError(where, f"the URL {url[:40]!r} does not begin with data:, file: or http(s):")


def _decoded(rest: str, where: str, limit: int) -> bytes:
    head, comma, data = rest.partition(",")
    if not comma:
        raise MediaError(where, "a data: URL needs a comma before its data")
    if len(data) > limit * 3:  # each byte takes three characters at most
        raise MediaError(where, f"it is larger than the limit of {limit} bytes")
    content = urllib.parse.unquote_to_bytes(data) if "%" in data else data.encode("utf-8", "replace")
    if head.lower().endswith(";base64"):
        try:
            plain = b"".join(content.split())  # clients break lines and omit padding
            content = base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise MediaError(where, "the data is not base64") from None
    if not content:
        raise MediaError(where, "the data is empty")
    return _within(content, where, limit)


def _file(url: str, where: str, access: Access, folder: Path) -> Path:
    """A plain file below an allowed folder, links resolved. Every refusal has the same text: it reveals no file."""
    path = urllib.parse.unquote(url.partition(":")[2])
    path = path.removeprefix("//localhost").removeprefix("//") if path.startswith("//") else path
    for allowed in access.folders:
        try:
            root = allowed.resolve()
            found = ((folder if access.folders == ANY_FILE else root) / path).resolve()
            if found.is_relative_to(root) and (found.is_file() or access.folders == ANY_FILE):
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
                _within(content, where, access.max_bytes)
                if time.monotonic() > end:
                    raise MediaError(where, f"fetching took longer than {access.seconds:g} s")
    except httpx.HTTPStatusError as error:
        raise MediaError(where, f"the host answers with status {error.response.status_code}") from None
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        raise MediaError(where, f"the URL cannot be fetched ({type(error).__name__})") from error
    if not content:
        raise MediaError(where, "the host sends nothing")
    return bytes(content)


def _within(content: bytes | bytearray, where: str, limit: int) -> bytes:
    if len(content) > limit:
        raise MediaError(where, f"it is larger than the limit of {limit} bytes")
    return content  # type: ignore[return-value]


def modality_of(source: str | Path | bytes) -> Modality:
    """The modality of a file, by its name or else by its content: a webm or mp4 without a picture is a sound."""
    suffix = "" if isinstance(source, bytes) else Path(source).suffix.lower()
    for modality, suffixes in _SUFFIXES.items():
        if suffix in suffixes and modality != "video":
            return modality
    try:
        return media.modality_of(source)
    except MediaError:
        return "video"  # opening it raises a clear error


def check_modality(modality: Modality, path: str | Path) -> None:
    """Refuse a file whose name says that it is of another modality; a video's sound track is a sound.

    Raises:
        MediaError: If it is.
    """
    suffix = Path(path).suffix.lower()
    found = next((name for name, suffixes in _SUFFIXES.items() if suffix in suffixes), modality)
    if found != modality and (found, modality) != ("video", "audio"):
        raise MediaError(str(path), f"it is a file of modality {found}, but was given as {modality}")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_own_name(header: str, host: str) -> bool:
    """Whether a Host header names the address that a server listens on, not a name that leads there (DNS rebinding)."""
    name, colon, port = header.lower().rpartition(":")
    return (name if colon and port.isdecimal() else header.lower()) in (*_LOCAL_NAMES, host.lower())
