"""Scores predictions by named metrics, directly after an evaluation or later without a model.

All scores are in percent, as in papers. Metrics that are means over samples (not BLEU, METEOR, precision, recall, F1)
have a 95 % bootstrap interval, in which samples of the same media are resampled together.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.tasks import statistics
from lavis_chatbridge.tasks.predictions import Prediction
from lavis_chatbridge.tasks.scoring import CAPTION_METRICS, HEADLINES, answers, captions, choices, facts

_log = logging.getLogger(__name__)

_PACKAGES = ("lavis-chatbridge", "salesforce-lavis", "pycocoevalcap", "torch", "transformers")
_MEANS = ("ROUGE_L", "CIDEr", "SPICE")
"""Caption metrics whose corpus score is the mean of the samples' scores."""

Types = dict[str, dict[str, dict[str, float]]]
"""Kind of type -> type -> ``samples`` and the mean of each metric."""


@dataclass
class Measured:
    """Scores of some predictions, in total and of each.

    Attributes:
        records: The predictions that have references, answers, options or facts.
        scores: Metric -> percent.
        each: Metric -> ``[n]`` percent; only metrics that are means over samples.
        weights: Metric -> ``[n]``, for means that are weighted.
        by_attribute: Attribute -> number of samples and accuracy, for captions that are scored by facts.
        tokenizer: The tokenizer of captions.
        left_out: Metric -> the reason why it was not computed.
    """

    records: Sequence[Prediction]
    scores: dict[str, float] = field(default_factory=dict)
    each: dict[str, np.ndarray] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    by_attribute: dict[str, dict[str, float]] = field(default_factory=dict)
    tokenizer: str = ""
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, metric: str, each: Sequence[float], score: float | None = None) -> None:
        """Add a metric that is a mean over samples."""
        self.each[metric] = np.asarray(each, dtype=float)
        self.scores[metric] = float(self.each[metric].mean()) if score is None else score

    @property
    def clusters(self) -> list[Any]:
        """The cluster of each sample, for resampling: its media, else only itself."""
        return [tuple(record.media) or number for number, record in enumerate(self.records)]


def measured(
    records: Sequence[Prediction],
    metrics: Sequence[str] = (),
    normalisation: str = "plain",
    values: facts.Values | None = None,
) -> Measured:
    """Score predictions.

    Args:
        records: One per sample.
        metrics: Names of `scoring.Metric`; if empty: exact match of questions, or else attribute accuracy of captions.
        normalisation: For ``exact_match``.
        values: All values of each attribute, for the attribute accuracy; by default those in the records.

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
        return _by_facts([record for record in records if record.facts], values)
    if not metrics:
        metrics, normalisation = ["exact_match"], "squad"
    found = Measured(usable)
    said, truth = [record.prediction for record in usable], [record.truth for record in usable]
    if named := [metric for metric in metrics if metric in CAPTION_METRICS]:
        scored = captions.score_captions(said, truth, named)
        found.scores |= {name: 100.0 * value for name, value in scored.overall.items()}
        found.each |= {name: 100.0 * np.asarray(scored.each[name]) for name in _MEANS if name in scored.each}
        found.tokenizer, found.left_out = scored.tokenizer, scored.left_out
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
        found.add("choice", [choices.right(record) for record in usable])
    return found


def score_records(
    records: Sequence[Prediction],
    metrics: Sequence[str] = (),
    normalisation: str = "plain",
    values: facts.Values | None = None,
) -> dict[str, Any]:
    """The result of `measured` as stored in a scores file.

    Returns:
        ``samples``, ``scores`` (metric -> percent), ``intervals`` (metric -> lower and upper end, None if all samples
        share a medium), ``metric`` and ``headline`` (the first metric's name and score, None if it could not be
        computed), ``by_type`` (`Types`), ``chance`` (of multiple choice), ``tokenizer``, ``left_out`` (metric -> why),
        ``unscored`` (number of predictions without references, answers, options or facts). Only ``samples`` and
        ``fault``, the error text, if nothing can be scored, so that other data sets keep their scores.
    """
    try:
        found = measured(records, metrics, normalisation, values)
    except DataError as error:
        _log.error("not scored: %s", error)
        return {"samples": len(records), "fault": str(error)}
    first = metrics[0] if metrics else next(iter(found.scores), "")
    metric = HEADLINES.get(first, first)
    result: dict[str, Any] = {"samples": len(records), "unscored": len(records) - len(found.records)}
    result |= {"scores": found.scores, "metric": metric, "headline": found.scores.get(metric)}
    result["intervals"] = {
        name: statistics.interval(each, found.weights.get(name), found.clusters) for name, each in found.each.items()
    }
    more: dict[str, Any] = {"by_type": _by_type(found), "tokenizer": found.tokenizer, "left_out": found.left_out}
    if "choice" in metrics:
        more["chance"] = float(np.mean([choices.chance(record) for record in found.records]))
    elif "yes_no" in metrics:
        more["chance"] = 50.0
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


def _by_facts(records: Sequence[Prediction], values: facts.Values | None) -> Measured:
    """Attribute accuracy: the share of all pairs of a caption and an attribute in which the caption is right."""
    found = Measured(records)
    if not records:
        return found
    known = values or facts.values_of(record.facts for record in records)
    rights = [facts.attributes_right(record.prediction, record.facts, known) for record in records]
    counts = np.array([len(right) for right in rights], dtype=float)
    each = 100.0 * np.array([sum(right.values()) for right in rights]) / counts
    found.weights["attribute_accuracy"] = counts
    found.add("attribute_accuracy", each.tolist(), float((each * counts).sum() / counts.sum()))
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
