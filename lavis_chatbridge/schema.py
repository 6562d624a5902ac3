"""The one form of a sample: media, captions or turns, and what is known about them; and the JSONL that holds it.

A line of JSONL is one object. Text in it is plain text: ``<image>`` inside a caption or question stays five letters
between angle brackets, because media are named in ``media`` and nowhere else. This module opens no medium.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from lavis_chatbridge.config import shown
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.files import atomic_text
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.prompting.pieces import MODALITIES, Modality

SCHEMA_VERSION = 1
_KEYS = frozenset(
    ("id", "source", "media", "captions", "turns", "answers", "style", "task", "facts", "held_out", "meta")
)
_COMMON = frozenset(("id", "source", "media", "captions", "turns", "task"))
_ROLES = ("user", "assistant")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_DEEPEST, _MOST_MEDIA = 32, 1000


@dataclass(frozen=True)
class Medium:
    """One medium of a sample.

    Args:
        kind: ``"image"``, ``"video"`` or ``"audio"``. A video file named as ``"audio"`` means its audio track.
        path: The file, under the media root unless the data set allows others; empty where words stand in.
        offset: Where the medium begins inside ``path``, in bytes, when it lies inside an uncompressed tar shard.
        size: How many bytes it has there.
        words: Descriptions that stand in the place of a medium which is not there; training draws one of them. That is
            how a sample speaks of two media although it shows only one.
    """

    kind: Modality
    path: str = ""
    offset: int | None = None
    size: int | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One sample of any data set.

    Args:
        id: Unique within its source.
        media: In the order in which the turns bring them.
        captions: What the media show or sound like, one or several wordings of it.
        turns: A conversation, ``user`` first.
        answers: Accepted answers to the last question, where a data set has several (VQAv2 has ten).
        source: The data set it comes from.
        style: The wanted answer style, a key of the task's style words (``"short"``, ``"sentence"``).
        task: The task, which selects the instruction templates.
        facts: Attribute to value: what is true about the media, for scores that need no wording.
        held_out: Its combination of facts is kept from training.
        meta: Anything else that a data set wants to carry along.
    """

    id: str
    media: tuple[Medium, ...] = ()
    captions: tuple[str, ...] = ()
    turns: tuple[Message, ...] = ()
    answers: tuple[str, ...] = ()
    source: str = ""
    style: str = ""
    task: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    held_out: bool = False
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[Modality, ...]:
        """The kinds of the media, in order; those that words stand for included."""
        return tuple(medium.kind for medium in self.media)

    @property
    def files(self) -> tuple[Medium, ...]:
        """The media that are files, in order: all but those that words stand for."""
        return tuple(medium for medium in self.media if not medium.words)

    @property
    def modality(self) -> str:
        """Which kinds of files occur, in a fixed order: ``"image"``, ``"video+audio"``; ``"text"`` without files."""
        kinds = [medium.kind for medium in self.media if not medium.words]
        return kinds[0] if len(kinds) == 1 else "+".join(kind for kind in MODALITIES if kind in kinds) or "text"


def read_jsonl(path: str | Path, root: str | Path | None = None, allow_outside: bool = False) -> Iterator[Sample]:
    """The samples of a JSONL file, in order; empty lines are passed over.

    Args:
        path: The file, UTF-8.
        root: The folder that media paths are relative to; without it the file's own folder.
        allow_outside: Accept absolute paths and paths that climb out of the root.

    Raises:
        DataError: With ``file:line`` and what is wrong there.
    """
    base = str(root) if root is not None else (os.path.dirname(str(path)) or ".")
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield parse_line(line, f"{path}:{number}", base, allow_outside)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start} of a block: {error.reason}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def write_jsonl(path: str | Path, samples: Iterable[Sample], root: str | Path | None = None) -> int:
    """Write samples, atomically: the file appears whole or not at all.

    Args:
        path: The file; its folder is made where missing.
        samples: What to write.
        root: Media under this folder are written relative to it; without it the file's own folder.

    Returns:
        How many were written.
    """
    target = Path(path)
    base = os.path.abspath(root if root is not None else target.parent)
    count = 0
    with atomic_text(target) as out:
        for sample in samples:
            out.write(json.dumps(to_record(sample, base), ensure_ascii=False) + "\n")
            count += 1
    return count


def parse_line(line: str | bytes, where: str, root: str, allow_outside: bool = False) -> Sample:
    """One line of JSONL as a sample; ``where`` opens the message of a `DataError`."""
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise DataError(f"{where}: not JSON: too many brackets inside one another") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise DataError(f"{where}: not JSON: {error}") from error
    if _SURROGATE.search(line if isinstance(line, bytes) else line.encode("utf-8", "replace")):
        _check_unicode(record, where)
    return parse_record(record, where, root, allow_outside)


def media_path(path: Any, root: str, where: str, allow_outside: bool = False) -> str:
    """A medium's path as annotations name it, under the root. All annotations' paths come through here.

    Args:
        path: A path relative to the root.
        root: The media root.
        where: Its place, for messages.
        allow_outside: Accept absolute paths and paths that climb out of the root.

    Raises:
        DataError: If it is no path (an address, for one), or leads out of the root. Links are followed when a medium is
            opened: see `check_inside`.
    """
    if not isinstance(path, str) or not path:
        raise DataError(f"{where}: path is {_short(path)}, expected a file's path")
    if "\0" in path:
        raise DataError(f"{where}: path holds a NUL character")
    if _ADDRESS.match(path):
        raise DataError(f"{where}: {_short(path)} is an address, expected the path of a file that is there")
    if not allow_outside and (os.path.isabs(path) or ".." in path.replace("\\", "/").split("/")):
        raise DataError(
            f"{where}: {_short(path)} leaves the media root {root}; use a path under it, or set allow_outside: true"
        )
    return os.path.join(root, path)


def parse_record(record: Any, where: str, root: str, allow_outside: bool = False) -> Sample:
    """A decoded object as a sample.

    Raises:
        DataError: With ``where`` and what is wrong.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object, found {_short(record)}")
    if not _KEYS.issuperset(record):
        raise DataError(f"{where}: {_unknown(next(key for key in record if key not in _KEYS))}")
    items = _typed(record, "media", list, [], where)
    if len(items) > _MOST_MEDIA:
        raise DataError(f"{where}: media holds {len(items)} entries, expected at most {_MOST_MEDIA}")
    media = [_medium(item, f"{where}: media[{i}]", root, allow_outside) for i, item in enumerate(items)]
    turns, order = _turns(record, media, where)
    captions = _strings(record, "captions", where)
    if not captions and not turns:
        raise DataError(f"{where}: has neither 'captions' (alignment) nor 'turns' (instructions)")
    return Sample(
        id=_id(record, where),
        media=tuple(media[i] for i in order),
        captions=captions,
        turns=turns,
        source=_string(record, "source", where),
        task=_string(record, "task", where),
        **({} if _COMMON.issuperset(record) else _rarer(record, where)),
    )


def to_record(sample: Sample, root: str = "") -> dict[str, Any]:
    """A sample as the object that JSONL holds; empty fields are left out."""
    record: dict[str, Any] = {"id": sample.id}
    if sample.source:
        record["source"] = sample.source
    if sample.media:
        record["media"] = [_medium_record(medium, root) for medium in sample.media]
    if sample.captions:
        record["captions"] = list(sample.captions)
    if sample.turns:
        record["turns"] = []
        used = 0
        for turn in sample.turns:
            entry: dict[str, Any] = {"role": turn.role, "text": turn.text}
            if turn.media:
                entry["media"] = list(range(used, used + len(turn.media)))
                used += len(turn.media)
            record["turns"].append(entry)
    for key in ("answers", "style", "task", "facts", "held_out", "meta"):
        value = getattr(sample, key)
        if value:
            record[key] = list(value) if key == "answers" else dict(value) if isinstance(value, Mapping) else value
    return record


def check_inside(path: str, root: str) -> None:
    """Refuse a path whose symbolic links lead out of ``root``.

    A folder directly under the root may be a link itself, to a data set on another disk; what lies in it may not lead
    out of that folder.

    Raises:
        DataError: If they do.
    """
    try:
        real, base = os.path.realpath(path), os.path.realpath(root)
    except ValueError as error:  # NUL, or half a character
        raise DataError(f"{path!r}: is no path: {error}") from error
    if os.path.commonpath([real, base]) == base:
        return
    folder = os.path.relpath(os.path.abspath(path), os.path.abspath(root)).split(os.sep)[0]
    linked = os.path.join(root, folder)
    if not os.path.isdir(linked) or os.path.commonpath([real, os.path.realpath(linked)]) != os.path.realpath(linked):
        raise DataError(f"{path}: leads out of the media root {root} to {real}; allow_outside: true accepts that")


def _rarer(record: dict, where: str) -> dict[str, Any]:
    """The fields that few samples have: not looking for them is what makes a million lines quick to read."""
    return {
        "answers": _strings(record, "answers", where),
        "style": _string(record, "style", where),
        "facts": _facts(record, where),
        "held_out": _typed(record, "held_out", bool, False, where),
        "meta": _shallow(_typed(record, "meta", dict, {}, where), where),
    }


def _shallow(meta: dict, where: str) -> dict:
    """``meta``, whose depth is bounded: what writes it again calls itself for each level."""
    level: list[Any] = [meta]
    for _ in range(_DEEPEST):
        held = [value.values() if isinstance(value, dict) else value for value in level]
        level = [item for values in held for item in values if isinstance(item, (dict, list))]
        if not level:
            return meta
    raise DataError(f"{where}: meta holds objects or lists more than {_DEEPEST} deep")


def _check_unicode(record: Any, where: str) -> None:
    """Refuse halves of characters, which JSON can spell and no file or tokenizer can hold."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise DataError(f"{where}: holds half a character (a lone surrogate such as \\ud800)") from error


def _medium(item: Any, where: str, root: str, allow_outside: bool) -> Medium:
    if not isinstance(item, dict):
        raise DataError(f'{where}: expected {{"type": ..., "path": ...}}, found {_short(item)}')
    kind, path = item.get("type"), item.get("path")
    if kind not in MODALITIES:
        raise DataError(f"{where}: type is {_short(kind)}, expected one of {', '.join(MODALITIES)}")
    if "words" in item:
        return _in_words(item, cast(Modality, kind), where)
    place = media_path(path, root, where, allow_outside)
    for key in ("offset", "size"):
        value = item.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise DataError(f"{where}: {key} is {_short(value)}, expected a number of bytes")
    if (item.get("offset") is None) != (item.get("size") is None):
        raise DataError(f"{where}: a medium inside a file needs offset and size, found one of them")
    unknown = set(item) - {"type", "path", "offset", "size"}
    if unknown:
        raise DataError(f"{where}: unknown key {_short(sorted(unknown)[0])}; known are type, path, offset, size")
    return Medium(cast(Modality, kind), place, item.get("offset"), item.get("size"))


def _in_words(item: dict, kind: Modality, where: str) -> Medium:
    """A medium that words stand for."""
    words = item["words"]
    if not isinstance(words, list) or not words or not all(isinstance(text, str) and text for text in words):
        raise DataError(f"{where}: words is {_short(words)}, expected a list of descriptions")
    unknown = set(item) - {"type", "words"}
    if unknown:
        raise DataError(f"{where}: {_short(sorted(unknown)[0])} beside words: a medium is a file or words, not both")
    return Medium(kind, words=tuple(words))


def _medium_record(medium: Medium, root: str) -> dict[str, Any]:
    if medium.words:
        return {"type": medium.kind, "words": list(medium.words)}
    path = medium.path
    if root:
        relative = os.path.relpath(os.path.abspath(path), root)
        path = os.path.abspath(path) if relative.startswith("..") else relative
    record: dict[str, Any] = {"type": medium.kind, "path": path}
    if medium.offset is not None:
        record |= {"offset": medium.offset, "size": medium.size}
    return record


def _turns(record: dict, media: list[Medium], where: str) -> tuple[tuple[Message, ...], list[int]]:
    """The turns, and the media's indices in the order in which the turns bring them."""
    items = list(_list(record, "turns", where))
    every = list(range(len(media)))
    if not items:
        return (), every
    placed = any(isinstance(item, dict) and "media" in item for _, item in items)
    order: list[int] = []
    turns = []
    for position, item in items:
        spot = f"{where}: turns[{position}]"
        if not isinstance(item, dict):
            raise DataError(f"{spot}: expected an object, found {_short(item)}")
        unknown = set(item) - {"role", "text", "media"}
        if unknown:
            raise DataError(f"{spot}: unknown key {_short(sorted(unknown)[0])}; known are role, text, media")
        if item.get("role") != _ROLES[position % 2]:
            raise DataError(
                f"{spot}: role is {_short(item.get('role'))}, expected {_ROLES[position % 2]!r}: turns alternate, "
                "user first"
            )
        if not isinstance(item.get("text"), str):
            raise DataError(f"{spot}: text is {_short(item.get('text'))}, expected a string")
        brought = _brought(item, len(media), spot) if placed else (every if position == 0 else [])
        order += brought
        turns.append(Message(item["role"], item["text"], tuple(media[i].kind for i in brought)))
    if sorted(order) != every:
        fault = "two turns bring the same medium" if len(order) > len(set(order)) else "a medium belongs to no turn"
        raise DataError(f"{where}: {fault}: there are {len(media)} media, the turns name {_short(order)}")
    return tuple(turns), order


def _brought(item: dict, count: int, where: str) -> list[int]:
    indices = item.get("media", [])
    if not isinstance(indices, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in indices):
        raise DataError(f"{where}: media is {_short(indices)}, expected a list of positions such as [0]")
    for index in indices:
        if not 0 <= index < count:
            raise DataError(f"{where}: media names {index}, but the sample has {count} media (counted from 0)")
    if indices and item["role"] == "assistant":
        raise DataError(f"{where}: an assistant's turn brings no media")
    return indices


def _id(record: dict, where: str) -> str:
    value = record.get("id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: id is {_short(value)}, expected a string or a whole number")
    return value


def _facts(record: dict, where: str) -> dict[str, str]:
    facts = _typed(record, "facts", dict, {}, where)
    for name, value in facts.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: facts.{name[:60]} is {_short(value)}, expected a string")
    return facts


def _list(record: dict, key: str, where: str) -> Iterable[tuple[int, Any]]:
    return enumerate(_typed(record, key, list, [], where))


def _strings(record: dict, key: str, where: str) -> tuple[str, ...]:
    values = _typed(record, key, list, [], where)
    for value in values:
        if not isinstance(value, str):
            raise DataError(f"{where}: {key} holds {_short(value)}, expected strings")
    return tuple(values)


def _string(record: dict, key: str, where: str) -> str:
    return _typed(record, key, str, "", where)


def _typed(record: dict, key: str, kind: type, default: Any, where: str) -> Any:
    value = record.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        names = {list: "a list", dict: "an object", str: "a string", bool: "true or false"}
        raise DataError(f"{where}: {key} is {_short(value)}, expected {names[kind]}")
    return value


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key[:60], _KEYS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "fields of your own belong under 'meta'"
    return f"unknown key {_short(key)}, {hint}"


def _short(value: Any) -> str:
    text = shown(value)
    return text if len(text) <= 60 else text[:57] + "..."
