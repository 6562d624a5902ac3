"""A conversation as plain data, and its form as JSON: the messages of OpenAI's chat completions.

It knows no model and no template.
"""

from __future__ import annotations

import base64
import io
import json
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from lavis_chatbridge.chat.sources import ANY_FILE, Access, open_url
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.files import PRIVATE, write_text
from lavis_chatbridge.media.audio import rated
from lavis_chatbridge.media.image import open_image, upright
from lavis_chatbridge.media.source import Sound, media_errors
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.prompting.pieces import Modality

if TYPE_CHECKING:
    from lavis_chatbridge.chat.media import Perceived

FORMAT, VERSION = "chatbridge-chat", 2
ROLES = ("system", "developer", "user", "assistant")
_TYPES: dict[str, Modality] = {
    "image_url": "image",
    "input_image": "image",
    "video_url": "video",
    "video": "video",
    "audio_url": "audio",
    "input_audio": "audio",
}
_TEXT_TYPES = ("text", "input_text", "output_text")
_FRAMES = "data:video/jpeg;base64,"
"""vLLM's URL of a video: frames behind it, separated by commas."""
_NUMPY = "data:application/x-npy;base64,"


@dataclass(eq=False)
class Medium:
    """A medium of a message.

    Args:
        modality: ``"image"``, ``"video"`` or ``"audio"``.
        source: A path, the bytes of a file, an array, samples with their rate in Hz, a Pillow image (which becomes the
            bytes of a file), or a list of images (which becomes an array, ``[T, H, W, 3]``).
        name: Shown to users; made from the source if empty.
        track: It is the sound track of the video before it, and may be missing.
        perceived: Its soft tokens, once the model has seen it.
    """

    modality: Modality
    source: Sound | list[Any]
    name: str = ""
    track: bool = False
    perceived: Perceived | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.name:
            self.name = f"{_name(self.source)}'s sound track" if self.track else _name(self.source)
        if isinstance(self.source, Image.Image):
            self.source = _picture_file(self.source, animated=self.modality == "video")
        elif isinstance(self.source, list):
            frames = [Image.fromarray(open_image(frame)) for frame in self.source]
            self.source = np.stack([np.asarray(frame.resize(frames[0].size)) for frame in frames])

    @property
    def reached(self) -> bool:
        """Whether the model gets it."""
        return self.perceived is not None and self.perceived.soft is not None


@dataclass(frozen=True)
class ChatMessage:
    """What one side said, with the media themselves.

    Args:
        role: ``"user"`` or ``"assistant"``.
        text: The words.
        media: Media of a user's message.
        ids: Token ids of a generated reply, its end included; None if they are unknown.
    """

    role: str
    text: str
    media: tuple[Medium, ...] = ()
    ids: tuple[int, ...] | None = None

    @property
    def worded(self) -> Message:
        """The message for a template, with those media that reach the model."""
        return Message(self.role, self.text, tuple(m.modality for m in self.media if m.reached), self.ids)


@dataclass
class Conversation:
    """Messages, and the system prompt before them."""

    messages: list[ChatMessage] = field(default_factory=list)
    system: str = ""

    def asking(self, text: str, media: Sequence[Medium] = ()) -> Conversation:
        """A copy with one more message of the user."""
        return replace(self, messages=[*self.messages, ChatMessage("user", text, tuple(media))])

    def save(self, path: str | Path, **settings: str) -> None:
        """Write the conversation as JSON. Files keep their path, other media are stored inside.

        Raises:
            DataError: If the file cannot be written.
            MediaError: If a Pillow image can no longer be read.
        """
        folder = os.path.abspath(Path(path).parent)
        try:
            write_text(Path(path), self.to_json(folder, **settings), mode=PRIVATE)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | Path) -> tuple[Conversation, dict[str, str]]:
        """A saved conversation, and the settings that were saved with it.

        Raises:
            DataError: If the file cannot be read or holds no conversation.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
            raise DataError(f"{path}: not a conversation (expected format {FORMAT!r}, version {VERSION})")
        try:
            read = cls.from_openai(content["messages"], access=Access(folders=ANY_FILE), folder=Path(path).parent)
        except (KeyError, TypeError, DataError, MediaError) as error:
            raise DataError(f"{path}: damaged: {' '.join(str(error).split())[:300]}") from error
        known = ("format", "version", "messages")
        return read, {key: str(value) for key, value in content.items() if key not in known}

    def to_json(self, folder: str = "", **settings: str) -> str:
        """What `save` writes."""
        content = {"format": FORMAT, "version": VERSION, **settings, "messages": self.to_openai(folder)}
        return json.dumps(content, ensure_ascii=False, indent=1) + "\n"

    def to_openai(self, folder: str = "") -> list[dict[str, Any]]:
        """The messages in OpenAI's form; files below ``folder`` get paths relative to it."""
        front = [{"role": "system", "content": self.system}] if self.system else []
        return [*front, *(_record(message, folder) for message in self.messages)]

    @classmethod
    def from_openai(
        cls,
        messages: Sequence[Mapping[str, Any]],
        *,
        access: Access | None = None,
        folder: Path = Path(),
        hear_videos: bool = True,
        most_media: int | None = None,
    ) -> Conversation:
        """Read messages in OpenAI's form, whose roles then alternate.

        System messages at the start become the system prompt, later ones a part of the next user's message; see `add`.

        Args:
            messages: See docs/chat.md for the parts that a message may have.
            access: Which URLs may be opened; by default ``data:`` only.
            folder: What relative ``file:`` URLs are relative to.
            hear_videos: A video is followed by its sound track, unless its part says ``"heard": false``.
            most_media: Refuse messages with more media, before any is opened.

        Raises:
            DataError: If a message has another form. Its first word is the position, as ``messages[0].content[1]``.
            MediaError: If a URL cannot be opened. Its ``source`` is the position.
        """
        read = [_read(entry, f"messages[{number}]") for number, entry in enumerate(messages)]
        brought = sum(len(part.urls) for _, parts in read for part in parts)
        if most_media is not None and brought > most_media:
            raise DataError(f"messages bring {brought} media, the limit is {most_media}")
        result, late = cls(), list[str]()
        for message, parts in read:
            media = [medium for part in parts for medium in part.open(access or Access(), folder, hear_videos)]
            message = replace(message, media=tuple(media))
            if message.role in ("system", "developer"):
                late.append(message.text)
                if not result.messages:
                    result.system = "\n".join(filter(None, (result.system, late.pop())))
                continue
            if message.role == "user" and late:
                message = replace(message, text="\n".join(filter(None, (*late, message.text))))
                late = []
            result.add(message)
        if late:
            result.add(ChatMessage("user", "\n".join(late)))
        return result

    def add(self, message: ChatMessage) -> None:
        """Add a message; roles alternate: neighbours of one role are joined, and the user begins."""
        last = self.messages[-1] if self.messages else ChatMessage("assistant", "")
        if last.role != message.role:
            self.messages.append(message)
        elif not self.messages:
            self.messages += [ChatMessage("user", ""), message]
        else:
            text = "\n".join(filter(None, (last.text, message.text)))
            self.messages[-1] = ChatMessage(message.role, text, (*last.media, *message.media))


class _Part(NamedTuple):
    """A medium of a message in OpenAI's form; several URLs are the frames of a video."""

    where: str
    modality: Modality
    urls: tuple[str, ...]
    rate: Any
    name: str
    heard: bool | None

    def open(self, access: Access, folder: Path, hear_videos: bool) -> list[Medium]:
        """The medium, and a video's sound track."""
        opened = [self._opened(url, access, folder) for url in self.urls]
        source: Any = opened[0] if len(opened) == 1 else opened
        if isinstance(source, np.ndarray) and isinstance(self.rate, (int, float)):
            source = (source, float(self.rate))
        name = self.name or self.where
        media = [Medium(self.modality, source, name)]
        if self.modality == "video" and (hear_videos if self.heard is None else self.heard) and len(opened) == 1:
            media.append(Medium("audio", source, f"{name}'s sound track", track=True))
        return media

    def _opened(self, url: str, access: Access, folder: Path) -> Path | bytes | np.ndarray:
        content = open_url(url, self.where, access, folder)
        if not url.startswith(_NUMPY) or not isinstance(content, bytes):
            return content
        with media_errors(self.where):
            return np.load(io.BytesIO(content), allow_pickle=False)


def _read_part(part: Any, where: str) -> str | _Part:
    """One part of a message's content: a text, or a medium.

    Raises:
        DataError: If it has no known type.
    """
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise DataError(f"{where} is {part!r:.60}, expected an object with a type")
    kind = part.get("type") or next((name for name in (*_TYPES, "text") if name in part), None)
    if kind in _TEXT_TYPES:
        if not isinstance(part.get("text"), str):
            raise DataError(f"{where}.text is {part.get('text')!r:.60}, expected a text")
        return part["text"]
    if not isinstance(kind, str) or kind not in _TYPES:
        known = ", ".join(("text", *_TYPES))
        raise DataError(f"{where}.type is {kind!r:.60}, expected one of {known}")
    held = part.get(kind, part.get("image_url" if kind == "input_image" else "input_audio"))
    if isinstance(held, Mapping):
        held = held.get("url", held.get("data"))
    urls = tuple(held) if isinstance(held, list) and _TYPES[kind] == "video" else (held,)
    if isinstance(held, str) and held.startswith(_FRAMES) and _TYPES[kind] == "video":
        urls = tuple(f"data:image/jpeg;base64,{frame}" for frame in held.removeprefix(_FRAMES).split(","))
    if kind == "input_audio" and isinstance(held, str) and held[:5].lower() != "data:":
        urls = (f"data:;base64,{held}",)
    if not urls or not all(isinstance(url, str) and url for url in urls):
        raise DataError(f"{where}.{kind} is {held!r:.60}, expected a URL")
    return _Part(where, _TYPES[kind], urls, part.get("rate"), str(part.get("name", "")), part.get("heard"))


def _read(entry: Any, where: str) -> tuple[ChatMessage, list[_Part]]:
    """A message without its media, and these."""
    if not isinstance(entry, Mapping) or entry.get("role") not in ROLES:
        role = entry.get("role") if isinstance(entry, Mapping) else entry
        raise DataError(f"{where}.role is {role!r:.60}, expected {', '.join(ROLES)}")
    role, content = entry["role"], entry.get("content")
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, (str, list)):
        raise DataError(f"{where}.content is {content!r:.60}, expected a text or a list of parts")
    places = enumerate([content] if isinstance(content, str) else content)
    read = [_read_part(part, f"{where}.content[{number}]") for number, part in places]
    media = [part for part in read if isinstance(part, _Part)]
    if media and role != "user":
        raise DataError(f"{media[0].where} is a medium, which only a user's message may have")
    ids = entry.get("tokens")
    known = tuple(ids) if isinstance(ids, list) and all(type(token) is int for token in ids) else None
    return ChatMessage(role, "\n".join(part for part in read if isinstance(part, str) and part), (), known), media


def _record(message: ChatMessage, folder: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for medium, after in pairwise([*message.media, None]):
        if medium is None or medium.track:
            continue
        url, rate = _url(medium, folder)
        key = f"{medium.modality}_url"
        part: dict[str, Any] = {"type": key, key: {"url": url}, "name": medium.name}
        part |= {"rate": rate} if rate is not None else {}
        parts.append(part | ({"heard": after is not None and after.track} if medium.modality == "video" else {}))
    content = [*parts, {"type": "text", "text": message.text}] if parts else message.text
    tokens = {} if message.ids is None else {"tokens": list(message.ids)}
    return {"role": message.role, "content": content, **tokens}


def _url(medium: Medium, folder: str) -> tuple[str, float | None]:
    """The URL that stores a medium, and the sampling rate of an array."""
    source, rate = rated(medium.source)
    if isinstance(source, (str, os.PathLike)):
        path = os.path.abspath(os.fspath(source))
        if folder and Path(path).is_relative_to(folder):
            path = os.path.relpath(path, folder)
        return f"file:{urllib.parse.quote(path)}", None
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"data:;base64,{_packed(bytes(source))}", None
    file = io.BytesIO()
    np.save(file, source, allow_pickle=False)
    return _NUMPY + _packed(file.getvalue()), None if rate is None else float(rate)


def _picture_file(image: Image.Image, animated: bool) -> bytes:
    """A Pillow image of any mode as a file that opens to the same pixels.

    Several frames make a TIFF: Pillow joins equal frames of an animated PNG.
    """
    file = io.BytesIO()
    with media_errors(image):
        shown, frames = image.tell(), []
        try:
            for number in range(getattr(image, "n_frames", 1) if animated else 1):
                if animated:
                    image.seek(number)
                frames.append(upright(image).copy())
        finally:
            image.seek(shown)
        if len(frames) == 1:
            frames[0].save(file, "PNG", compress_level=1)
        else:
            mode = "RGBA" if any(frame.mode == "RGBA" for frame in frames) else "RGB"
            frames = [frame.convert(mode) for frame in frames]
            frames[0].save(file, "TIFF", save_all=True, append_images=frames[1:], compression="tiff_adobe_deflate")
    return file.getvalue()


def _packed(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _name(source: Any) -> str:
    if isinstance(source, tuple) and len(source) == 2:
        return f"{_name(source[0])} at {source[1]} Hz"
    if isinstance(source, (str, os.PathLike)):
        return os.path.basename(os.fspath(source)) or str(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    shape = getattr(source, "shape", None)
    return "picture" if shape is None else f"array {'x'.join(map(str, shape))}"
