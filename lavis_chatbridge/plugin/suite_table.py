"""The table of scores as text, JSON and HTML: a line for each benchmark, the paper's figure beside the score."""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lavis_chatbridge.files import write_text
from lavis_chatbridge.tasks.scoring.names import HEADLINES

_log = logging.getLogger(__name__)

_COLUMNS = ("suite", "media", "samples", "metric", "score", "paper", "drop", "other scores", "remarks")
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;width:100%}td,th{padding:.35rem .6rem;border-bottom:1px solid #ddd;text-align:left}"
    "td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}tr.skipped{color:#888}"
)


@dataclass
class Line:
    """One line of the table.

    Attributes:
        suite: The benchmark.
        media: ``""`` as they are, else what became of which (``"image withheld"``).
        status: ``"scored"``, ``"missing"`` (its data are not there) or ``"failed"`` (nothing could be scored).
        samples: How many were scored.
        metric: The suite's own metric.
        score: Its value; None where there is none.
        paper: The paper's figure for that metric.
        drop: How much less than with all media.
        scores: All metrics.
        unit: Of the scores: ``"percent"``, or ``""`` for a loss and what LAVIS's tasks give.
        remarks: What must be known to read the score: what is missing, left out or not comparable.
    """

    suite: str
    media: str = ""
    status: str = "scored"
    samples: int | None = None
    metric: str = ""
    score: float | None = None
    paper: float | None = None
    drop: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    unit: str = "percent"
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def of_scores(
        cls, suite: str, scores: Mapping[str, Any], metrics: Sequence[str], published: Mapping[str, float]
    ) -> Line:
        """A line of what `score_records` found."""
        metric = HEADLINES.get(metrics[0], metrics[0])
        remarks = [f"{name}: {why}" for name, why in (scores.get("left_out") or {}).items()]
        if scores.get("tokenizer") == "python":
            remarks.append(
                "captions were not tokenised by the official tokenizer: not comparable with published scores"
            )
        if scores.get("unscored"):
            remarks.append(f"{scores['unscored']} predictions have nothing to be compared with")
        return cls(
            suite,
            status="scored" if scores["scores"] else "failed",
            samples=scores["samples"] - scores.get("unscored", 0),
            metric=metric,
            score=scores.get("headline"),
            paper=published.get(metrics[0], published.get(metric)),
            scores=dict(scores["scores"]),
            remarks=remarks,
        )


def failed(name: str, media: str, error: Exception) -> Line:
    """The line of what could not be scored.

    Args:
        name: What was to be scored.
        media: What became of which media.
        error: Why not.
    """
    _log.error("%s%s failed: %s", name, f" ({media})" if media else "", error)
    return Line(name, media, "failed", remarks=[" ".join(str(error).split())])


def text_table(lines: Sequence[Line], first: str = _COLUMNS[0]) -> str:
    """The table for a terminal; remarks stand below it.

    Args:
        lines: The table.
        first: What the first column is called.
    """
    rows = [_cells(line)[:-1] for line in lines]
    used = [i for i in range(len(_COLUMNS) - 1) if any(row[i] for row in rows)]
    head = [first, *(_COLUMNS[i] for i in used[1:])]
    body = [[row[i] for i in used] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *body]
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    remarks = [f"{line.suite}{f' ({line.media})' if line.media else ''}: {r}" for line in lines for r in line.remarks]
    return "\n".join([*text, *([""] if remarks else []), *remarks])


def write(folder: Path, lines: Sequence[Line], about: Mapping[str, Any]) -> list[Path]:
    """Write ``scores.txt``, ``scores.json`` and ``scores.html``.

    Args:
        folder: Where to.
        lines: The table.
        about: The model and the versions.
    """
    record = {**about, "suites": [asdict(line) for line in lines]}
    files = {
        "scores.txt": text_table(lines) + "\n",
        "scores.json": json.dumps(record, indent=1, ensure_ascii=False) + "\n",
        "scores.html": _page(lines, about),
    }
    for name, content in files.items():
        write_text(folder / name, content)
    return [folder / name for name in files]


def _cells(line: Line) -> list[str]:
    others = {name: value for name, value in line.scores.items() if name != line.metric}
    return [
        line.suite,
        line.media,
        "" if line.samples is None else str(line.samples),
        line.metric,
        _number(line.score, line.unit) if line.status == "scored" else line.status,
        _number(line.paper),
        _number(line.drop),
        ", ".join(f"{name} {_number(value, line.unit)}" for name, value in others.items()),
        "; ".join(line.remarks),
    ]


def _number(value: float | None, unit: str = "percent") -> str:
    return "" if value is None else f"{value:.1f}" if unit == "percent" else f"{value:.3f}"


def _page(lines: Sequence[Line], about: Mapping[str, Any]) -> str:
    numeric = {_COLUMNS.index(name) for name in ("samples", "score", "paper", "drop")}

    def row(cells: Sequence[str], tag: str, kind: str = "") -> str:
        inner = "".join(
            f"<{tag}{' class=n' if i in numeric else ''}>{html.escape(cell)}</{tag}>" for i, cell in enumerate(cells)
        )
        return f"<tr{kind}>{inner}</tr>"

    body = "\n".join(row(_cells(line), "td", "" if line.status == "scored" else " class=skipped") for line in lines)
    facts = "; ".join(f"{key}: {value}" for key, value in about.items() if not isinstance(value, Mapping))
    versions = ", ".join(f"{name} {version}" for name, version in dict(about.get("versions") or {}).items())
    return (
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>ChatBridge: scores</title><style>{_STYLE}</style>\n"
        f"<h1>Scores</h1>\n<p>{html.escape(facts)}</p>\n<table>\n{row(_COLUMNS, 'th')}\n{body}\n</table>\n"
        f"<p>All scores in percent. {html.escape(versions)}</p></html>\n"
    )
