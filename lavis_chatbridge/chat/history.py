"""What was said in a conversation, and its file: JSON that holds the turns, and media by path or as bytes.

It knows no model and no template.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from lavis_chatbridge.chat.media import Medium
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.files import PRIVATE, write_text
from lavis_chatbridge.media.audio import rated
from lavis_chatbridge.media.image import upright
from lavis_chatbridge.media.source import media_errors
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.prompting.pieces import MODALITIES, Modality

FORMAT, VERSION = "chatbridge-chat", 1


@dataclass(frozen=True)
class ChatTurn:
    """One turn.

    Args:
        role: ``"user"`` or ``"assistant"``.
        text: What was said.
        media: What a user's turn brought.
        ids: The tokens in which a reply was made, its end included; none if they are not known.
    """

    role: str
    text: str
    media: tuple[Medium, ...] = ()
    ids: tuple[int, ...] | None = None

    @property
    def kinds(self) -> tuple[Modality, ...]:
        """The kinds of the media that reached the model, in order."""
        return tuple(medium.kind for medium in self.media if medium.reached)

    @property
    def message(self) -> Message:
        """What a template words."""
        return Message(self.role, self.text, self.kinds, self.ids)


def write(path: str | Path, turns: Sequence[ChatTurn], settings: Mapping[str, Any]) -> None:
    """Write a conversation: the file appears whole or not at all.

    Files under the folder of ``path`` are named relative to it; media that came as bytes, arrays or Pillow images are
    stored inside.

    Raises:
        DataError: If it cannot be written.
        MediaError: If a Pillow image can no longer be read.
    """
    target = Path(path)
    try:
        folder = os.path.abspath(target.parent)
        content = {
            "format": FORMAT,
            "version": VERSION,
            **settings,
            "turns": [_turn_record(turn, folder) for turn in turns],
        }
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        write_text(target, text, mode=PRIVATE)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error


def read(path: str | Path) -> tuple[list[ChatTurn], dict[str, Any]]:
    """The turns of a conversation and the settings that were written with them.

    Raises:
        DataError: If the file cannot be read, or is no conversation.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path}: is no conversation of ChatBridge (it has no format {FORMAT!r})")
    if content.get("version") != VERSION:
        raise DataError(f"{path}: version {content.get('version')!r:.80} of the format, expected {VERSION}")
    folder = os.path.abspath(Path(path).parent)
    try:
        turns = [_turn(record, folder) for record in content["turns"]]
    except (KeyError, TypeError, ValueError, EOFError, AttributeError, MemoryError, OverflowError, TokenError) as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(f"{path}: damaged: {cause}") from error
    settings = {key: value for key, value in content.items() if key not in ("format", "version", "turns")}
    return turns, settings


def _turn_record(turn: ChatTurn, folder: str) -> dict[str, Any]:
    record: dict[str, Any] = {"role": turn.role, "text": turn.text}
    if turn.media:
        record["media"] = [_medium_record(medium, folder) for medium in turn.media]
    if turn.ids is not None:
        record["tokens"] = list(turn.ids)
    return record


def _turn(record: Mapping[str, Any], folder: str) -> ChatTurn:
    role, text = record["role"], record["text"]
    if role not in ("user", "assistant") or not isinstance(text, str):
        raise ValueError(f"a turn of role {role!r:.80} with text {text!r:.80}")
    tokens = record.get("tokens")
    ids = None if tokens is None else tuple(int(token) for token in tokens)
    media = [_medium(medium, folder) for medium in record.get("media", ())]
    for i, medium in enumerate(media):
        if medium.track:
            if not i or media[i - 1].kind != "video":
                raise ValueError("a sound track that follows no video")
            medium.source = media[i - 1].source
    return ChatTurn(role, text, tuple(media), ids)


def _medium_record(medium: Medium, folder: str) -> dict[str, Any]:
    record: dict[str, Any] = {"type": medium.kind, "name": medium.name}
    if medium.track:
        return record | {"track": True}  # of the video before it, which holds the source
    source, rate = rated(medium.source)
    if isinstance(source, (str, os.PathLike)):
        path = os.path.abspath(os.fspath(source))
        inside = os.path.commonpath([path, folder]) == folder if _same_drive(path, folder) else False
        return record | {"path": os.path.relpath(path, folder) if inside else path}
    if isinstance(source, (bytes, bytearray, memoryview)):
        return record | {"bytes": _packed(bytes(source))}
    file = io.BytesIO()
    if isinstance(source, np.ndarray):
        np.save(file, source, allow_pickle=False)
        return record | {"array": _packed(file.getvalue())} | ({} if rate is None else {"rate": rate})
    return record | {"bytes": _packed(_picture_file(source, animated=medium.kind == "video"))}


def _medium(record: Mapping[str, Any], folder: str) -> Medium:
    kind = record["type"]
    if kind not in MODALITIES:
        raise ValueError(f"a medium of type {kind!r}")
    name = str(record.get("name", ""))
    if record.get("track"):
        return Medium(kind, b"", track=True, name=name)
    if "path" in record:
        return Medium(kind, os.path.join(folder, record["path"]), name=name)
    if "bytes" in record:
        return Medium(kind, base64.b64decode(record["bytes"], validate=True), name=name)
    array = np.load(io.BytesIO(base64.b64decode(record["array"], validate=True)), allow_pickle=False)
    return Medium(kind, (array, record["rate"]) if "rate" in record else array, name=name)


def _picture_file(image: Any, animated: bool) -> bytes:
    """A Pillow image of any mode as a file that opens to what the model was shown of it.

    As pixels, since a PNG has no CMYK and need not keep an orientation. Several frames make a TIFF: in an animated PNG,
    Pillow joins those that are alike.
    """
    file = io.BytesIO()
    with media_errors(image):
        shown = image.tell()
        try:
            frames = _frames(image) if animated else [upright(image)]
        finally:
            image.seek(shown)
        if len(frames) == 1:
            frames[0].save(file, "PNG")
        else:
            frames[0].save(file, "TIFF", save_all=True, append_images=frames[1:], compression="tiff_adobe_deflate")
    return file.getvalue()


def _frames(image: Any) -> list[Any]:
    """All frames of a Pillow image, in one mode."""
    frames = []
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        frames.append(upright(image.copy()))
    transparent = any(frame.mode == "RGBA" for frame in frames)
    return [frame.convert("RGBA") for frame in frames] if transparent else frames


def _packed(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _same_drive(path: str, folder: str) -> bool:
    return os.path.splitdrive(path)[0] == os.path.splitdrive(folder)[0]
