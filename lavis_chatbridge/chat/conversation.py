"""A conversation as plain data, and its form as OpenAI's chat messages, which clients send and files hold.

It knows no model and no template.
"""

from __future__ import annotations

import io
import json
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from lavis_chatbridge.chat.urls import Access, data_url, open_url
from lavis_chatbridge.errors import DataError, MediaError, PromptError
from lavis_chatbridge.files import PRIVATE, write_text
from lavis_chatbridge.media.audio import open_audio, rated
from lavis_chatbridge.media.image import open_image
from lavis_chatbridge.media.source import Sound, is_file
from lavis_chatbridge.prompting.conversation import Message, Modality

if TYPE_CHECKING:
    from lavis_chatbridge.chat.reader import Perceived

Content: TypeAlias = Sound
"""A path, the bytes of a file, an array, or samples with their rate in Hz."""

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
_RATE = 16_000  # of a sound that is a bare array


@dataclass(eq=False)
class Medium:
    """A medium of a message.

    Attributes:
        name: Shown to users.
        track: It is the sound track of the video before it, and may be missing.
        perceived: Its soft tokens, once the model has seen it.
    """

    modality: Modality
    content: Content
    name: str = ""
    track: bool = False
    perceived: Perceived | None = field(default=None, repr=False)

    @property
    def reached(self) -> bool:
        """Whether the model gets it."""
        return self.perceived is not None and self.perceived.soft is not None

    def with_track(self, heard: bool) -> list[Medium]:
        """The medium and, if it is a video that is ``heard``, its sound track; arrays have none."""
        if self.modality != "video" or not heard or isinstance(self.content, np.ndarray):
            return [self]
        return [self, Medium("audio", self.content, f"{self.name}'s sound track", track=True)]


@dataclass(frozen=True)
class ChatMessage:
    """A message of ``"user"`` or ``"assistant"``; ``ids`` are those of a generated reply, its end included."""

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
        """A copy with one more message of the user.

        Raises:
            PromptError: If there are neither words nor media.
        """
        if not text.strip() and not media:
            raise PromptError("the question is empty, and there is no medium to speak about")
        return replace(self, messages=[*self.messages, ChatMessage("user", text, tuple(media))])

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

    def save(self, path: str | Path) -> None:
        """Write the conversation as JSON. Files keep their path, other media are stored inside.

        Raises:
            DataError: If the file cannot be written.
        """
        try:
            write_text(Path(path), self.to_json(os.path.abspath(Path(path).parent)), mode=PRIVATE)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error

    @staticmethod
    def load(path: str | Path) -> Conversation:
        """A saved conversation.

        Raises:
            DataError: If the file cannot be read or holds no conversation.
        """
        try:
            records = json.loads(Path(path).read_text(encoding="utf-8"))["messages"]
            return read_messages(records, Access(own_folder=Path(path).parent))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, LookupError, TypeError, RecursionError, MediaError) as error:
            raise DataError(f"{path} holds no conversation: {' '.join(str(error).split())[:300]}") from error

    def to_json(self, folder: str = "") -> str:
        """The conversation as OpenAI's messages; files below ``folder`` get paths relative to it."""
        records = [{"role": "system", "content": self.system}] if self.system else []
        records += [_record(message, folder) for message in self.messages]
        return json.dumps({"messages": records}, ensure_ascii=False, indent=1) + "\n"


def read_messages(
    records: Sequence[Any], access: Access, hear_videos: bool = True, most_media: int | None = None
) -> Conversation:
    """Read messages in OpenAI's form; docs/server.md has the parts that a message may have.

    System messages at the start become the system prompt, later ones a part of the next user's message. Roles then
    alternate, see `Conversation.add`.

    Args:
        records: The messages.
        access: Which URLs may be opened.
        hear_videos: A video is followed by its sound track, unless its part says ``"heard": false``.
        most_media: Refuse messages with more media, before any is opened.

    Raises:
        DataError: If a message has another form. Its first word is the position, as ``messages[0].content[1]``.
        MediaError: If a URL cannot be opened. Its ``source`` is the position.
    """
    read = [_read(record, f"messages[{number}]") for number, record in enumerate(records)]
    brought = sum(len(attachment.urls) for _, attachments in read for attachment in attachments)
    if most_media is not None and brought > most_media:
        raise DataError(f"messages bring {brought} media, the limit is {most_media}")
    result, late = Conversation(), list[str]()
    for message, attachments in read:
        if message.role in ("system", "developer"):
            if result.messages:
                late.append(message.text)
            else:
                result.system = "\n".join(filter(None, (result.system, message.text)))
            continue
        if message.role == "user" and late:
            message, late = replace(message, text="\n".join(filter(None, (*late, message.text)))), []
        media = tuple(medium for attachment in attachments for medium in attachment.open(access, hear_videos))
        result.add(replace(message, media=media))
    if late:
        result.add(ChatMessage("user", "\n".join(late)))
    return result


class _Attachment(NamedTuple):
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


def _read(record: Any, where: str) -> tuple[ChatMessage, list[_Attachment]]:
    """A message without its media, and these."""
    role = record.get("role") if isinstance(record, Mapping) else record
    if role not in ROLES:
        raise DataError(f"{where}.role is {role!r:.60}, expected {', '.join(ROLES)}")
    content = record.get("content")
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, (str, list)):
        raise DataError(f"{where}.content is {content!r:.60}, expected a text or a list of parts")
    listed = [content] if isinstance(content, str) else content
    parts = [_read_part(part, f"{where}.content[{number}]") for number, part in enumerate(listed)]
    attachments = [part for part in parts if isinstance(part, _Attachment)]
    if attachments and role != "user":
        raise DataError(f"{attachments[0].where} is a medium, which only a user's message may have")
    return ChatMessage(role, "\n".join(part for part in parts if isinstance(part, str) and part)), attachments


def _read_part(part: Any, where: str) -> str | _Attachment:
    """One part of a message's content: a text, or a medium."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise DataError(f"{where} is {part!r:.60}, expected an object with a type")
    form = part.get("type") or next((name for name in (*_TYPES, "text") if name in part), None)
    if form in _TEXT_TYPES:
        if not isinstance(part.get("text"), str):
            raise DataError(f"{where}.text is {part.get('text')!r:.60}, expected a text")
        return part["text"]
    if not isinstance(form, str) or form not in _TYPES:
        raise DataError(f"{where}.type is {form!r:.60}, expected one of {', '.join(('text', *_TYPES))}")
    held = part.get(form, part.get("image_url" if form == "input_image" else "input_audio"))
    if isinstance(held, Mapping):
        held = held.get("url", held.get("data"))
    urls = held if isinstance(held, list) else [held]
    if not urls or not all(isinstance(url, str) and url for url in urls):
        raise DataError(f"{where}.{form} is {held!r:.60}, expected a URL")
    if urls[0].startswith(_FRAMES):
        urls = [f"data:image/jpeg;base64,{frame}" for frame in urls[0].removeprefix(_FRAMES).split(",")]
    if form == "input_audio" and urls[0][:5].lower() != "data:":
        urls = [f"data:;base64,{urls[0]}"]
    if len(urls) > 1 and _TYPES[form] != "video":
        raise DataError(f"{where}.{form} is a list of {len(urls)} URLs, which only a video may be")
    return _Attachment(where, _TYPES[form], urls, str(part.get("name", "")), part.get("heard"))


def _record(message: ChatMessage, folder: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for medium, after in pairwise([*message.media, None]):
        if medium is None or medium.track:
            continue
        urls = _urls(medium, folder)
        form = "video" if len(urls) > 1 else f"{medium.modality}_url"
        part: dict[str, Any] = {"type": form, form: urls if form == "video" else {"url": urls[0]}, "name": medium.name}
        parts.append(part | ({"heard": after is not None and after.track} if medium.modality == "video" else {}))
    content = [*parts, {"type": "text", "text": message.text}] if parts else message.text
    return {"role": message.role, "content": content}


def _urls(medium: Medium, folder: str) -> list[str]:
    """The URL that stores a medium, or those of its frames: arrays are stored as PNG or WAV files."""
    content, rate = rated(medium.content)
    if not is_file(content):
        if medium.modality == "audio":
            import soundfile

            file, own_rate = io.BytesIO(), rate or _RATE
            soundfile.write(file, open_audio(content, own_rate), own_rate, format="WAV", subtype="FLOAT")
            return [data_url(file.getvalue())]
        return [data_url(_png(frame)) for frame in (content if medium.modality == "video" else [content])]
    if isinstance(content, (str, os.PathLike)):
        path = os.path.abspath(os.fspath(content))
        if folder and Path(path).is_relative_to(folder):
            path = os.path.relpath(path, folder)
        return [f"file:{urllib.parse.quote(path)}"]
    return [data_url(bytes(content))]


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(open_image(pixels)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def frames_of(images: Sequence[Any]) -> np.ndarray:
    """``[T, H, W, 3]``: images as the frames of a video, in the size of the first.

    Raises:
        MediaError: If one cannot be opened.
    """
    frames = [Image.fromarray(open_image(image)) for image in images]
    return np.stack([np.asarray(frame.resize(frames[0].size)) for frame in frames])
