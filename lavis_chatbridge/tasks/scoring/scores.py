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
from lavis_chatbridge.tasks.settings import CAPTION_METRICS, EvaluationSettings
from lavis_chatbridge.tasks.statistics import Measured, interval

_log = logging.getLogger(__name__)

_PACKAGES = ("lavis-chatbridge", "salesforce-lavis", "pycocoevalcap", "torch", "transformers")
Types = dict[str, dict[str, dict[str, float]]]
"""Axis -> type -> ``samples`` and the mean of each metric."""


def measured(
    predictions: Sequence[Prediction], how: EvaluationSettings, learnt: Sequence[answers.Facts] = ()
) -> Measured:
    """Score predictions.

    Args:
        predictions: One per sample.
        how: Its metrics, by default exact match of questions, or else attribute accuracy of captions.
        learnt: The facts of the training samples, whose values a caption may confuse with the right one.

    Raises:
        DataError: If a sample occurs twice, or no prediction can be scored.
    """
    metrics, normalisation = how.metrics, how.normalisation
    for (name, _), count in Counter((one.sample_id, one.index) for one in predictions).items():
        if count > 1:
            raise DataError(f"sample {name!r} was predicted twice")
    usable = [one for one in predictions if (one.truth if metrics else one.answers)]
    if metrics and not usable:
        raise DataError(f"none of {len(predictions)} predictions has references or answers to compare with")
    if not usable:
        return _by_facts([one for one in predictions if one.facts], learnt)
    if not metrics:
        metrics, normalisation = ["exact_match"], "squad"
    found = Measured(usable)
    texts, truth = [one.prediction for one in usable], [one.truth for one in usable]
    if named := [metric for metric in metrics if metric in CAPTION_METRICS]:
        captions.score(found, named)
    if "vqa_accuracy" in metrics:
        score, each = answers.vqa_accuracy(texts, truth)
        found.add("vqa_accuracy", each, score)
    if "exact_match" in metrics:
        found.add("exact_match", answers.exact_match(texts, truth, normalisation))
    if "yes_no" in metrics:
        scores, each = answers.yes_no(texts, truth)
        found.add("yes_no", each)
        found.scores |= scores
    if "choice" in metrics:  # the share of the asked orders of the options in which the right one was chosen
        right = [(one.chosen.count(one.meta.get("correct", -1)), len(one.chosen)) for one in usable]
        found.add("choice", [100.0 * count / max(1, orders) for count, orders in right])
    return found


def scored(
    predictions: Sequence[Prediction], how: EvaluationSettings, learnt: Sequence[answers.Facts] = ()
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
        found = measured(predictions, how, learnt)
    except DataError as error:
        _log.error("not scored: %s", error)
        return {"samples": len(predictions), "fault": str(error)}
    first = how.metrics[0] if how.metrics else next(iter(found.scores), "")
    metric = "BLEU_4" if first == "BLEU" else first
    optional = {
        "by_type": _by_type(found),
        "tokenizer": found.tokenizer,
        "left_out": found.left_out,
        "chance": _chance(found.predictions, how.metrics, learnt),
    }
    return {
        "samples": len(predictions),
        "unscored": len(predictions) - len(found.predictions),
        "scores": found.scores,
        "metric": metric,
        "headline": found.scores.get(metric),
        "intervals": {m: interval(each, found.weights.get(m), found.clusters) for m, each in found.each.items()},
    } | {key: value for key, value in optional.items() if value}


def types_of(prediction: Prediction) -> dict[str, str]:
    """Axis -> type of a question: ``meta.type``, ``turn`` and ``question_type``, and all of ``meta.types``."""
    meta = prediction.meta
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


def _chance(predictions: Sequence[Prediction], metrics: Sequence[str], learnt: Sequence[answers.Facts]) -> float | None:
    """The score of guessing in percent, if it is known."""
    if learnt and (facts := [one.facts for one in predictions if one.facts]):
        return 100.0 * answers.text_prior(learnt, facts)
    if "choice" in metrics:
        return float(np.mean([100.0 / max(1, len(one.meta.get("options") or ())) for one in predictions]))
    return 50.0 if "yes_no" in metrics else None


def _by_facts(predictions: Sequence[Prediction], learnt: Sequence[answers.Facts]) -> Measured:
    """Attribute accuracy: the share of all pairs of a caption and an attribute in which the caption is right."""
    found = Measured(predictions)
    if not predictions:
        return found
    values = answers.frequencies([*learnt, *(one.facts for one in predictions)])
    rights = [
        {name: answers.names_exactly(one.prediction, value, values[name]) for name, value in one.facts.items()}
        for one in predictions
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
    for number, prediction in enumerate(found.predictions):
        for axis, name in types_of(prediction).items():
            members.setdefault(axis, {}).setdefault(name, []).append(number)
    result: Types = {
        axis: {
            name: {"samples": len(chosen), **{m: float(each[chosen].mean()) for m, each in found.each.items()}}
            for name, chosen in sorted(types.items())
        }
        for axis, types in members.items()
    }
    return result | ({"attribute": found.by_attribute} if found.by_attribute else {})
