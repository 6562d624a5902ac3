"""``chatbridge compare A B``: whether one evaluation is better than another, on the samples that both predicted.

A run is a predictions file or a folder with any number of them; several seeds of one model are given with commas
between them. For each data set the table has both scores, their paired difference with a 95 % interval and a p-value,
and the samples that changed most.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from lavis_chatbridge import pages
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.files import write_json, write_text
from lavis_chatbridge.plugin.report import aligned, settings_of
from lavis_chatbridge.tasks import statistics
from lavis_chatbridge.tasks.predictions import Prediction, read_predictions
from lavis_chatbridge.tasks.scoring.records import Measured, measured

_IN_TEXT, _ON_PAGE = 5, 60

Key = tuple[str, str]
"""Evaluation (folder and split) and source."""


@dataclass
class Flip:
    """A sample whose score changed.

    Attributes:
        sample_id: Its id.
        prompt: What the models were given.
        truth: What predictions are compared with.
        media: Modality and path of its files.
        a: Prediction of A.
        b: Prediction of B.
        change: Score of B minus score of A.
    """

    sample_id: str
    prompt: str
    truth: list[str]
    media: list[tuple[str, str]]
    a: str
    b: str
    change: float


@dataclass
class Comparison:
    """One metric of one data set.

    Attributes:
        name: The evaluation and the data set.
        metric: The metric; all figures are in percent.
        a: Score of A on the shared samples, the mean over its seeds.
        b: Score of B.
        a_deviation: Standard deviation over the seeds of A, None for one seed.
        b_deviation: Standard deviation over the seeds of B.
        difference: B minus A with its interval and p-value; None for metrics that are no mean over samples.
        flips: Samples whose score changed, the largest changes first; of a suite's own metric only.
        only_a: Number of samples that only A predicted.
        only_b: Number of samples that only B predicted.
    """

    name: str
    metric: str
    a: float
    b: float
    a_deviation: float | None = None
    b_deviation: float | None = None
    difference: statistics.Difference | None = None
    flips: list[Flip] = field(default_factory=list)
    only_a: int = 0
    only_b: int = 0

    def cells(self) -> list[str]:
        """The comparison as a line of the table."""
        found = self.difference
        spread = [f" ± {d:.1f}" if d is not None else "" for d in (self.a_deviation, self.b_deviation)]
        figures = (
            [f"{found.value:+.1f}", f"{found.low:+.1f} to {found.high:+.1f}", f"{found.p:.4f}"] if found else [""] * 3
        )
        samples = str(found.samples) if found else ""
        return [self.name, self.metric, samples, f"{self.a:.1f}{spread[0]}", f"{self.b:.1f}{spread[1]}", *figures]


COLUMNS = ("data set", "metric", "samples", "A", "B", "B - A", "95 %", "p")


def command(
    run_a: Annotated[str, typer.Argument(metavar="A", help="Predictions file or folder; seeds with commas between.")],
    run_b: Annotated[str, typer.Argument(metavar="B", help="The same of the other model.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder of comparison.{txt,json,html}.")] = Path(
        "output/comparison"
    ),
) -> int:
    """Compare two evaluations of the same samples."""
    found = compare(_seeds(run_a), _seeds(run_b))
    text = table(found)
    write_text(output / "comparison.txt", text + "\n")
    write_json(output / "comparison.json", {"a": run_a, "b": run_b, "comparisons": [asdict(one) for one in found]})
    values: dict[str, Any] = {"a": run_a, "b": run_b, "columns": COLUMNS, "comparisons": found, "most": _ON_PAGE}
    write_text(output / "comparison.html", pages.render("comparison.html", title="Comparison", **values))
    print(f"{text}\n\nwritten to {output}/comparison.{{txt,json,html}}")
    return 0


def compare(runs_a: Sequence[str], runs_b: Sequence[str]) -> list[Comparison]:
    """Compare the seeds of two models.

    Args:
        runs_a: Predictions files or folders of A, one for each seed.
        runs_b: Those of B.

    Raises:
        DataError: If a run has no predictions, or they have no data set or no sample in common.
    """
    a, b = [_load(Path(run)) for run in runs_a], [_load(Path(run)) for run in runs_b]
    shared = [key for key in a[0] if all(key in run for run in [*a, *b])]
    if not shared:
        names = [", ".join(" ".join(key).strip() for key in run[0]) for run in (a, b)]
        raise DataError(f"the runs have no data set in common: A has {names[0]}; B has {names[1]}")
    return [one for key in shared for one in _compared(key, [run[key] for run in a], [run[key] for run in b])]


def table(found: Sequence[Comparison]) -> str:
    """The comparisons for a terminal, and below each data set the samples that changed most."""
    text = [aligned([COLUMNS, *(one.cells() for one in found)])]
    for one in found:
        if one.only_a or one.only_b:
            text.append(f"\n{one.name}: {one.only_a} samples only in A and {one.only_b} only in B are not compared")
        if one.flips:
            better = sum(flip.change > 0 for flip in one.flips)
            text.append(f"\n{one.name}: {better} samples better in B, {len(one.flips) - better} worse ({one.metric})")
        for flip in one.flips[:_IN_TEXT]:
            text.append(f"  {flip.change:+.0f} {flip.sample_id}: {flip.a!r} -> {flip.b!r}, right: {flip.truth[:2]}")
    return "\n".join(text)


@dataclass
class _Evaluated:
    """The predictions of one data set, and where they stand."""

    path: Path
    records: dict[tuple[str, int | None], Prediction]


def _seeds(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _load(run: Path) -> dict[Key, _Evaluated]:
    """The predictions of a run by evaluation and source."""
    files = [run] if run.is_file() else sorted(p for p in run.rglob("*.jsonl") if not p.name.startswith("."))
    if not files:
        raise DataError(f"{run} is neither a predictions file nor a folder with some (result/SPLIT_stepN.jsonl)")
    found: dict[Key, _Evaluated] = {}
    for file in files:
        folder = "" if run.is_file() else str(file.parent.relative_to(run)).removesuffix("result").strip("/.")
        name = f"{folder} {re.sub(r'_step[^_]*$', '', file.stem)}".strip()
        for record in read_predictions(file):
            own = found.setdefault((name, record.source), _Evaluated(file, {}))
            own.records[record.sample_id, record.index] = record
    return found


def _compared(key: Key, a: Sequence[_Evaluated], b: Sequence[_Evaluated]) -> list[Comparison]:
    """The comparisons of one data set, its own metric first."""
    shared = [place for place in a[0].records if all(place in one.records for one in [*a, *b])]
    name = " ".join(key).strip()
    if not shared:
        raise DataError(f"{name}: the runs have no sample in common")
    how = settings_of(a[0].path)
    scored_a, scored_b = (
        [measured([one.records[place] for place in shared], how.metrics, how.normalisation) for one in runs]
        for runs in (a, b)
    )
    comparisons: list[Comparison] = []
    for metric in scored_a[0].scores:
        (mean_a, deviation_a), (mean_b, deviation_b) = (
            statistics.over_seeds([one.scores[metric] for one in runs if metric in one.scores] or [0.0])
            for runs in (scored_a, scored_b)
        )
        one = Comparison(name, metric, mean_a, mean_b)
        one.a_deviation = deviation_a if len(a) > 1 else None
        one.b_deviation = deviation_b if len(b) > 1 else None
        one.only_a, one.only_b = len(a[0].records) - len(shared), len(b[0].records) - len(shared)
        if all(metric in run.each for run in [*scored_a, *scored_b]):
            each_a, each_b = (np.mean([run.each[metric] for run in runs], axis=0) for runs in (scored_a, scored_b))
            first = scored_a[0]
            one.difference = statistics.paired(each_a, each_b, first.weights.get(metric), first.clusters)
            one.flips = _flips(scored_a[0], scored_b[0], each_b - each_a) if not comparisons else []
        comparisons.append(one)
    return comparisons


def _flips(a: Measured, b: Measured, changes: np.ndarray) -> list[Flip]:
    order = [int(number) for number in np.argsort(-np.abs(changes), kind="stable") if changes[number]]
    return [
        Flip(one.sample_id, one.prompt, one.truth, one.media, one.prediction, other.prediction, float(changes[number]))
        for number in order
        for one, other in [(a.records[number], b.records[number])]
    ]
