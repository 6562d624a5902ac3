"""Tables of evaluation scores as text, JSON and HTML; and rescoring of predictions.

It knows the metrics of this package's tasks; LAVIS's own tasks return other metrics or none.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lavis_chatbridge import pages
from lavis_chatbridge.config import merged, parse, read_options
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.files import read_json, write_json, write_text
from lavis_chatbridge.tasks.settings import EvaluationSettings

_log = logging.getLogger(__name__)

COLUMNS = ("suite", "media", "samples", "metric", "score", "95 %", "chance", "paper", "stage 1", "drop", "other scores")
_MOST_TYPES = 12
"""Score breakdowns with more types than this are only in the JSON and the page."""


@dataclass
class Line:
    """One line of the table.

    ``score`` is that of the suite's own ``metric``; ``interval``, ``chance``, the ``paper``'s figure, the paper's after
    ``stage1`` only, and the ``drop`` from the score with all media belong to it.

    Attributes:
        media: ``""`` as they are, else the condition (``"image withheld"``).
        status: ``"scored"``, ``"missing"`` (its data are not there) or ``"failed"`` (nothing could be scored).
        by_type: Kind of type -> type -> number of samples and scores.
        unit: Unit of the scores: ``"percent"``, or ``""`` for a loss and scores of LAVIS's tasks.
        remarks: Caveats of the score.
    """

    suite: str
    media: str = ""
    status: str = "scored"
    samples: int | None = None
    metric: str = ""
    score: float | None = None
    interval: list[float] | None = None
    chance: float | None = None
    paper: float | None = None
    stage1: float | None = None
    drop: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    by_type: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    unit: str = "percent"
    remarks: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        """The text of each of `COLUMNS`."""
        others = {name: value for name, value in self.scores.items() if name != self.metric}
        return [
            self.suite,
            self.media,
            "" if self.samples is None else str(self.samples),
            self.metric,
            _number(self.score, self.unit) if self.status == "scored" else self.status,
            " - ".join(_number(end, self.unit) for end in self.interval or ()),
            *(_number(value) for value in (self.chance, self.paper, self.stage1, self.drop)),
            ", ".join(f"{name} {_number(value, self.unit)}" for name, value in others.items()),
        ]


def failed(name: str, media: str, error: Exception) -> Line:
    """The line of a benchmark that could not be scored."""
    _log.error("%s%s failed: %s", name, f" ({media})" if media else "", error)
    return Line(name, media, "failed", remarks=[" ".join(str(error).split())])


def lines_of(found: Mapping[str, Any], run: EvaluationSettings, media: str = "") -> list[Line]:
    """A line for each source of each split.

    Args:
        found: Split -> its metrics.
        run: Settings of the evaluation.
        media: The condition's name in the table.
    """
    return [replace(line, media=media) for split, own in found.items() for line in _of_split(split, own or {}, run)]


def summary(lines: Sequence[Line], written: Sequence[str], first: str = "split and data set") -> tuple[str, bool]:
    """The final text of an evaluation: the scores of every split, and their files.

    Args:
        lines: The table.
        written: The files, or their folder.
        first: Header of the first column.

    Returns:
        The text, and whether all of it was scored.

    Raises:
        DataError: If nothing could be scored.
    """
    faults = [line for line in lines if line.status == "failed"]
    if len(faults) == len(lines):
        why = dict.fromkeys(": ".join(filter(None, (line.suite, remark))) for line in lines for remark in line.remarks)
        raise DataError(f"nothing could be scored. {'; '.join(why)}")
    return f"{text_table(lines, first)}\n\nwritten to {', '.join(dict.fromkeys(written))}", not faults


def text_table(lines: Sequence[Line], first: str = COLUMNS[0]) -> str:
    """The table as text, followed by scores by type and remarks."""
    rows = [line.cells() for line in lines]
    used = [i for i in range(len(COLUMNS)) if i == 0 or any(row[i] for row in rows)]
    text = [aligned([[first, *(COLUMNS[i] for i in used[1:])], *([row[i] for i in used] for row in rows)])]
    for line in lines:
        name = f"{line.suite}{f' ({line.media})' if line.media else ''}"
        for axis, types in line.by_type.items():
            if len(types) <= _MOST_TYPES:
                metric = line.metric if all(line.metric in found for found in types.values()) else ""
                metric = metric or next((key for found in types.values() for key in found if key != "samples"), "")
                body = [[kind, str(found["samples"]), _number(found.get(metric))] for kind, found in types.items()]
                text += ["", aligned([[f"{name} by {axis}", "samples", metric], *body])]
    remarks = [f"{line.suite}{f' ({line.media})' if line.media else ''}: {r}" for line in lines for r in line.remarks]
    return "\n".join([*text, *([""] if remarks else []), *remarks])


def write(folder: Path, lines: Sequence[Line], about: Mapping[str, Any]) -> list[Path]:
    """Write ``scores.txt``, ``scores.json`` and ``scores.html``; ``about`` has the model and the versions."""
    page = pages.render("scores.html", title="Scores", columns=COLUMNS, lines=lines, about=about, number=_number)
    files = {
        "scores.txt": text_table(lines) + "\n",
        "scores.json": json.dumps({**about, "suites": [asdict(line) for line in lines]}, indent=1) + "\n",
        "scores.html": page,
    }
    for name, content in files.items():
        write_text(folder / name, content)
    return [folder / name for name in files]


def rescore(file: str, options: Sequence[str]) -> int:
    """``--rescore``: score a predictions file again, write ``..._rescored.json`` beside it and print the table.

    Args:
        file: An evaluation's ``result/SPLIT_stepN.jsonl``.
        options: ``run.metrics=[...]`` and ``run.normalisation=...`` to replace those of that evaluation.

    Returns:
        0; 1 if a source could not be scored.

    Raises:
        DataError: If the file holds no predictions, or nothing could be scored.
        ConfigError: If an option is none of this command.
    """
    from lavis_chatbridge.tasks.predictions import read_predictions
    from lavis_chatbridge.tasks.scoring.records import announce, scores_or_fault, versions

    path = Path(file)
    records = read_predictions(path)
    chosen = settings_of(path, options)
    announce(chosen.metrics)
    by_source = {
        name: scores_or_fault([r for r in records if r.source == name], chosen.metrics, chosen.normalisation)
        for name in dict.fromkeys(record.source for record in records)
    }
    target = path.with_name(f"{path.stem}_rescored.json")
    media = "" if chosen.media == "normal" else f"{' and '.join(chosen.media_modalities)} {chosen.media}"
    lines = [replace(one, suite=one.suite.strip()) for one in lines_of({"": {"by_source": by_source}}, chosen, media)]
    printed, complete = summary(lines, [str(target)], "data set")
    how = {"metrics": chosen.metrics, "normalisation": chosen.normalisation}
    write_json(target, {"by_source": by_source, **how, "versions": versions()})
    print(printed)
    return 0 if complete else 1


def settings_of(predictions: Path, options: Sequence[str] = ()) -> EvaluationSettings:
    """The evaluation settings of a predictions file, from the scores file beside it, overridden by options.

    Raises:
        ConfigError: If an option is not an evaluation setting.
    """
    known = read_json(predictions.with_name(f"{predictions.stem}_metrics.json")) or {}
    keys = ["metrics", "normalisation", "media", "media_modalities", "withheld_words"]
    keys += ["published", "published_stage1", "published_in"]
    given = read_options(options)
    if others := [str(key) for key in given if key != "run"]:
        raise ConfigError(f"--rescore accepts only options of run, such as run.metrics; found {', '.join(others)}")
    return parse(EvaluationSettings, merged({k: known[k] for k in keys if k in known}, given.get("run") or {}), "run")


def _of_split(split: str, scores: Mapping[str, Any], run: EvaluationSettings) -> Iterator[Line]:
    if scores.get("by_source"):
        for source, own in scores["by_source"].items():
            yield _of_source(f"{split} {source}", own, run)
    elif "samples" in scores:
        yield _of_loss(split, scores)
    else:  # a task of LAVIS: some numbers, or none if it only writes answers
        numbers = {key: float(value) for key, value in scores.items() if isinstance(value, (int, float))}
        metric, score = next(iter(numbers.items()), ("", None))
        remarks = [] if numbers else ["its task returns no scores"]
        yield Line(split, metric=metric, score=score, scores=numbers, unit="", remarks=remarks)


def _of_source(name: str, found: Mapping[str, Any], run: EvaluationSettings) -> Line:
    """The line of a result of `GenerationTask`."""
    if not found["samples"] or "fault" in found:
        return _nothing(name, found)
    metric = found.get("metric", "")
    line = Line(name, samples=found["samples"] - found.get("unscored", 0), metric=metric, score=found.get("headline"))
    line.scores, line.intervals = dict(found.get("scores", {})), dict(found.get("intervals", {}))
    line.interval, line.chance = line.intervals.get(metric), found.get("chance")
    line.by_type = dict(found.get("by_type", {}))
    if run.media == "normal":
        first = run.metrics[0] if run.metrics else metric
        line.paper = run.published.get(first, run.published.get(metric))
        line.stage1 = run.published_stage1.get(first, run.published_stage1.get(metric))
    line.remarks = [f"{left_out}: {why}" for left_out, why in found.get("left_out", {}).items()]
    if line.paper is not None and run.published_in:
        line.remarks.append(f"paper: {run.published_in}")
    if found.get("tokenizer") == "python":
        line.remarks.append("no official tokenizer of captions (Java) here: not comparable with published scores")
    if found.get("unscored") and line.scores:
        line.remarks.append(f"{found['unscored']} predictions have no reference to compare with")
    if not line.scores and not run.report_metric:
        line.samples, line.remarks = found["samples"], ["not scored (run.report_metric is false)"]
    elif not line.scores:
        line.status, line.samples = "failed", found["samples"]
        why = "no accepted answers and no facts to compare with: set run.metrics, such as run.metrics=[CIDEr]"
        line.remarks = line.remarks or [why]
    return _with_unread(line, found, run.media)


def _of_loss(split: str, found: Mapping[str, Any]) -> Line:
    """The line of a result of the training tasks."""
    if not found["samples"]:
        return _nothing(split, found)
    losses = {key: value for key, value in found.items() if key.startswith("loss")}
    if not losses:
        return Line(split, status="failed", samples=found["samples"], remarks=["its samples have no target token"])
    line = Line(split, samples=found["samples"], metric="loss", score=losses["loss"], scores=losses, unit="")
    return _with_unread(line, found)


def _nothing(name: str, found: Mapping[str, Any]) -> Line:
    missing = found.get("not_predicted", 0)
    unread = f"none of its samples ({missing}) could be read, the log has the reasons" if missing else ""
    why = found.get("fault") or unread or "it has no samples"
    return Line(name, status="failed", samples=found["samples"], remarks=[why])


def _with_unread(line: Line, found: Mapping[str, Any], media: str = "normal") -> Line:
    if count := found.get("not_predicted"):
        why = "unreadable media" + (", or no similar sample to exchange media with" if media == "shuffled" else "")
        line.remarks.append(f"{count} {'sample has' if count == 1 else 'samples have'} no prediction ({why})")
    return line


def _number(value: float | None, unit: str = "percent") -> str:
    return "" if value is None else f"{value:.1f}" if unit == "percent" else f"{value:.3f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells with aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])
