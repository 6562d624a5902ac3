"""Scores predictions by named metrics, directly after an evaluation or later without a model.

All scores are in percent, as in papers. Metrics that are means over samples (not BLEU, METEOR, precision, recall, F1)
have a 95 % bootstrap interval, in which samples of the same media are resampled together.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.tasks.predictions import Prediction
from lavis_chatbridge.tasks.scoring import answers, captions
from lavis_chatbridge.tasks.settings import CAPTION_METRICS
from lavis_chatbridge.tasks.statistics import Measured, interval

_log = logging.getLogger(__name__)

_PACKAGES = ("lavis-chatbridge", "salesforce-lavis", "pycocoevalcap", "torch", "transformers")
Types = dict[str, dict[str, dict[str, float]]]
"""Kind of type -> type -> ``samples`` and the mean of each metric."""


def measured(
    records: Sequence[Prediction],
    metrics: Sequence[str] = (),
    normalisation: str = "plain",
    learnt: Sequence[answers.Facts] = (),
) -> Measured:
    """Score predictions.

    Args:
        records: One per sample.
        metrics: Names of `settings.Metric`; if empty: exact match of questions, or else attribute accuracy of captions.
        normalisation: For ``exact_match``.
        learnt: The facts of the training samples, whose values a caption may confuse with the right one.

    Raises:
        DataError: If a sample occurs twice, or no record can be scored.
    """
    for (name, _), count in Counter((record.sample_id, record.index) for record in records).items():
        if count > 1:
            raise DataError(f"sample {name!r} was predicted twice")
    usable = [record for record in records if (record.truth if metrics else record.answers)]
    if metrics and not usable:
        raise DataError(f"none of {len(records)} predictions has references or answers to compare with")
    if not usable:
        return _by_facts([record for record in records if record.facts], learnt)
    if not metrics:
        metrics, normalisation = ["exact_match"], "squad"
    found = Measured(usable)
    said, truth = [record.prediction for record in usable], [record.truth for record in usable]
    if named := [metric for metric in metrics if metric in CAPTION_METRICS]:
        captions.score(found, named)
    if "vqa_accuracy" in metrics:
        score, each = answers.vqa_accuracy(said, truth)
        found.add("vqa_accuracy", each, score)
    if "exact_match" in metrics:
        found.add("exact_match", answers.exact_match(said, truth, normalisation))
    if "yes_no" in metrics:
        scores, each = answers.yes_no(said, truth)
        found.add("yes_no", each)
        found.scores |= scores
    if "choice" in metrics:
        found.add("choice", [_share_right(record) for record in usable])
    return found


def score_records(
    records: Sequence[Prediction],
    metrics: Sequence[str] = (),
    normalisation: str = "plain",
    learnt: Sequence[answers.Facts] = (),
) -> dict[str, Any]:
    """The result of `measured` as stored in a scores file.

    Returns:
        ``samples``, ``scores`` (metric -> percent), ``intervals`` (metric -> lower and upper end, None if all samples
        share a medium), ``metric`` and ``headline`` (the first metric's name and score, None if it could not be
        computed), ``by_type`` (`Types`), ``chance`` (the score of guessing), ``tokenizer``, ``left_out`` (metric ->
        why), ``unscored`` (number of predictions without references, answers, options or facts). Only ``samples`` and
        ``fault``, the error text, if nothing can be scored, so that other data sets keep their scores.
    """
    try:
        found = measured(records, metrics, normalisation, learnt)
    except DataError as error:
        _log.error("not scored: %s", error)
        return {"samples": len(records), "fault": str(error)}
    first = metrics[0] if metrics else next(iter(found.scores), "")
    metric = "BLEU_4" if first == "BLEU" else first
    result: dict[str, Any] = {"samples": len(records), "unscored": len(records) - len(found.records)}
    result |= {"scores": found.scores, "metric": metric, "headline": found.scores.get(metric)}
    result["intervals"] = {
        name: interval(each, found.weights.get(name), found.clusters) for name, each in found.each.items()
    }
    more: dict[str, Any] = {"by_type": _by_type(found), "tokenizer": found.tokenizer, "left_out": found.left_out}
    more["chance"] = _chance(found.records, metrics, learnt)
    return result | {key: value for key, value in more.items() if value}


def types_of(record: Prediction) -> dict[str, str]:
    """Kind of type -> type of a question: ``meta.type``, ``turn`` and ``question_type``, and all of ``meta.types``."""
    meta = record.meta
    found = {"type": meta.get("type"), "turn": meta.get("turn"), "question type": meta.get("question_type")}
    if found["question type"] == found["type"]:
        del found["question type"]
    found |= meta.get("types") or {}
    named = {key: " / ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for key, v in found.items()}
    return {str(key): str(value) for key, value in named.items() if value not in (None, "")}


def versions() -> dict[str, str]:
    """The versions of all packages that affect a score."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def _share_right(record: Prediction) -> float:
    """Percent of the asked orders of the options in which the right one was chosen."""
    return 100.0 * record.chosen.count(record.meta.get("correct", -1)) / max(1, len(record.chosen))


def _chance(records: Sequence[Prediction], metrics: Sequence[str], learnt: Sequence[answers.Facts]) -> float | None:
    """The score of guessing in percent, if it is known."""
    if learnt and (seen := [record.facts for record in records if record.facts]):
        return 100.0 * answers.text_prior(learnt, seen)
    if "choice" in metrics:
        return float(np.mean([100.0 / max(1, len(record.meta.get("options") or ())) for record in records]))
    return 50.0 if "yes_no" in metrics else None


def _by_facts(records: Sequence[Prediction], learnt: Sequence[answers.Facts]) -> Measured:
    """Attribute accuracy: the share of all pairs of a caption and an attribute in which the caption is right."""
    found = Measured(records)
    if not records:
        return found
    values = answers.frequencies([*learnt, *(record.facts for record in records)])
    rights = [
        {name: answers.names_exactly(record.prediction, value, values[name]) for name, value in record.facts.items()}
        for record in records
    ]
    counts = np.array([len(right) for right in rights], dtype=float)
    each = 100.0 * np.array([sum(right.values()) for right in rights]) / counts
    found.weights["attribute_accuracy"] = counts
    found.add("attribute_accuracy", each, float((each * counts).sum() / counts.sum()))
    found.add("all_attributes_right", [100.0 * all(right.values()) for right in rights])
    for name in dict.fromkeys(name for right in rights for name in right):
        own = [100.0 * right[name] for right in rights if name in right]
        found.by_attribute[name] = {"samples": len(own), "attribute_accuracy": float(np.mean(own))}
    return found


def _by_type(found: Measured) -> Types:
    members: dict[str, dict[str, list[int]]] = {}
    for number, record in enumerate(found.records):
        for axis, name in types_of(record).items():
            members.setdefault(axis, {}).setdefault(name, []).append(number)
    result: Types = {
        axis: {
            name: {"samples": len(chosen), **{m: float(each[chosen].mean()) for m, each in found.each.items()}}
            for name, chosen in sorted(types.items())
        }
        for axis, types in members.items()
    }
    return result | ({"attribute": found.by_attribute} if found.by_attribute else {})
