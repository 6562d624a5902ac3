"""Conversations as OpenAI's chat messages, which clients send and files contain.

The URLs of their media are ``data:``, ``file:``, and ``http(s):`` from allowed hosts.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lavis_chatbridge.chat.conversation import ChatMessage, Conversation, Medium
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.files import PRIVATE, write_text
from lavis_chatbridge.media.audio import open_audio
from lavis_chatbridge.media.image import open_image
from lavis_chatbridge.media.source import is_file, rated
from lavis_chatbridge.prompting.conversation import Modality

_ROLES = ("system", "developer", "user", "assistant")
_MODALITIES: dict[str, Modality] = {
    "image_url": "image",
    "input_image": "image",
    "video_url": "video",
    "video": "video",
    "audio_url": "audio",
    "input_audio": "audio",
}
"""The type of a part -> its modality."""
_TEXTS = ("text", "input_text", "output_text")
_FRAMES = "data:video/jpeg;base64,"
"""The beginning of vLLM's URL of a video: frames follow, separated by commas."""
_RATE = 16_000  # Hz, of a sound that is a bare array


@dataclass(frozen=True)
class Access:
    """Which URLs may be opened, and how much may come from them."""

    own_folder: Path | None = None
    """If set, ``file:`` URLs are the user's own: any file, by a path relative to this folder."""
    folders: tuple[Path, ...] = ()
    """Folders below which ``file:`` URLs of strangers may lie."""
    hosts: tuple[str, ...] = ()
    """Host names from which ``http:`` and ``https:`` URLs may be fetched."""
    max_bytes: int = 48 << 20
    """Bytes of one medium."""
    seconds: float = 60.0
    """Seconds that fetching one may take."""


def read_messages(
    records: Sequence[Any], access: Access, hear_videos: bool = True, most_media: int | None = None
) -> Conversation:
    """Read OpenAI's messages; docs/server.md lists the parts that a message may have.

    System messages at the start become the system prompt, later ones a part of the next user's message. Roles then
    alternate, see `Conversation.add`.

    Args:
        records: The messages.
        access: The URLs that may be opened.
        hear_videos: A video is followed by its sound track, unless its part says ``"heard": false``.
        most_media: Refuse messages with more media, before any is opened.

    Raises:
        DataError: If a message has another form. Its first word is the position, as ``messages[0].content[1]``.
        MediaError: If a URL cannot be opened. Its ``source`` is the position.
    """
    read = [_read(record, f"messages[{number}]") for number, record in enumerate(records)]
    count = sum(len(part.urls) for _, parts in read for part in parts)
    if most_media is not None and count > most_media:
        raise DataError(f"the messages have {count} media, the limit is {most_media}")
    result, late = Conversation(), list[str]()
    for message, parts in read:
        if message.role in ("system", "developer"):
            if result.messages:
                late.append(message.text)
            else:
                result.system = "\n".join(filter(None, (result.system, message.text)))
            continue
        text = message.text
        if message.role == "user":
            text, late = "\n".join(filter(None, (*late, text))), []
        media = tuple(medium for part in parts for medium in part.open(access, hear_videos))
        result.add(replace(message, text=text, media=media))
    if late:
        result.add(ChatMessage("user", "\n".join(late)))
    return result


def save(conversation: Conversation, path: str | Path) -> None:
    """Write a conversation as JSON, or raise `DataError`. Files keep their path, other media are stored inside."""
    try:
        write_text(Path(path), to_json(conversation, os.path.abspath(Path(path).parent)), mode=PRIVATE)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error


def load(path: str | Path) -> Conversation:
    """A saved conversation; `DataError` if the file cannot be read, or is not one."""
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))["messages"]
        return read_messages(records, Access(own_folder=Path(path).parent))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, RecursionError, MediaError) as error:
        raise DataError(f"{path} is not a saved conversation: {' '.join(str(error).split())[:300]}") from error


def to_json(conversation: Conversation, folder: str = "") -> str:
    """A conversation as OpenAI's messages; files below ``folder`` get paths relative to it."""
    records = [{"role": "system", "content": conversation.system}] if conversation.system else []
    records += [_record(message, folder) for message in conversation.messages]
    return json.dumps({"messages": records}, ensure_ascii=False, indent=1) + "\n"


def open_url(url: str, where: str, access: Access) -> Path | bytes:
    """The path of a ``file:`` URL, the bytes of any other; messages call it ``where`` and name no path.

    Raises:
        MediaError: If it may not be opened, is too large, or cannot be read.
    """
    scheme, _, rest = url.partition(":")
    if scheme.lower() == "file":
        return _file(rest, where, access)
    if scheme.lower() == "data":
        content = _decoded(rest, where)
    elif scheme.lower() in ("http", "https"):
        content = _fetched(url, where, access)
    else:
        raise MediaError(where, f"the URL {url[:40]!r} does not begin with data:, file: or http(s):")
    if not content:
        raise MediaError(where, "it is empty")
    if len(content) > access.max_bytes:
        raise MediaError(where, f"it is larger than the limit of {access.max_bytes} bytes")
    return content


def data_url(content: bytes, mime_type: str = "") -> str:
    return f"data:{mime_type};base64,{base64.b64encode(content).decode('ascii')}"


def png_url(picture: Image.Image) -> str:
    """A Pillow image as the URL of a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return data_url(file.getvalue(), "image/png")


def frames_of(images: Sequence[Any]) -> np.ndarray:
    """``[T, H, W, 3]``: images as the frames of a video, in the size of the first."""
    frames = [Image.fromarray(open_image(image)) for image in images]
    return np.stack([np.asarray(frame.resize(frames[0].size)) for frame in frames])


@dataclass
class _Part:
    """A medium of a message before it is opened; several URLs are the frames of a video."""

    where: str
    modality: Modality
    urls: Sequence[str]
    name: str
    heard: bool | None

    def open(self, access: Access, hear_videos: bool) -> list[Medium]:
        opened = [open_url(url, self.where, access) for url in self.urls]
        content = opened[0] if len(opened) == 1 else frames_of(opened)
        medium = Medium(self.modality, content, self.name or self.where)
        return medium.with_track(hear_videos if self.heard is None else self.heard)


def _read(record: Any, where: str) -> tuple[ChatMessage, list[_Part]]:
    """A message without its media, and these."""
    role = record.get("role") if isinstance(record, Mapping) else record
    if role not in _ROLES:
        raise DataError(f"{where}.role is {role!r:.60}, expected {', '.join(_ROLES)}")
    content = record.get("content")
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, (str, list)):
        raise DataError(f"{where}.content is {content!r:.60}, expected a text or a list of parts")
    listed = [content] if isinstance(content, str) else content
    read = [_read_part(part, f"{where}.content[{number}]") for number, part in enumerate(listed)]
    media = [part for part in read if isinstance(part, _Part)]
    if media and role != "user":
        raise DataError(f"{media[0].where} is a medium, which only a user's message may have")
    return ChatMessage(role, "\n".join(part for part in read if isinstance(part, str) and part)), media


def _read_part(part: Any, where: str) -> str | _Part:
    """One part of a message's content: a text, or a medium."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise DataError(f"{where} is {part!r:.60}, expected an object with a type")
    form = part.get("type") or next((name for name in (*_MODALITIES, "text") if name in part), None)
    if form in _TEXTS:
        if not isinstance(part.get("text"), str):
            raise DataError(f"{where}.text is {part.get('text')!r:.60}, expected a text")
        return part["text"]
    if not isinstance(form, str) or form not in _MODALITIES:
        raise DataError(f"{where}.type is {form!r:.60}, expected one of {', '.join(('text', *_MODALITIES))}")
    given = part.get(form, part.get("image_url" if form == "input_image" else "input_audio"))
    if isinstance(given, Mapping):
        given = given.get("url", given.get("data"))
    urls = given if isinstance(given, list) else [given]
    if not urls or not all(isinstance(url, str) and url for url in urls):
        raise DataError(f"{where}.{form} is {given!r:.60}, expected a URL")
    if urls[0].startswith(_FRAMES):
        urls = [f"data:image/jpeg;base64,{frame}" for frame in urls[0].removeprefix(_FRAMES).split(",")]
    if form == "input_audio" and urls[0][:5].lower() != "data:":
        urls = [f"data:;base64,{urls[0]}"]
    if len(urls) > 1 and _MODALITIES[form] != "video":
        raise DataError(f"{where}.{form} is a list of {len(urls)} URLs, which only a video may be")
    return _Part(where, _MODALITIES[form], urls, str(part.get("name", "")), part.get("heard"))


def _decoded(rest: str, where: str) -> bytes:
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
    hooks = {"request": [check]}  # called for every redirect too
    timeout = min(10.0, access.seconds)
    try:
        with (
            httpx.Client(event_hooks=hooks, follow_redirects=True, timeout=timeout, trust_env=False) as client,
            client.stream("GET", url) as response,
        ):
            response.raise_for_status()
            for block in response.iter_bytes():
                content += block
                if len(content) > access.max_bytes:
                    break
                if time.monotonic() > end:
                    raise MediaError(where, f"fetching took longer than {access.seconds:g} s")
    except httpx.HTTPStatusError as error:
        raise MediaError(where, f"the host answers with status {error.response.status_code}") from None
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        raise MediaError(where, f"the URL cannot be fetched ({type(error).__name__})") from error
    return bytes(content)


def _record(message: ChatMessage, folder: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for medium, after in pairwise([*message.media, None]):
        if medium is None or medium.track:
            continue
        urls = _urls(medium, folder)
        form = "video" if len(urls) > 1 else f"{medium.modality}_url"
        part: dict[str, Any] = {"type": form, form: urls if form == "video" else {"url": urls[0]}, "name": medium.name}
        if medium.modality == "video":
            part["heard"] = after is not None and after.track
        parts.append(part)
    content = [*parts, {"type": "text", "text": message.text}] if parts else message.text
    return {"role": message.role, "content": content}


def _urls(medium: Medium, folder: str) -> list[str]:
    """The URL that stores a medium, or those of its frames: arrays are stored as PNG or WAV files."""
    content, rate = rated(medium.content)
    if isinstance(content, (str, os.PathLike)):
        path = os.path.abspath(os.fspath(content))
        if folder and Path(path).is_relative_to(folder):
            path = os.path.relpath(path, folder)
        return [f"file:{urllib.parse.quote(path)}"]
    if is_file(content):
        return [data_url(bytes(content))]
    if medium.modality != "audio":
        frames = content if medium.modality == "video" else [content]
        return [png_url(Image.fromarray(open_image(frame))) for frame in frames]
    import soundfile

    file, rate = io.BytesIO(), rate or _RATE
    soundfile.write(file, open_audio(content, rate), rate, format="WAV", subtype="FLOAT")
    return [data_url(file.getvalue())]
