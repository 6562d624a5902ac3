"""Scores predictions by named metrics, directly after an evaluation or later without a model, and compares two models.

All scores are in percent, as in papers. Metrics that are means over samples (not BLEU, METEOR, precision, recall, F1)
have a 95 % bootstrap interval, in which samples of the same media are resampled together (cluster bootstrap). The
p-value of a comparison is that of a permutation test that swaps the two values of a cluster. Both are scipy's.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, TypeAlias

import numpy as np

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.tasks.predictions import Prediction
from lavis_chatbridge.tasks.scoring import answers, captions
from lavis_chatbridge.tasks.settings import CAPTION_METRICS, EvaluationSettings

_log = logging.getLogger(__name__)

_PACKAGES = ("lavis-chatbridge", "salesforce-lavis", "pycocoevalcap", "torch", "transformers")
_RESAMPLES, _FEWEST = 2000, 500  # more than 10,000 clusters get fewer, since their intervals need no more
_AT_ONCE = 5_000_000  # entries of a block of resamples
Types = dict[str, dict[str, dict[str, float]]]
"""Axis -> type -> ``samples`` and the mean of each metric."""
Values: TypeAlias = Sequence[float] | np.ndarray


@dataclass
class Measured:
    """Scores of some predictions, in total and of each.

    Attributes:
        predictions: Those with references, answers, options or facts.
        scores: Metric -> percent.
        each: Metric -> ``[n]`` percent; only metrics that are means over samples.
        weights: Metric -> ``[n]``, for means that are weighted.
        by_attribute: Attribute -> number of samples and accuracy, for captions that are scored by facts.
        tokenizer: Of captions: ``"ptb"`` (official, Java) or ``"python"`` (a rule); their scores are not comparable.
        left_out: Metric -> the reason why it was not computed.
    """

    predictions: Sequence[Prediction]
    scores: dict[str, float] = field(default_factory=dict)
    each: dict[str, np.ndarray] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    by_attribute: dict[str, dict[str, float]] = field(default_factory=dict)
    tokenizer: str = ""
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, metric: str, each: Sequence[float] | np.ndarray, score: float | None = None) -> None:
        """Add a metric that is a mean over samples."""
        self.each[metric] = np.asarray(each, dtype=float)
        self.scores[metric] = float(self.each[metric].mean()) if score is None else score

    @property
    def clusters(self) -> list[Any]:
        """The cluster of each sample, for resampling: its media, else only itself."""
        return [tuple(prediction.media) or number for number, prediction in enumerate(self.predictions)]


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
        caption = captions.score(texts, truth, named)
        found.scores, found.each, found.left_out = caption.scores, caption.each, caption.left_out
        found.tokenizer = caption.tokenizer
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


# --- Intervals and comparisons ---


@dataclass(frozen=True)
class Difference:
    """The mean of B minus the mean of A on the same samples, the ends of its 95 % interval, its two-sided p-value.

    One cluster has neither interval nor p-value: they are None.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    samples: int


def interval(
    values: Values, weights: Values | None, clusters: Sequence[Hashable], seed: int = 0
) -> tuple[float, float] | None:
    """The ends of the 95 % bootstrap interval of a weighted mean; None for fewer than two clusters.

    ``values``, ``weights`` (None: equal) and ``clusters`` are ``[n]``. Samples with the same cluster share a medium.
    """
    from scipy import stats

    sums, totals = _clustered(np.asarray(values, dtype=float), weights, clusters)
    if len(totals) < 2:
        return None
    found = stats.bootstrap(
        (sums, totals),
        lambda some, of, axis: some.sum(axis) / of.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
        **_sizes(len(totals)),
    ).confidence_interval
    return float(found.low), float(found.high)


def paired(a: Values, b: Values, weights: Values | None, clusters: Sequence[Hashable]) -> Difference:
    """The difference of the means of ``b`` and ``a``, which are ``[n]`` values of the same samples."""
    from scipy import stats

    differences = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    sums, totals = _clustered(differences, weights, clusters)
    value = float(sums.sum() / totals.sum())
    if (ends := interval(differences, weights, clusters)) is None:
        return Difference(value, None, None, None, len(differences))
    p = stats.permutation_test(  # of one sample: it changes signs
        (sums,),
        lambda some, axis: some.sum(axis),
        permutation_type="samples",
        vectorized=True,
        rng=np.random.default_rng(1),
        **_sizes(len(totals)),
    ).pvalue
    return Difference(value, *ends, float(p), len(differences))


def _clustered(
    values: np.ndarray, weights: Values | None, clusters: Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted sums and total weights of the clusters."""
    each = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    numbers: dict[Hashable, int] = {}
    order = [numbers.setdefault(name, len(numbers)) for name in clusters]
    return np.bincount(order, values * each), np.bincount(order, each)


def _sizes(clusters: int) -> dict[str, int]:
    resamples = min(_RESAMPLES, max(_FEWEST, 4 * _AT_ONCE // clusters))
    return {"n_resamples": resamples, "batch": max(1, _AT_ONCE // clusters)}
