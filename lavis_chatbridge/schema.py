"""The schema of samples, and their JSONL files.

A line of JSONL is one object. Media are only in its ``media``: ``<image>`` in a caption or question is plain text.
This module opens no medium.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lavis_chatbridge.config import explained, shown
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.files import atomic_file, atomic_text, hash_of, read_lines
from lavis_chatbridge.prompting.conversation import MODALITIES, Message, Modality

SCHEMA_VERSION = 1
CHARACTERS_PER_TOKEN = 4
TOKENS_PER_MEDIUM = 32
_CACHED_FROM = 1 << 20  # bytes; a smaller file is indexed faster than a stored index is loaded
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Medium:
    """One medium of a sample.

    Args:
        modality: ``"audio"`` with a video file means its audio track.
        path: The file; empty if there are ``words``.
        offset: First byte of the medium inside ``path``, if ``path`` is an uncompressed tar file.
        size: Size in bytes inside ``path``.
        words: Text descriptions that replace the medium; training samples one of them.
    """

    modality: Modality
    path: str = ""
    offset: int | None = None
    size: int | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One sample of any data set.

    Args:
        id: Unique within its file.
        media: In the order of the turns.
        captions: One or several descriptions of the media.
        turns: A conversation; the first turn is the user's.
        answers: All accepted answers to the last question, if there are several (ten in VQAv2).
        source: The data set it comes from, for reports; not the source of a mixture (`datasets.loader`).
        style: The requested answer style, a key of the templates' styles (``"short"``, ``"sentence"``).
        task: The task, which selects the instruction templates.
        facts: Attribute -> value: ground truth about the media, for scores that do not depend on phrasing.
        held_out: Whether its combination of facts is excluded from training.
        meta: Other fields of the data set.
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
    def modalities(self) -> tuple[Modality, ...]:
        """The modality of each medium, in order, also of media that are replaced by ``words``."""
        return modalities_of(self.media)

    @property
    def files(self) -> tuple[Medium, ...]:
        """The media that are files, in order."""
        return tuple(medium for medium in self.media if not medium.words)

    @property
    def modality(self) -> str:
        """The modalities of its files: ``"image"``, ``"video+audio"``; ``"text"`` without files."""
        present = modalities_of(self.files)
        return "+".join(modality for modality in MODALITIES if modality in present) or "text"


def modalities_of(media: Iterable[Medium]) -> tuple[Modality, ...]:
    """The modality of each medium, in order."""
    return tuple(medium.modality for medium in media)


_NotEmpty: TypeAlias = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _MediumRecord(_Strict):
    type: Modality
    path: str | None = None
    offset: Annotated[int, Field(ge=0)] | None = None
    size: Annotated[int, Field(ge=0)] | None = None
    words: list[_NotEmpty] | None = None


class _TurnRecord(_Strict):
    role: Literal["user", "assistant"]
    text: str
    media: list[int] | None = None


class _Record(_Strict):
    id: _NotEmpty | int
    source: str | None = None
    media: list[_MediumRecord] | None = None
    captions: list[str] | None = None
    turns: list[_TurnRecord] | None = None
    answers: list[str] | None = None
    style: str | None = None
    task: str | None = None
    facts: dict[str, str] | None = None
    held_out: bool | None = None
    meta: dict[str, Any] | None = None


class SampleFile(Sequence[Sample]):
    """The samples of one JSONL file: their offsets are in memory, the text stays on disk.

    Opening a file checks every line once, and raises a `DataError` for the first faulty one.

    Args:
        root: The folder that media paths are relative to; by default the file's own.
        allow_outside: Accept media outside the root.
        cache: Folder to store the index of a large file in until the file changes; None does not store it.
        limit: Use only this number of samples.

    Attributes:
        modalities: The modalities that occur, ``"image"``, ``"video+audio"``, ``"text"`` ...
        modality: ``[n]`` uint8, each sample's index in ``modalities``.
        lengths: ``[n]`` uint32, approximate number of tokens of each sample, with 32 per medium.
    """

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        allow_outside: bool = False,
        cache: str | Path | None = None,
        limit: int | None = None,
    ) -> None:
        self.path, self.root, self.allow_outside = str(path), folder_of(path, root), allow_outside
        index = self._index(cache)
        self._starts, self._lines = index["starts"][:limit], index["lines"][:limit]
        self.modality, self.lengths = index["modality"][:limit], index["lengths"][:limit]
        self.modalities = [str(name) for name in index["modalities"]]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices
        start = int(self._starts[index])
        with open(self.path, "rb") as file:
            file.seek(start)
            return parse_line(file.readline(), f"{self.path}:{self._lines[index]}", self.root, self.allow_outside)

    def _index(self, cache: str | Path | None) -> dict[str, np.ndarray]:
        """The arrays of the index, from the cache if possible."""
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error
        if cache is None or status.st_size < _CACHED_FROM:
            return self._scan()
        file_state = (os.path.abspath(self.path), status.st_size, status.st_mtime_ns)
        stored = Path(cache, "indexes", f"{hash_of(SCHEMA_VERSION, *file_state, self.allow_outside)[:24]}.npz")
        if not stored.exists():
            index = self._scan()
            with atomic_file(stored) as temporary, open(temporary, "wb") as file:
                np.savez(file, **index)  # type: ignore[arg-type]
        with np.load(stored) as arrays:
            return dict(arrays)

    def _scan(self) -> dict[str, np.ndarray]:
        index = {"starts": array("Q"), "lines": array("I"), "modality": array("B"), "lengths": array("I")}
        modalities: dict[str, int] = {}
        with open(self.path, "rb") as file:
            position = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
            file.seek(position)
            for number, line in enumerate(file, start=1):
                if line.strip():
                    sample = parse_line(line, f"{self.path}:{number}", self.root, self.allow_outside)
                    modality = modalities.setdefault(sample.modality, len(modalities))
                    values = (position, number, modality, about_tokens(sample))
                    for column, value in zip(index.values(), values, strict=True):
                        column.append(value)
                position += len(line)
        if not modalities:
            raise DataError(f"{self.path}: contains no sample")
        return {name: np.array(column) for name, column in index.items()} | {"modalities": np.array([*modalities])}


def about_tokens(sample: Sample) -> int:
    """Approximate number of tokens of a sample, to group samples of similar length."""
    text = sum(len(turn.text) for turn in sample.turns) or max(map(len, sample.captions), default=0)
    text += sum(max(map(len, medium.words)) for medium in sample.media if medium.words)
    return text // CHARACTERS_PER_TOKEN + TOKENS_PER_MEDIUM * len(sample.files) + 1


def read_jsonl(path: str | Path, root: str | Path | None = None, allow_outside: bool = False) -> Iterator[Sample]:
    """The samples of a JSONL file, in order; arguments and errors as in `SampleFile`."""
    for number, line in read_lines(path):
        if line.strip():
            yield parse_line(line, f"{path}:{number}", folder_of(path, root), allow_outside)


def write_jsonl(path: str | Path, samples: Iterable[Sample], root: str | Path | None = None) -> int:
    """Write samples atomically, and return their number.

    Media paths below ``root`` (by default the file's own folder) are written relative to it.
    """
    base, count = os.path.abspath(folder_of(path, root)), 0
    with atomic_text(Path(path)) as out:
        for count, sample in enumerate(samples, start=1):  # noqa: B007
            out.write(json.dumps(to_record(sample, base), ensure_ascii=False) + "\n")
    return count


def folder_of(path: str | Path, root: str | Path | None = None) -> str:
    """The folder that media paths of an annotation file are relative to."""
    return str(root) if root is not None else (os.path.dirname(str(path)) or ".")


def parse_line(line: str | bytes, where: str, root: str, allow_outside: bool = False) -> Sample:
    """Parse one line of JSONL; ``where`` is the position, for the message of a `DataError`."""
    try:
        record = _Record.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise DataError(f"{where}: not JSON: {first['msg'].removeprefix('Invalid JSON: ')}") from error
        raise DataError(f"{where}: {explained(_Record, json.loads(line), error, 'sample')}") from error
    media = []
    for number, item in enumerate(record.media or ()):
        spot = f"{where}: media[{number}]"
        if item.words and item.path is not None:
            raise DataError(f"{spot}: a medium has either words or a path, found both")
        if (item.offset is None) != (item.size is None):
            raise DataError(f"{spot}: a medium inside a file needs offset and size, found one of them")
        path = "" if item.words else media_path(item.path, root, spot, allow_outside)
        media.append(Medium(item.type, path, item.offset, item.size, tuple(item.words or ())))
    turns, order = _turns(record.turns or (), media, where)
    if not record.captions and not turns:
        raise DataError(f"{where}: has neither 'captions' (alignment) nor 'turns' (instructions)")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in record if value is not None
    }
    values |= {"id": str(record.id), "media": tuple(media[i] for i in order), "turns": turns}
    return Sample(**values)


def media_path(path: str | None, root: str, where: str, allow_outside: bool = False) -> str:
    """The path of a medium below the root, for every annotation format; a `DataError` for URLs and paths outside.

    The message begins with ``where``. Symbolic links are checked by `check_inside`, when a medium is opened.
    """
    if not isinstance(path, str) or not path or "\0" in path:
        raise DataError(f"{where}: path is {shown(path)}, expected the path of a file")
    if _URL.match(path):
        raise DataError(f"{where}: {shown(path)} is a URL, expected the path of a local file")
    if not allow_outside and (os.path.isabs(path) or ".." in path.replace("\\", "/").split("/")):
        raise DataError(
            f"{where}: {shown(path)} leaves the media root {root}; use a path below it, or set allow_outside: true"
        )
    return os.path.join(root, path)


def check_inside(path: str, root: str) -> None:
    """Raise a `DataError` if symbolic links in a path lead outside ``root``.

    A folder directly below the root may be a link, for a data set on another disk; its files must be inside it.
    """
    folder = os.path.relpath(path, root).split(os.sep)[0]
    linked = os.path.join(root, folder)
    bases = [root, linked] if folder != os.pardir and os.path.isdir(linked) else [root]
    real = os.path.realpath(path)
    if not any(os.path.commonpath([real, base]) == base for base in map(os.path.realpath, bases)):
        raise DataError(f"{path} leads out of the media root {root} to {real}; set allow_outside: true to accept it")


def to_record(sample: Sample, root: str = "") -> dict[str, Any]:
    """A sample as a JSONL record, without empty fields; media paths below ``root`` are made relative."""
    media: list[dict[str, Any]] = []
    for medium in sample.media:
        path = medium.path
        if root and not medium.words:
            relative = os.path.relpath(path, root)
            path = os.path.abspath(path) if relative.startswith("..") else relative
        values = {"path": path, "offset": medium.offset, "size": medium.size, "words": list(medium.words)}
        media.append({"type": medium.modality} | {k: v for k, v in values.items() if v not in ("", None, [])})
    turns, used = [], 0
    for turn in sample.turns:
        shows = list(range(used, used := used + len(turn.media)))
        turns.append({"role": turn.role, "text": turn.text} | ({"media": shows} if shows else {}))
    record = vars(sample) | {"media": media, "turns": turns}
    return {key: value for key, value in record.items() if value or key == "id"}


def _turns(
    items: Sequence[_TurnRecord], media: Sequence[Medium], where: str
) -> tuple[tuple[Message, ...], Sequence[int]]:
    """The turns, and the indices of their media, in order."""
    every = range(len(media))
    if not items:
        return (), every
    placed = any(item.media is not None for item in items)
    order: list[int] = []
    turns = []
    for position, item in enumerate(items):
        spot, role = f"{where}: turns[{position}]", ("user", "assistant")[position % 2]
        if item.role != role:
            raise DataError(f"{spot}: role is {item.role!r}, expected {role!r}: roles alternate, user first")
        shows = (item.media or ()) if placed else (every if position == 0 else ())
        if shows and role == "assistant":
            raise DataError(f"{spot}: an assistant's turn has no media")
        if wrong := [i for i in shows if i not in every]:
            raise DataError(f"{spot}: media names {wrong[0]}, but the sample has {len(media)} media (counted from 0)")
        order += shows
        turns.append(Message(role, item.text, modalities_of(media[i] for i in shows)))
    if sorted(order) != list(every):
        raise DataError(f"{where}: each of the {len(media)} media belongs to one turn, the turns have {shown(order)}")
    return tuple(turns), order
