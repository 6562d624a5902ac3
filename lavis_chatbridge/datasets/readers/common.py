"""Shared parts of readers: the files of a split, rows with checked fields, JSON and tables read row by row."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, cast

from lavis_chatbridge.config import shown
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.files import read_lines
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.prompting.pieces import Modality
from lavis_chatbridge.schema import Medium, Sample, media_path

LAYOUT = "docs/data.md shows the expected layout"
ENDINGS: dict[str, Modality] = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic"), "image"),
    **dict.fromkeys(("mp4", "m4v", "mov", "avi", "webm", "mkv", "mpg", "mpeg", "flv", "wmv"), "video"),
    **dict.fromkeys(("wav", "flac", "ogg", "opus", "mp3", "m4a", "aac", "aif", "aiff"), "audio"),
}
"""Endings of media files in lower case -> modality."""


@dataclass(frozen=True)
class Origin:
    """The annotation files of one split, and where its media are.

    Args:
        source: The data set's name.
        files: Purpose (``"questions"``) -> paths; the purpose of files without one is ``"file"``.
        root: The data root.
        media: Modality -> path below the root, with a row's fields in braces: ``coco/{image_id:012d}.jpg``.
        options: The reader's settings.
        allow_outside: Accept media outside the root.
        keep: Stores a medium that is bytes in a table, for readers of tables.
    """

    source: str
    files: Mapping[str, Sequence[str]]
    root: str
    media: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    allow_outside: bool = False
    keep: Callable[[Modality, bytes, str], Medium] | None = None

    @property
    def every_file(self) -> list[str]:
        """The paths of all purposes."""
        return [path for paths in self.files.values() for path in paths]

    def paths(self, purpose: str = "file") -> Sequence[str]:
        """The paths of one purpose; a `ConfigError` if the configuration names none."""
        if purpose not in self.files:
            raise ConfigError(f"{self.source}: the split names no {purpose!r} file, only {', '.join(self.files)}")
        return self.files[purpose]

    def rows(self, key: str | None = None, purpose: str = "file") -> Iterator[Row]:
        """The objects of the JSON arrays in the files of a purpose; see `json_rows`."""
        for path in self.paths(purpose):
            yield from json_rows(path, key)

    def table(self, delimiter: str = ",", columns: Sequence[str] | None = None) -> Iterator[Row]:
        """The lines of all CSV or TSV files; see `table_rows`."""
        for path in self.every_file:
            yield from table_rows(path, delimiter, columns)

    def objects(self) -> Iterator[Row]:
        """The objects of all files: JSON lists, or JSONL."""
        for path in self.every_file:
            yield from object_rows(path)

    def locate(self, where: str, **fields: Any) -> tuple[Medium, ...]:
        """The media of a row, in the order of ``media``, by the row's ``fields``."""
        found = []
        for modality, pattern in self.media.items():
            try:
                path = pattern.format(**fields)
            except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{self.source}: media path {pattern!r} does not fit this format's fields "
                    f"({', '.join(f'{k}={shown(v)}' for k, v in fields.items())}): {error}"
                ) from error
            found.append(Medium(cast(Modality, modality), media_path(path, self.root, where, self.allow_outside)))
        return tuple(found)


Reader = Callable[[Origin], Iterator[Sample]]


class Row:
    """An object, or a line of a table. Reading a field checks it.

    Each method accepts several keys and reads the first that is present; a wrong value raises `DataError`.

    Args:
        values: The fields.
        where: Its position, for messages.
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
        if not isinstance(value, str) or not (blank or value.strip()):
            raise self._fault(keys, "text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self._fault(keys, "text without a lone surrogate") from error
        return value

    def text(self, *keys: str, blank: bool = False) -> str:
        """As `name`, without surrounding white space: for language."""
        return self.name(*keys, blank=blank).strip()

    def whole(self, *keys: str) -> int:
        """A whole number."""
        value = self._first(keys)
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or isinstance(value, bool) or (isinstance(value, float) and number != value):
            raise self._fault(keys, "a whole number")
        return number

    def texts(self, *keys: str) -> tuple[str, ...]:
        """A list of texts, or one text."""
        value = self._first(keys)
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return tuple(Row({keys[0]: item}, self.where).text(keys[0], blank=True) for item in value)
        return (self.text(*keys),)

    def rows(self, *keys: str) -> list[Row]:
        """A list of objects."""
        value = self._first(keys)
        if not isinstance(value, list):
            raise self._fault(keys, "a list")
        return [Row(item, f"{self.where}.{keys[0]}[{i}]") for i, item in enumerate(value)]

    def _fault(self, keys: Sequence[str], expected: str) -> DataError:
        found = shown(self._first(keys))
        return DataError(f"{self.where}: {' or '.join(keys)} is {found}, expected {expected}; {LAYOUT}")

    def _first(self, keys: Sequence[str]) -> Any:
        return next((self.values[key] for key in keys if self.values.get(key) is not None), None)


def question_sample(
    row: Row, sample_id: str, media: tuple[Medium, ...], question: str, answer: str, **more: Any
) -> Sample:
    """A sample of one question and its answer."""
    turns = (Message("user", question, tuple(medium.modality for medium in media)), Message("assistant", answer))
    return Sample(sample_id, media, turns=turns, **more)


def stem_of(name: str) -> str:
    """A file's name without its ending, if the ending is one of a media file: ids may contain dots."""
    stem, _, ending = name.rpartition(".")
    return stem if stem and ending.lower() in ENDINGS else name


def with_unique_ids(reader: Reader) -> Reader:
    """Make a reader append ``#2``, ``#3`` to repeated ids: published files repeat some ids with different contents."""

    def read(origin: Origin) -> Iterator[Sample]:
        times: dict[int, int] = {}
        for sample in reader(origin):
            key = hash(sample.id)
            times[key] = times.get(key, 0) + 1
            yield replace(sample, id=f"{sample.id}#{times[key]}") if times[key] > 1 else sample

    read.__doc__, read.__name__ = reader.__doc__, getattr(reader, "__name__", "reader")
    return read


def of_split(rows: Iterable[Row], wanted: Sequence[str], path: str) -> Iterator[Row]:
    """The rows whose ``split`` is one of ``wanted``; without any, a `DataError` names the splits of the file."""
    found: dict[str, int] = {}
    for row in rows:
        split = row.text("split")
        found[split] = found.get(split, 0) + 1
        if split in wanted:
            yield row
    if not any(split in found for split in wanted):
        has = ", ".join(f"{split} ({count})" for split, count in found.items()) or "no rows"
        raise DataError(f"{path} has no split {' or '.join(wanted)}; it has {has}")


def json_rows(path: str, key: str | None = None) -> Iterator[Row]:
    """The objects of a JSON array, read one by one: the file, or the field ``key`` of its object."""
    name, number = key or "", -1
    for number, value in enumerate(_parsed(path, f"{key}.item" if key else "item")):
        yield Row(value, f"{path}: {name}[{number}]")
    if number < 0 and (kind := _kind(path, name)) != "start_array":
        found = f"a field {key!r}" if key else "a list"
        raise DataError(f"{path}: expected {found} that is a list, found {kind or 'none'}; {LAYOUT}")


def object_rows(path: str) -> Iterator[Row]:
    """The objects of a JSONL file or a JSON list."""
    if begins_with(path, "["):
        yield from json_rows(path)
        return
    for number, line in read_lines(path):
        if line.strip():
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from error
            yield Row(values, f"{path}:{number}")


def json_entries(path: str) -> Iterator[tuple[str, Row]]:
    """The names and objects of a JSON file that is one object of objects, read one by one."""
    if (kind := _kind(path, "")) != "start_map":
        raise DataError(f"{path}: expected an object of objects, found {kind}; {LAYOUT}")
    for name, value in _parsed(path, "", pairs=True):
        yield name, Row(value, f"{path}: {name}")


def json_value(path: str, key: str) -> Any:
    """One field of a JSON object, or None."""
    return next(_parsed(path, key), None)


def table_rows(path: str, delimiter: str = ",", columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The lines of a CSV or TSV file; with ``columns`` the file has no header line."""
    text = (f"{line}\n" for _, line in read_lines(path))
    dialect: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if delimiter == "\t" else {}  # quotes are ordinary there
    lines = csv.reader(text, delimiter=delimiter, **dialect)
    names = list(columns or next(lines, []))
    try:
        for values in lines:
            if not values:
                continue
            where = f"{path}:{lines.line_num}"
            if len(values) != len(names):
                hint = "" if columns else "; a file without a header line needs options: {columns: [...]}"
                raise DataError(f"{where}: {len(values)} columns, expected {len(names)} ({', '.join(names)}){hint}")
            yield Row(dict(zip(names, values, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"{path}: {error}") from error


def begins_with(path: str, character: str) -> bool:
    """Whether this is a text file's first character, apart from white space."""
    with _opened(path) as file:
        return file.read(1 << 10).decode("utf-8-sig", "replace").lstrip().startswith(character)


def _opened(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _parsed(path: str, prefix: str, pairs: bool = False) -> Iterator[Any]:
    """The values that ijson parses at a prefix."""
    import ijson

    with _opened(path) as file:
        try:
            parse = ijson.kvitems if pairs else ijson.items
            yield from parse(file, prefix, use_float=True)
        except (ijson.JSONError, UnicodeDecodeError, ValueError) as error:
            for _ in read_lines(path):  # names line and byte if the file is not UTF-8
                pass
            message = " ".join((error.args[0].decode() if isinstance(error.args[0], bytes) else str(error)).split())
            raise DataError(f"{path}: not JSON: {message.replace('(right here) ------^', '').strip()}") from error


def _kind(path: str, prefix: str) -> str:
    """The first event of ijson at a prefix, such as ``start_array``; empty if it is absent."""
    import ijson

    with _opened(path) as file:
        try:
            return next((event for at, event, _ in ijson.parse(file) if at == prefix and event != "map_key"), "")
        except ijson.JSONError:
            return ""
