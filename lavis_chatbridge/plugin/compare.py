"""``chatbridge compare A B``: compares two evaluations on the samples that both predicted.

A run is a predictions file or a folder of them; seeds of one model are separated by commas. For each data set the table
has both scores, their paired difference with a 95 % interval and a p-value, and the samples that changed most.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.plugin.report import aligned, settings_of, write
from lavis_chatbridge.tasks.predictions import Prediction, read_predictions
from lavis_chatbridge.tasks.scoring.scores import Difference, Measured, measured, paired

COLUMNS = ("data set", "metric", "samples", "A", "B", "B - A", "95 %", "p")
_IN_TEXT, _ON_PAGE = 5, 60

Predictions = dict[tuple[str, int], Prediction]
"""The predictions of one data set by sample id and index."""


@dataclass(frozen=True)
class Flip:
    """A sample whose score changed by ``change`` points, with the predictions of A and of B."""

    sample_id: str
    prompt: str
    truth: list[str]
    media: list[tuple[str, str]]
    a: str
    b: str
    change: float


@dataclass
class Comparison:
    """One metric of one data set, in percent.

    ``a`` and ``b`` are means over seeds, with standard deviations if there are several. ``difference`` is None for
    metrics that are not means over samples. ``flips`` has the samples whose main score changed, the largest changes
    first. ``only_a`` and ``only_b`` count samples that are not compared.
    """

    name: str
    metric: str
    a: float
    a_deviation: float | None
    b: float
    b_deviation: float | None
    only_a: int
    only_b: int
    difference: Difference | None = None
    flips: list[Flip] = field(default_factory=list)

    def cells(self) -> list[str]:
        """The text of each of `COLUMNS`."""
        scores = [
            f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"
            for mean, deviation in ((self.a, self.a_deviation), (self.b, self.b_deviation))
        ]
        if (found := self.difference) is None:
            return [self.name, self.metric, "", *scores, "", "", ""]
        ends = "-" if found.low is None else f"{found.low:+.1f} to {found.high:+.1f}"
        p = "-" if found.p is None else f"{found.p:.4f}"
        return [self.name, self.metric, str(found.samples), *scores, f"{found.value:+.1f}", ends, p]


def command(
    run_a: Annotated[str, typer.Argument(metavar="A", help="Predictions file or folder; separate seeds by commas.")],
    run_b: Annotated[str, typer.Argument(metavar="B", help="The same of the other model.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder of comparison.{txt,json,html}.")] = Path(
        "output/comparison"
    ),
) -> None:
    """Compare two evaluations of the same samples."""
    output.mkdir(parents=True, exist_ok=True)  # before the work
    found = compare(run_a.split(","), run_b.split(","))
    text, about = table(found), {"a": run_a, "b": run_b}
    content = {**about, "comparisons": [asdict(one) for one in found]}
    page = {**about, "columns": COLUMNS, "comparisons": found, "most": _ON_PAGE}
    write(output, "comparison", text, content, page)
    print(f"{text}\n\nwritten to {output}/comparison.{{txt,json,html}}")


def compare(runs_a: Sequence[str], runs_b: Sequence[str]) -> list[Comparison]:
    """Compare two models by their predictions files or folders, one for each seed."""
    a, b = ([_load(Path(run.strip())) for run in runs] for runs in (runs_a, runs_b))
    shared = [name for name in a[0] if all(name in run for run in [*a, *b])]
    if not shared:
        raise DataError(f"the runs have no data set in common: A has {', '.join(a[0])}; B has {', '.join(b[0])}")
    found: list[Comparison] = []
    for name in shared:
        found += _compared(name, a[0][name][0], [run[name][1] for run in a], [run[name][1] for run in b])
    return found


def table(found: Sequence[Comparison]) -> str:
    """The comparisons as text, with the samples that changed most below each data set."""
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


def _load(run: Path) -> dict[str, tuple[Path, Predictions]]:
    """Evaluation and source -> the file and predictions of a run."""
    files = [run] if run.is_file() else sorted(p for p in run.rglob("*.jsonl") if not p.name.startswith("."))
    if not files:
        raise DataError(f"{run} is neither a predictions file nor a folder of them (result/SPLIT_stepN.jsonl)")
    found: dict[str, tuple[Path, Predictions]] = {}
    for file in files:
        folder = "" if run.is_file() else str(file.parent.relative_to(run)).removesuffix("result").strip("/.")
        split = re.sub(r"_step[^_]*$", "", file.stem)
        for prediction in read_predictions(file):
            name = " ".join(filter(None, [folder, split, prediction.source]))
            found.setdefault(name, (file, {}))[1][prediction.sample_id, prediction.index] = prediction
    return found


def _compared(name: str, file: Path, runs_a: Sequence[Predictions], runs_b: Sequence[Predictions]) -> list[Comparison]:
    """The comparisons of one data set, its main metric first."""
    shared = [key for key in runs_a[0] if all(key in run for run in [*runs_a, *runs_b])]
    if not shared:
        raise DataError(f"{name}: the runs have no sample in common")
    how = settings_of(file)
    a, b = ([measured([run[key] for key in shared], how) for run in runs] for runs in (runs_a, runs_b))
    left_out = len(runs_a[0]) - len(shared), len(runs_b[0]) - len(shared)
    found: list[Comparison] = []
    for metric in (name for name in a[0].scores if all(name in run.scores for run in (*a, *b))):
        scores_a, scores_b = ([run.scores[metric] for run in runs] for runs in (a, b))
        one = Comparison(name, metric, *_over_seeds(scores_a), *_over_seeds(scores_b), *left_out)
        if all(metric in run.each for run in (*a, *b)):
            each_a, each_b = (np.mean([run.each[metric] for run in runs], axis=0) for runs in (a, b))
            one.difference = paired(each_a, each_b, a[0].weights.get(metric), a[0].clusters)
            one.flips = [] if found else _flips(a[0], b[0], each_b - each_a)
        found.append(one)
    return found


def _over_seeds(scores: Sequence[float]) -> tuple[float, float | None]:
    """Mean and, of several seeds, standard deviation (n - 1)."""
    return float(np.mean(scores)), float(np.std(scores, ddof=1)) if len(scores) > 1 else None


def _flips(a: Measured, b: Measured, changes: np.ndarray) -> list[Flip]:
    order = np.argsort(-np.abs(changes), kind="stable").tolist()
    pairs = [(a.predictions[n], b.predictions[n], float(changes[n])) for n in order if changes[n]]
    return [Flip(x.sample_id, x.prompt, x.truth, x.media, x.prediction, y.prediction, c) for x, y, c in pairs]
