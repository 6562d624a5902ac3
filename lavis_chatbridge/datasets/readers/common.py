"""What the readers share: where a data set's files lie, rows with checked fields, JSON arrays read piece by piece."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from lavis_chatbridge.config import shown
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.prompting.pieces import Modality
from lavis_chatbridge.schema import Medium, Sample, media_path

_CHUNK = 1 << 20
_NEAR = 32  # characters: a value that a chunk cuts off fails to decode within these of its end
_NUMERIC = "0123456789.eE+-"
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Origin:
    """The annotation files of one split, and where its media lie.

    Args:
        source: The data set's name.
        files: What a file is for (``"questions"``) -> its path; a data set with one kind of file calls it ``"file"``,
            several of that kind ``"file0"``, ``"file1"``, ...
        root: The data root.
        media: Modality -> path under the root, with the fields of a row in braces: ``coco/{image_id:012d}.jpg``.
        options: What else the reader is told.
        allow_outside: Accept media outside the root.
    """

    source: str
    files: Mapping[str, str]
    root: str
    media: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    allow_outside: bool = False

    def file(self, role: str) -> str:
        """The path of a file by its role.

        Raises:
            ConfigError: If the configuration names none.
        """
        if role not in self.files:
            raise ConfigError(f"{self.source}: the split names no {role!r} file, only {', '.join(self.files)}")
        return self.files[role]

    def locate(self, where: str, **fields: Any) -> tuple[Medium, ...]:
        """The media of a row, in the order of ``media``.

        Raises:
            ConfigError: If a path asks for a field that the rows of this format do not have.
            DataError: If a field leads out of the root.
        """
        found = []
        for kind, pattern in self.media.items():
            try:
                path = pattern.format(**fields)
            except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{self.source}: media path {pattern!r} does not suit this format's fields "
                    f"({', '.join(f'{k}={shown(v)}' for k, v in fields.items())}): {error}"
                ) from error
            found.append(Medium(cast(Modality, kind), media_path(path, self.root, where, self.allow_outside)))
        return tuple(found)


Reader = Callable[[Origin], Iterator[Sample]]


class Row:
    """An object or a table's line whose fields are checked when they are read.

    Args:
        values: The fields.
        where: Its place, for messages.
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise DataError(f"{where}: expected an object, found {shown(values)}")
        self.values = values
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def text(self, *keys: str, blank: bool = False) -> str:
        """The first of these fields that is there, as text; a number counts, and with ``blank`` an empty text.

        Raises:
            DataError: If none is there, or it is neither text nor a number.
        """
        value = self._first(keys)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not (blank or value.strip()):
            raise DataError(f"{self.where}: {' or '.join(keys)} is {shown(value)}, expected text")
        return self._whole_characters(value.strip(), keys)

    def whole(self, *keys: str) -> int:
        """The first of these fields that is there, as a whole number."""
        value = self._first(keys)
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or isinstance(value, bool) or (isinstance(value, float) and number != value):
            raise DataError(f"{self.where}: {' or '.join(keys)} is {shown(value)}, expected a whole number")
        return number

    def texts(self, *keys: str) -> tuple[str, ...]:
        """The first of these fields that is there: a list of texts, or one text."""
        value = self._first(keys)
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return tuple(self._whole_characters(item.strip(), keys) for item in value)
        return (self.text(*keys),)

    def rows(self, *keys: str) -> list[Row]:
        """The first of these fields that is there, as a list of rows."""
        value = self._first(keys)
        if not isinstance(value, list):
            raise DataError(f"{self.where}: {' or '.join(keys)} is {shown(value)}, expected a list")
        return [Row(item, f"{self.where}.{keys[0]}[{i}]") for i, item in enumerate(value)]

    def _whole_characters(self, text: str, keys: Sequence[str]) -> str:
        """``text``, if a file can hold it: JSON can spell half a character, such as ``\\ud800``."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{self.where}: {' or '.join(keys)} is {shown(text)}, which is not Unicode") from error
        return text

    def _first(self, keys: Sequence[str]) -> Any:
        return next((self.values[key] for key in keys if self.values.get(key) is not None), None)


def question_sample(
    row: Row, sample_id: str, media: tuple[Medium, ...], question: str, answer: str, **more: Any
) -> Sample:
    """A sample of one question and its answer."""
    turns = (Message("user", question, tuple(medium.kind for medium in media)), Message("assistant", answer))
    return Sample(sample_id, media, turns=turns, **more)


def json_rows(path: str, key: str | None = None) -> Iterator[Row]:
    """The objects of a JSON array, read piece by piece.

    Args:
        path: The file.
        key: The array is this field of the file's object; without it the file is the array itself.

    Raises:
        DataError: With the position of what is not as expected.
    """
    stream = _JsonStream(path)
    name = key or ""
    if key is not None:
        stream.enter(key)
    for number, value in enumerate(stream.array(name)):
        yield Row(value, f"{path}: {name}[{number}]")


def json_entries(path: str) -> Iterator[tuple[str, Row]]:
    """The names and objects of a JSON file that is one object of objects, read piece by piece.

    Raises:
        DataError: With the position of what is not as expected.
    """
    for name, value in _JsonStream(path).entries():
        yield name, Row(value, f"{path}: {name}")


def json_value(path: str, key: str) -> Any:
    """One field of a JSON object, found without keeping what stands before it; None if there is none."""
    stream = _JsonStream(path)
    return stream.value() if stream.enter(key, required=False) else None


def table_rows(path: str, delimiter: str = ",", columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The lines of a CSV or TSV file; with ``columns`` the file has no header line.

    Raises:
        DataError: With the line of what is not as expected.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if delimiter == "\t":  # quotes are ordinary characters in a TSV
                lines = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
            else:
                lines = csv.reader(file, delimiter=delimiter)
            names = list(columns or next(lines, []))
            for values in lines:
                if not values:
                    continue
                where = f"{path}:{lines.line_num}"
                if len(values) != len(names):
                    raise DataError(f"{where}: {len(values)} columns, expected {len(names)} ({', '.join(names)})")
                yield Row(dict(zip(names, values, strict=True)), where)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error.reason}") from error
    except csv.Error as error:
        raise DataError(f"{path}: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def begins_with(path: str, character: str) -> bool:
    """Whether this is a text file's first character that is no white space."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 10).lstrip().startswith(character)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


class _JsonStream:
    """A JSON file as text that is decoded value by value; never more than one value and a chunk in memory."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._file = open(path, encoding="utf-8")  # noqa: SIM115  (closed with the generator that reads it)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        self._decoder = json.JSONDecoder()
        self._text, self._at, self._dropped, self._ended = "", 0, 0, False

    def enter(self, key: str, required: bool = True) -> bool:
        """Go to the value of a field of the file's object; says whether there is one."""
        self._expect("{")
        while self._peek() != "}":
            name = self.value()
            self._expect(":")
            if name == key:
                return True
            self.value()
            if self._peek() == ",":
                self._at += 1
        if required:
            raise DataError(f"{self._path}: has no field {key!r}")
        return False

    def entries(self) -> Iterator[tuple[str, Any]]:
        """The fields of the object that the file is, in order."""
        with self._file:
            self._expect("{", "an object")
            if self._peek() == "}":
                return
            while True:
                name = self.value()
                self._expect(":")
                yield str(name), self.value()
                if self._peek() == "}":
                    return
                self._expect(",")

    def array(self, name: str) -> Iterator[Any]:
        """The values of the array that begins here."""
        with self._file:
            self._expect("[", f"{name or 'the file'} to be a list")
            if self._peek() == "]":
                return
            while True:
                yield self.value()
                if self._peek() == "]":
                    return
                self._expect(",")

    def value(self) -> Any:
        """The next value, whole."""
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos + _NEAR >= len(self._text)
                place = self._dropped + error.pos
                if cut and self._more():
                    continue
                raise DataError(f"{self._path}: not JSON at character {place}: {error.msg}") from error
            except RecursionError as error:
                place = self._dropped + self._at
                raise DataError(f"{self._path}: too many brackets inside one another at character {place}") from error
            except ValueError as error:  # an integer of thousands of digits
                raise DataError(
                    f"{self._path}: not JSON after character {self._dropped + self._at}: {error}"
                ) from error
            rest = self._text[end : end + _NEAR]
            if isinstance(value, (int, float)) and len(rest) < _NEAR and not rest.strip(_NUMERIC) and self._more():
                continue  # the number goes on in the next chunk
            self._at = end
            return value

    def _peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it always matches
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _expect(self, character: str, what: str = "") -> None:
        found = self._peek()
        if found != character:
            place = f"character {self._dropped + self._at}"
            raise DataError(
                f"{self._path}: expected {what or repr(character)}, found {found or 'the end'!r} at {place}"
            )
        self._at += 1

    def _more(self) -> bool:
        """Read on; the chunk grows with what is undecoded, so that a long value is not decoded again too often."""
        if self._ended:
            return False
        self._dropped += self._at
        rest = self._text[self._at :]
        try:
            chunk = self._file.read(max(_CHUNK, len(rest)))
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}: not UTF-8: {error.reason}") from error
        self._text, self._at = rest + chunk, 0
        self._ended = not chunk
        return bool(chunk)
