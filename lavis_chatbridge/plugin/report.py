"""Tables of evaluation scores as text, JSON and HTML; and rescoring of predictions.

It reads the metrics of this package's tasks; LAVIS's own tasks return other metrics or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lavis_chatbridge import pages
from lavis_chatbridge.config import merged, parse, read_options
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.files import read_json, write_json, write_text
from lavis_chatbridge.tasks.settings import EvaluationSettings

COLUMNS = ("data", "media", "samples", "metric", "score", "95 %", "chance", "paper", "stage 1", "drop", "other scores")
_MOST_TYPES = 12
"""Score breakdowns with more types than this are only in the JSON and the page."""


@dataclass
class Line:
    """One line of the table: the scores of a data set, or the reason why there are none.

    ``score``, ``chance``, the ``paper``'s figure, the paper's after ``stage1`` only, and the ``drop`` from the score
    with all media are those of the suite's main ``metric``. Scores are in percent, unless ``unit`` is empty.

    Attributes:
        media: The condition (``"image withheld"``); empty for all media.
        status: ``"scored"``, ``"missing"`` (its data are not there) or ``"failed"``.
        by_type: Axis -> type -> number of samples and scores.
        remarks: Caveats of the score.
        written: The files of predictions and scores.
    """

    suite: str
    media: str = ""
    status: str = "scored"
    samples: int | None = None
    metric: str = ""
    score: float | None = None
    chance: float | None = None
    paper: float | None = None
    stage1: float | None = None
    drop: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Sequence[float] | None] = field(default_factory=dict)
    by_type: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    unit: str = "percent"
    remarks: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The suite with the condition of its media."""
        return f"{self.suite} ({self.media})".strip() if self.media else self.suite

    def fail(self, why: str) -> Line:
        """This line, marked as not scored."""
        self.status, self.remarks = "failed", self.remarks or [why]
        return self

    def cells(self) -> list[str]:
        """The text of each of `COLUMNS`."""
        others = {name: value for name, value in self.scores.items() if name != self.metric}
        ends = self.intervals.get(self.metric, [])
        return [
            self.suite,
            self.media,
            "" if self.samples is None else str(self.samples),
            self.metric,
            _number(self.score, self.unit) if self.status == "scored" else self.status,
            "-" if ends is None else " - ".join(_number(end, self.unit) for end in ends),
            *(_number(value) for value in (self.chance, self.paper, self.stage1, self.drop)),
            ", ".join(f"{name} {_number(value, self.unit)}" for name, value in others.items()),
        ]


def completed(lines: Sequence[Line], suite: str) -> Sequence[Line]:
    """The lines of one configuration: named after its suite, if it has a name, with each condition's drop."""
    with_all = {line.suite: line.score for line in lines if not line.media}
    several = len({line.suite for line in lines} - {""}) > 1
    for line in lines:
        if line.media and line.score is not None and (before := with_all.get(line.suite)) is not None:
            line.drop = before - line.score
        if suite:
            line.suite = f"{suite} {line.suite}".strip() if several else suite
    return lines


def lines_of(found: Mapping[str, Any], run: EvaluationSettings) -> list[Line]:
    """A line for each source of each split; ``found`` has each split's metrics, as tasks return them."""
    lines = []
    for split, metrics in found.items():
        scores = metrics or {}
        by_source = scores.get("by_source") or {}
        own = [_of_source(f"{split} {source}".strip(), scored, run) for source, scored in by_source.items()]
        own = own or [_of_numbers(split, scores)]
        for line in own:
            line.media, line.written = run.label, list(scores.get("written", ()))
        lines += own
    return lines


def _of_source(name: str, found: Mapping[str, Any], run: EvaluationSettings) -> Line:
    """The line of a result of `GenerationTask`."""
    line = Line(name, samples=found["samples"], remarks=_unread(found))
    if "fault" in found or not line.samples:
        return line.fail(found.get("fault", "it has no samples"))
    line.metric, line.score, line.chance = found.get("metric", ""), found.get("headline"), found.get("chance")
    line.scores, line.intervals = dict(found.get("scores", {})), dict(found.get("intervals", {}))
    line.by_type = dict(found.get("by_type", {}))
    if run.media == "normal":
        first = run.metrics[0] if run.metrics else line.metric
        line.paper = run.published.get(first, run.published.get(line.metric))
        line.stage1 = run.published_stage1.get(first, run.published_stage1.get(line.metric))
        if line.paper is not None and run.published_in:
            line.remarks.append(f"paper: {run.published_in}")
    line.remarks += [f"{metric}: {why}" for metric, why in found.get("left_out", {}).items()]
    if found.get("tokenizer") == "python":
        line.remarks.append("no official tokenizer of captions (Java) here: not comparable with published scores")
    if not run.report_metric:
        line.remarks.append("not scored (run.report_metric is false)")
    elif not line.scores:
        return line.fail("no accepted answers and no facts to compare with: set run.metrics, as in run.metrics=[CIDEr]")
    elif unscored := found.get("unscored"):
        line.samples -= unscored
        line.remarks.append(f"{unscored} predictions have no reference to compare with")
    return line


def _of_numbers(split: str, found: Mapping[str, Any]) -> Line:
    """The line of a loss, or of the numbers that a task of LAVIS returns, if any."""
    line = Line(split, samples=found.get("samples"), unit="", remarks=_unread(found))
    ours = ("samples", "not_predicted", *(["agg_metrics"] if "loss" in found else []))
    line.scores = {k: float(v) for k, v in found.items() if isinstance(v, (int, float)) and k not in ours}
    line.metric, line.score = next(iter(line.scores.items()), ("", None))
    if not line.scores and line.samples is not None:
        return line.fail("its samples have no target token" if line.samples else "it has no samples")
    if not line.scores:
        line.remarks.append("its task returns no scores")
    return line


def _unread(found: Mapping[str, Any]) -> list[str]:
    count = found.get("not_predicted")
    return [f"{count} {'sample' if count == 1 else 'samples'} unreadable, the log has the reasons"] if count else []


def summary(lines: Sequence[Line]) -> str:
    """The table and the files of predictions and scores; a `DataError` if nothing could be scored."""
    if all(line.status == "failed" for line in lines):
        why = dict.fromkeys(f"{line.suite}: {remark}" for line in lines for remark in line.remarks)
        raise DataError(f"nothing could be scored. {'; '.join(why)}")
    written = dict.fromkeys(path for line in lines for path in line.written)
    return text_table(lines) + (f"\n\nwritten to {', '.join(written)}" if written else "")


def text_table(lines: Sequence[Line]) -> str:
    """The table as text, followed by scores by type and remarks."""
    rows = [line.cells() for line in lines]
    used = [i for i in range(len(COLUMNS)) if i == 0 or any(row[i] for row in rows)]
    text = [aligned([[row[i] for i in used] for row in [COLUMNS, *rows]])]
    for line in lines:
        for axis, types in line.by_type.items():
            if len(types) <= _MOST_TYPES:
                metric = next((m for m in (line.metric, *line.scores) if all(m in own for own in types.values())), "")
                body = [[name, str(own["samples"]), _number(own.get(metric))] for name, own in types.items()]
                text += ["", aligned([[f"{line.name} by {axis}", "samples", metric], *body])]
    remarks = [f"{line.name}: {remark}" for line in lines for remark in line.remarks]
    return "\n".join([*text, *([""] if remarks else []), *remarks])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells with aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])


def write_scores(folder: Path, lines: Sequence[Line], model: str) -> list[Path]:
    """Write the table of suites with the model's type and the versions; returns the paths."""
    from lavis_chatbridge.tasks.scoring.scores import versions

    about = {"model": model, "versions": versions()}
    content = about | {"suites": [asdict(line) for line in lines]}
    page = about | {"columns": COLUMNS, "lines": lines, "number": _number}
    return write(folder, "scores", text_table(lines), content, page)


def write(folder: Path, name: str, text: str, content: Any, page: Mapping[str, Any]) -> list[Path]:
    """Write ``NAME.txt``, ``NAME.json`` and, by the template of this name, ``NAME.html``; returns the paths."""
    paths = [folder / f"{name}.{ending}" for ending in ("txt", "json", "html")]
    write_text(paths[0], text + "\n")
    write_json(paths[1], content)
    write_text(paths[2], pages.render(f"{name}.html", title=name.capitalize(), **page))
    return paths


def rescore(file: str, options: Sequence[str]) -> int:
    """``--rescore``: score an evaluation's ``result/SPLIT_stepN.jsonl`` again with other metrics or normalisation.

    Prints the table and writes ``..._rescored.json`` beside the file; returns 1 if a data set could not be scored.
    """
    from lavis_chatbridge.tasks.predictions import read_predictions
    from lavis_chatbridge.tasks.scoring.scores import scored, versions

    path = Path(file)
    predictions = read_predictions(path)
    how = settings_of(path, options)
    names = dict.fromkeys(prediction.source for prediction in predictions)
    by_source = {name: scored([one for one in predictions if one.source == name], how) for name in names}
    target = path.with_name(f"{path.stem}_rescored.json")
    lines = lines_of({"": {"by_source": by_source, "written": [str(target)]}}, how)
    print(summary(lines))
    scoring = {"metrics": how.metrics, "normalisation": how.normalisation}
    write_json(target, {"by_source": by_source, **scoring, "versions": versions()})
    return int(any(line.status == "failed" for line in lines))


def settings_of(predictions: Path, options: Sequence[str] = ()) -> EvaluationSettings:
    """The evaluation settings of a predictions file, from the scores file beside it, overridden by options."""
    known = read_json(predictions.with_name(f"{predictions.stem}_metrics.json")) or {}
    given = read_options(options)
    if others := [str(key) for key in given if key != "run"]:
        raise ConfigError(f"--rescore accepts only options of run, such as run.metrics; found {', '.join(others)}")
    own = {key: value for key, value in known.items() if key in EvaluationSettings.model_fields}
    return parse(EvaluationSettings, merged(own, given.get("run") or {}), "run")


def _number(value: float | None, unit: str = "percent") -> str:
    return "" if value is None else f"{value:.1f}" if unit == "percent" else f"{value:.3f}"
