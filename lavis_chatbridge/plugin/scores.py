"""What an evaluation found, as lines of the table of scores: of one configuration, or of a suite among others.

It knows the metrics that this package's tasks give, and that LAVIS's own give other ones or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.plugin.ablation import Condition
from lavis_chatbridge.plugin.suite_table import Line, text_table
from lavis_chatbridge.tasks.settings import EvaluationSettings

_OF_FACTS = ("exact_match", "attribute_accuracy", "all_attributes_right", "text_prior")
"""Shares that are found without ``run.metrics``; the first that is there is the score."""


def report(lines: Sequence[Line], written: Sequence[str], first: str = "split and data set") -> tuple[str, bool]:
    """What is printed at the end of an evaluation: the scores of every split, and which files hold them.

    Args:
        lines: The table, see `lines_of`.
        written: The files, or the folder that they are in.
        first: What the first column is called.

    Returns:
        The text, and whether every source of every split was scored.

    Raises:
        DataError: If nothing could be scored.
    """
    failed = [line for line in lines if line.status == "failed"]
    if len(failed) == len(lines):
        faults = dict.fromkeys(
            ": ".join(filter(None, (line.suite, remark))) for line in lines for remark in line.remarks
        )
        raise DataError(f"nothing could be scored. {'; '.join(faults)}")
    return f"{text_table(lines, first)}\n\nwritten to {', '.join(dict.fromkeys(written))}", not failed


def files_of(found: Mapping[str, Any]) -> list[str]:
    """The files that an evaluation has written: split -> its metrics, as it gives them."""
    return [path for split in found.values() for path in (split or {}).get("written", ())]


def lines_of(found: Mapping[str, Any], run: EvaluationSettings) -> list[Line]:
    """A line for each source of each split.

    Args:
        found: Split -> its metrics.
        run: How it was scored.
    """
    lines = [line for split, scores in found.items() for line in _of_split(split, scores or {}, run)]
    for line in lines:
        line.media = "" if run.media == "normal" else Condition(run.media, tuple(run.media_kinds)).label
    return lines


def _of_split(split: str, scores: Mapping[str, Any], run: EvaluationSettings) -> Iterator[Line]:
    if scores.get("by_source"):
        for source, own in scores["by_source"].items():
            yield _of_source(f"{split} {source}", own, run)
    elif "samples" in scores:
        yield _of_loss(split, scores)
    else:
        yield _of_lavis(split, scores)


def _of_source(name: str, scores: Mapping[str, Any], run: EvaluationSettings) -> Line:
    """A line of what `GenerationTask` gives."""
    if not scores["samples"]:
        return _unread(name, scores)
    if "fault" in scores:
        return Line(name, status="failed", samples=scores["samples"], remarks=[scores["fault"]])
    shares = {key: 100.0 * scores[key] for key in _OF_FACTS if key in scores}
    if "scores" in scores:
        line = Line.of_scores(name, scores, run.metrics, run.published if run.media == "normal" else {})
    elif shares:
        metric, score = next(iter(shares.items()))
        line = Line(name, samples=scores["samples"], metric=metric, score=score, scores=shares)
    elif run.report_metric:
        why = "no accepted answers and no facts to compare with: name run.metrics, such as run.metrics=[CIDEr]"
        line = Line(name, status="failed", samples=scores["samples"], remarks=[why])
    else:
        line = Line(name, samples=scores["samples"], remarks=["not scored (run.report_metric is false)"])
    return _with_unread(line, scores, run.media)


def _of_loss(split: str, scores: Mapping[str, Any]) -> Line:
    """A line of what the training tasks give."""
    if not scores["samples"]:
        return _unread(split, scores)
    losses = {key: value for key, value in scores.items() if key.startswith("loss")}
    if not losses:
        return Line(split, status="failed", samples=scores["samples"], remarks=["its samples have no target token"])
    line = Line(split, samples=scores["samples"], metric="loss", score=losses["loss"], scores=losses, unit="")
    return _with_unread(line, scores)


def _of_lavis(split: str, scores: Mapping[str, Any]) -> Line:
    """A line of what a task of LAVIS's gives: some numbers, or nothing where it only writes answers."""
    numbers = {key: float(value) for key, value in scores.items() if isinstance(value, (int, float))}
    metric, score = next(iter(numbers.items()), ("", None))
    remarks = [] if numbers else ["its task gives no scores"]
    return Line(split, metric=metric, score=score, scores=numbers, unit="", remarks=remarks)


def _unread(name: str, scores: Mapping[str, Any]) -> Line:
    missing = scores.get("not_predicted", 0)
    why = f"none of its samples ({missing}) could be read, the log says why" if missing else "it has no samples"
    return Line(name, status="failed", samples=0, remarks=[why])


def _with_unread(line: Line, scores: Mapping[str, Any], media: str = "normal") -> Line:
    if count := scores.get("not_predicted"):
        why = "unreadable media" + (", or none like them to exchange" if media == "shuffled" else "")
        line.remarks.append(f"{count} {'sample has' if count == 1 else 'samples have'} no prediction ({why})")
    return line
