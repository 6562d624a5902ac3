"""Predictions on disk: one JSONL file per split, from which an interrupted evaluation resumes.

During an evaluation, each process appends to its own file, whose name contains a hash of everything that affects the
predictions. At the end they are merged into one file. Its scores file has the hash, so that repeating the evaluation
reads the predictions instead of generating them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict

from lavis_chatbridge.config import Settings, parse
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.files import append_lines, hash_of, read_json, read_objects, write_json, write_text


def _without_surrogates(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


Words = Annotated[str, BeforeValidator(_without_surrogates)]
"""Text without lone surrogates, which can be neither written nor scored."""


class Prediction(Settings):
    """One line of a predictions file."""

    model_config = ConfigDict(extra="ignore")

    sample_id: Words
    prediction: Words
    source: str = ""
    index: int = -1
    """The sample's position in its source; -1: unknown."""
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
        """The accepted answers, else the references."""
        return self.answers or self.references

    @property
    def key(self) -> tuple[str, int]:
        """Source and index, by which predictions are sorted and found."""
        return self.source, self.index

    def line(self) -> str:
        """A line of JSONL, without empty fields."""
        return json.dumps(self.model_dump(exclude_defaults=True), ensure_ascii=False)


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of a file, at least one."""
    predictions = [parse(Prediction, fields, line) for line, fields in read_objects(path)]
    if not predictions:
        raise DataError(f"{path} has no prediction")
    return predictions


class PredictionFiles:
    """The predictions of a split on disk; ``depends_on`` is everything that affects them."""

    def __init__(self, folder: Path, depends_on: Mapping[str, Any], rank: int) -> None:
        self.folder, self.depends_on, self.hash = folder, depends_on, hash_of(depends_on)
        self._own = folder / f".{self.hash[:16]}.rank{rank}.jsonl"

    def read(self) -> dict[tuple[str, int], Prediction]:
        """Predictions of earlier evaluations with the same hash; a line that an interruption cut off is skipped."""
        scores = [p for p in self.folder.glob("*_metrics.json") if (read_json(p) or {}).get("depends_on") == self.hash]
        merged = [path.with_name(path.name.removesuffix("_metrics.json") + ".jsonl") for path in sorted(scores)]
        files = [*(path for path in merged if path.is_file()), *self._parts()]
        lines = (line for path in files for line in read_objects(path, skip_cut=True))
        return {(found := parse(Prediction, fields, line)).key: found for line, fields in lines}

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Add predictions to this process's file."""
        with self._writable():
            self.folder.mkdir(parents=True, exist_ok=True)
            append_lines(self._own, [prediction.line() for prediction in predictions])

    def finish(self, name: str, predictions: Iterable[Prediction], scores: Mapping[str, Any]) -> list[str]:
        """Write ``NAME.jsonl`` and ``NAME_metrics.json``, remove the processes' own files; returns the two paths."""
        path, target = self.folder / f"{name}.jsonl", self.folder / f"{name}_metrics.json"
        with self._writable():
            write_text(path, "".join(f"{prediction.line()}\n" for prediction in predictions))
            write_json(target, {**scores, **self.depends_on, "depends_on": self.hash})
        for part in self._parts():
            part.unlink(missing_ok=True)
        return [str(path), str(target)]

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(f".{self.hash[:16]}.rank*.jsonl"))

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"run.output_dir: cannot write to {self.folder}: {error.strerror or error}") from error
