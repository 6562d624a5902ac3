"""Predictions on disk: one JSONL file per split, from which an interrupted evaluation resumes.

During an evaluation, each process appends to its own file, whose name contains a hash of everything that affects the
predictions. At the end they are merged into one file. Its scores file has the hash, so that repeating the evaluation
reads the predictions instead of generating them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, ValidationError

from lavis_chatbridge.config import Settings, parse
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.files import append_lines, atomic_text, read_json, read_lines

_log = logging.getLogger(__name__)


def _clean(value: Any) -> Any:
    """Text without lone surrogates, which can be neither written nor scored."""
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def _named(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _clean(value)


Words = Annotated[str, BeforeValidator(_clean)]


class Prediction(Settings):
    """One line of a predictions file."""

    model_config = ConfigDict(extra="ignore")

    sample_id: Annotated[str, BeforeValidator(_named)]
    prediction: Words
    source: str = ""
    index: int | None = None
    """The sample's position in its source."""
    prompt: Words = ""
    """The prompt; a medium is ``[image 0]``."""
    references: list[Words] = []
    answers: list[Words] = []
    facts: dict[str, str] = {}
    task: str = ""
    held_out: bool = False
    media: list[tuple[str, str]] = []
    """Modality and path of each file."""
    meta: dict[str, Any] = {}
    replies: list[Words] = []
    """Multiple choice: the reply to each order of the options."""
    chosen: list[int] = []
    """Multiple choice: published position of the option chosen in each order; -1: none."""

    @property
    def truth(self) -> list[str]:
        """The reference texts: the accepted answers, else the references."""
        return self.answers or self.references

    @property
    def place(self) -> tuple[str, int | None]:
        """Source and index, the sort and lookup key of predictions."""
        return self.source, self.index

    def line(self) -> str:
        """The record as a line of JSONL, without empty fields."""
        return json.dumps(self.model_dump(exclude_defaults=True), ensure_ascii=False)


def read_predictions(path: Path) -> list[Prediction]:
    """The records of a predictions file.

    Raises:
        DataError: If it cannot be read, is not JSONL, or has no prediction.
        ConfigError: If a line is not a prediction, with all its faults.
    """
    records = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(content, Mapping):
            raise DataError(f"{path}:{number}: expected an object, a line of an evaluation's result/SPLIT_stepN.jsonl")
        records.append(parse(Prediction, content, f"{path}:{number}"))
    if not records:
        raise DataError(f"{path} has no prediction")
    return records


class PredictionFiles:
    """The predictions of one split. ``depends_on`` is a hash of the data, prompts, decoding, weights and versions."""

    def __init__(self, folder: Path, depends_on: str, rank: int = 0) -> None:
        self.folder, self.depends_on = folder, depends_on
        self._own = folder / f".{depends_on[:16]}.rank{rank}.jsonl"

    def read(self) -> dict[tuple[str, int | None], Prediction]:
        """Predictions of earlier evaluations with the same hash, by source and index.

        A partial line, which an interruption leaves, is skipped.
        """
        found: dict[tuple[str, int | None], Prediction] = {}
        for path in chain(self._finished(), self._parts()):
            for number, line in read_lines(path):
                try:
                    record = Prediction.model_validate(json.loads(line))
                except (ValueError, ValidationError):
                    _log.warning("%s:%d: skipped a line that is cut off", path, number)
                else:
                    found[record.place] = record
        return found

    def append(self, records: Iterable[Prediction]) -> None:
        """Add records to this process's file."""
        with writable(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            append_lines(self._own, [record.line() for record in records])

    def finish(self, name: str, records: Iterable[Prediction]) -> Path:
        """Write all records to ``NAME.jsonl``, atomically, and remove the processes' own files."""
        path = self.folder / f"{name}.jsonl"
        with writable(self.folder), atomic_text(path) as file:
            file.writelines(f"{record.line()}\n" for record in records)
        for part in self._parts():
            part.unlink(missing_ok=True)
        return path

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(f".{self.depends_on[:16]}.rank*.jsonl"))

    def _finished(self) -> Iterator[Path]:
        for scores in sorted(self.folder.glob("*_metrics.json")):
            predictions = scores.with_name(scores.name.removesuffix("_metrics.json") + ".jsonl")
            content = read_json(scores)
            if isinstance(content, dict) and content.get("depends_on") == self.depends_on and predictions.is_file():
                yield predictions


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turn errors of writing to the folder of results into a ConfigError.

    Raises:
        ConfigError: Instead of the operating system's error.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"run.output_dir: cannot write to {folder}: {error.strerror or error}") from error
