"""Shared parts of readers: the files of a split, rows with checked fields, JSON and tables."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lavis_chatbridge.config import shown
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.files import read_lines, read_objects
from lavis_chatbridge.prompting.conversation import Message, Modality
from lavis_chatbridge.schema import Medium, Sample, media_path, modalities_of

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""A lone surrogate, as in JSON that was cut inside an emoji; it cannot be encoded as UTF-8."""
LAYOUT = "docs/data.md shows the expected layout"
ENDINGS: dict[str, Modality] = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic"), "image"),
    **dict.fromkeys(("mp4", "m4v", "mov", "avi", "webm", "mkv", "mpg", "mpeg", "flv", "wmv"), "video"),
    **dict.fromkeys(("wav", "flac", "ogg", "opus", "mp3", "m4a", "aac", "aif", "aiff"), "audio"),
}
"""Endings of media files in lower case -> modality."""


@dataclass(frozen=True)
class Origin:
    """The annotation files of one split, and the paths of its media."""

    dataset: str
    """Its name, for messages."""
    files: Mapping[str, Sequence[str]]
    """Purpose (``"questions"``) -> paths; the purpose of files without one is ``"file"``."""
    root: str
    """The data root."""
    media: Mapping[Modality, str] = field(default_factory=dict)
    """Modality -> path below the root, with an annotation's fields in braces: ``coco/{image_id:012d}.jpg``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The reader's settings."""
    allow_outside: bool = False
    keep: Callable[[Modality, bytes, str], Medium] | None = None
    """Stores a medium that a table contains as bytes (modality, bytes, file ending -> `Medium`)."""

    @property
    def every_file(self) -> list[str]:
        return [path for paths in self.files.values() for path in paths]

    def paths(self, purpose: str) -> Sequence[str]:
        """The paths of one purpose; a `ConfigError` if the configuration names none."""
        if purpose not in self.files:
            raise ConfigError(f"{self.dataset}: the split names no {purpose!r} file, only {', '.join(self.files)}")
        return self.files[purpose]

    def table(self) -> Iterator[Row]:
        for path in self.every_file:
            yield from table_rows(path)

    def objects(self, key: str | None = None) -> Iterator[Row]:
        """The objects of all files: JSON lists (with ``key``: the list under this key of an object), or JSONL."""
        for path in self.every_file:
            yield from object_rows(path) if key is None else read_object(path).rows(key)

    def locate(self, where: str, **fields: Any) -> tuple[Medium, ...]:
        """The media of a row, in the order of ``media``; ``fields`` fill the paths' braces."""
        found = []
        for modality, pattern in self.media.items():
            try:
                path = pattern.format(**fields)
            except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{self.dataset}: media path {pattern!r} does not fit this format's fields "
                    f"({', '.join(f'{k}={shown(v)}' for k, v in fields.items())}): {error}"
                ) from error
            found.append(Medium(modality, media_path(path, self.root, where, self.allow_outside)))
        return tuple(found)


Reader = Callable[[Origin], Iterator[Sample]]


class Row:
    """A JSON object or a line of a table, and its position for messages. Reading a field checks it.

    Each method accepts several keys and reads the first that is present; a wrong value raises `DataError`.
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise DataError(f"{where}: expected an object, found {shown(values)}; {LAYOUT}")
        self.values = values
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def name(self, *keys: str, blank: bool = False) -> str:
        """Text or a number, unchanged: file names and ids keep their white space. ``blank`` accepts an empty text."""
        value = self._first(keys)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not (blank or value.strip()) or _LONE_SURROGATE.search(value):
            raise self._fault(keys, "text")
        return value

    def text(self, *keys: str, blank: bool = False) -> str:
        """As `name`, without surrounding white space: for language."""
        return self.name(*keys, blank=blank).strip()

    def whole(self, *keys: str) -> int:
        """A whole number, or its digits."""
        value = self._first(keys)
        if isinstance(value, str) and value.strip().isdecimal():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._fault(keys, "a whole number")
        return value

    def texts(self, *keys: str) -> tuple[str, ...]:
        """A list of texts, or one text."""
        value = self._first(keys)
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return tuple(Row({keys[0]: item}, self.where).text(keys[0], blank=True) for item in value)
        return (self.text(*keys),)

    def rows(self, *keys: str) -> list[Row]:
        value = self._first(keys)
        if not isinstance(value, list):
            raise self._fault(keys, "a list")
        return [Row(item, f"{self.where}.{keys[0]}[{i}]") for i, item in enumerate(value)]

    def entries(self) -> Iterator[tuple[str, Row]]:
        """Key and object of each entry of an object of objects."""
        for name, value in self.values.items():
            yield name, Row(value, f"{self.where}: {name}")

    def _fault(self, keys: Sequence[str], expected: str) -> DataError:
        found = shown(self._first(keys))
        return DataError(f"{self.where}: {' or '.join(keys)} is {found}, expected {expected}; {LAYOUT}")

    def _first(self, keys: Sequence[str]) -> Any:
        return next((self.values[key] for key in keys if self.values.get(key) is not None), None)


def question_sample(
    sample_id: str, media: tuple[Medium, ...], question: str, answer: str | None, **more: Any
) -> Sample:
    """A sample with one question and its answer; None: without an answer."""
    asked = Message("user", question, modalities_of(media))
    turns = (asked,) if answer is None else (asked, Message("assistant", answer))
    return Sample(sample_id, media, turns=turns, **more)


def stem_of(name: str) -> str:
    """A file's name without a media file's ending. Other dots are kept: ids may contain dots."""
    stem, _, ending = name.rpartition(".")
    return stem if stem and ending.lower() in ENDINGS else name


def with_unique_ids(reader: Reader) -> Reader:
    """Make a reader append ``#2``, ``#3`` to repeated ids: some published files repeat ids with other contents."""

    def read(origin: Origin) -> Iterator[Sample]:
        times: Counter[int] = Counter()  # hashes need less memory than the ids of 10 million samples
        for sample in reader(origin):
            key = hash(sample.id)
            times[key] += 1
            yield replace(sample, id=f"{sample.id}#{times[key]}") if times[key] > 1 else sample

    return read


def of_split(rows: Iterable[Row], wanted: Sequence[str], path: str) -> Iterator[Row]:
    """The rows with a ``split`` in ``wanted``; if there are none, a `DataError` names the file's splits."""
    found: Counter[str] = Counter()
    for row in rows:
        split = row.text("split")
        found[split] += 1
        if split in wanted:
            yield row
    if not any(split in found for split in wanted):
        has = ", ".join(f"{split} ({count})" for split, count in found.items()) or "no rows"
        raise DataError(f"{path} has no split {' or '.join(wanted)}; it has {has}")


def read_object(path: str) -> Row:
    return Row(_read_json(path), path)


def object_rows(path: str) -> Iterator[Row]:
    """The objects of a JSONL file or a JSON list."""
    if is_list(path):
        for number, values in enumerate(_read_json(path)):
            yield Row(values, f"{path}: [{number}]")
    else:
        for where, values in read_objects(path):
            yield Row(values, where)


def _read_json(path: str) -> Any:
    text = "\n".join(line for _, line in read_lines(path))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error


def is_list(path: str) -> bool:
    """Whether a file begins with a JSON list."""
    first = next((line for _, line in read_lines(path) if line.strip()), "")
    return first.lstrip().startswith("[")


def table_rows(path: str, delimiter: str = ",", columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The lines of a CSV or TSV file; pass ``columns`` if the file has no header line."""
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL  # a TSV has no quotes
    lines = (f"{line}\n" for _, line in read_lines(path))
    table = csv.DictReader(lines, columns, delimiter=delimiter, quoting=quoting)
    try:
        for values in table:
            where = f"{path}:{table.line_num}"
            if None in values or None in values.values():
                names = table.fieldnames or ()
                raise DataError(f"{where}: expected {len(names)} columns ({', '.join(names)})")
            yield Row(values, where)
    except csv.Error as error:
        raise DataError(f"{path}:{table.line_num}: {error}") from error
