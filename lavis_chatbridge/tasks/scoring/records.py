"""Scores of prediction records by named metrics: what a task has written, scored now or again later without a model.

A record is a mapping with ``sample_id``, ``prediction``, ``references`` and, for questions, ``answers``. All scores are
in percent, as papers give them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from lavis_chatbridge.config import shown
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.tasks.scoring import answers, captions
from lavis_chatbridge.tasks.scoring.names import CAPTION_METRICS, HEADLINES

_log = logging.getLogger(__name__)

Record = Mapping[str, Any]
_PACKAGES = ("lavis-chatbridge", "salesforce-lavis", "pycocoevalcap", "torch", "transformers")


def announce(metrics: Sequence[str]) -> dict[str, str]:
    """Say before a run which of its metrics cannot be computed here, and why.

    Returns:
        Metric (or ``"ptb"``, the official tokenizer) -> the reason.
    """
    wanted = [metric for metric in metrics if metric in CAPTION_METRICS]
    missing = captions.unavailable(wanted) if wanted else {}
    for name, reason in missing.items():
        what = "the official tokenizer of captions" if name == "ptb" else name
        _log.warning("%s is not available here: %s. The other scores will be computed", what, reason)
    return missing


def score_records(records: Sequence[Record], metrics: Sequence[str], normalisation: str = "plain") -> dict[str, Any]:
    """Score predictions.

    Args:
        records: One per sample.
        metrics: Names of `names.METRICS`, the most important one first.
        normalisation: For ``exact_match``.

    Returns:
        ``scores`` (metric -> percent), ``headline`` (the first metric's, None where it could not be computed),
        ``by_type`` (where records have a ``meta.type``), ``tokenizer``, ``left_out`` (metric -> why), ``unscored``
        (how many records have nothing to compare with).

    Raises:
        DataError: If two records are of one sample (its id, and ``index`` where they have it), or none can be scored.
    """
    _check_ids(records)
    usable = [record for record in records if truth_of(record)]
    if not usable:
        raise DataError(f"none of {len(records)} predictions has references or answers to be compared with")
    result: dict[str, Any] = {"samples": len(records), "unscored": len(records) - len(usable)}
    scores: dict[str, float] = {}
    _captions(usable, [m for m in metrics if m in CAPTION_METRICS], scores, result)
    said, truth = _named(usable)
    types = {str(number): kind for number, record in enumerate(usable) if (kind := type_of(record))}
    by_type: dict[str, dict[str, float]] = {}
    if "vqa_accuracy" in metrics:
        groups = {sample_id: types.get(sample_id, "other") for sample_id in said}
        official = answers.vqa_accuracy(said, truth, groups)
        scores["vqa_accuracy"], by_type["vqa_accuracy"] = official["overall"], official["by_type"]
    if "exact_match" in metrics:
        matched = answers.exact_match(said, truth, normalisation)
        scores["exact_match"], by_type["exact_match"] = matched["overall"], _by_type(matched["each"], types)
    result["scores"] = scores
    result["headline"] = scores.get(HEADLINES.get(metrics[0], metrics[0])) if metrics else None
    return result | ({"by_type": by_type} if types and by_type else {})


def scores_or_fault(records: Sequence[Record], metrics: Sequence[str], normalisation: str = "plain") -> dict[str, Any]:
    """What `score_records` returns, or ``fault``: why it cannot, so that other data sets' scores are not lost."""
    try:
        return score_records(records, metrics, normalisation)
    except DataError as error:
        _log.error("not scored: %s", error)
        return {"samples": len(records), "fault": str(error)}


def type_of(record: Record) -> str:
    """The type by which the data set tells its questions apart; empty where it does not."""
    meta = record.get("meta")
    kind = meta.get("type") if isinstance(meta, Mapping) else None
    return " / ".join(map(str, kind)) if isinstance(kind, (list, tuple)) else "" if kind is None else str(kind)


def truth_of(record: Record) -> list[str]:
    """What a prediction is compared with: the accepted answers, else the references."""
    found = record.get("answers") or record.get("references") or []
    return list(found) if isinstance(found, (list, tuple)) else [found]


def versions() -> dict[str, str]:
    """The versions of everything that a score depends on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def _captions(records: Sequence[Record], metrics: Sequence[str], scores: dict[str, float], result: dict) -> None:
    if not metrics:
        return
    said, truth = _named(records)
    scored = captions.score_captions(said, truth, metrics)
    scores.update({name: 100.0 * value for name, value in scored.overall.items()})
    result |= {"tokenizer": scored.tokenizer, "left_out": scored.left_out}


def _named(records: Sequence[Record]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Predictions, and what they are compared with, by the record's number: a data set may use an id twice."""
    said = {str(number): record["prediction"] for number, record in enumerate(records)}
    return said, {str(number): truth_of(record) for number, record in enumerate(records)}


def _by_type(each: Mapping[str, float], types: Mapping[str, str]) -> dict[str, float]:
    """The mean over the samples of every type."""
    groups: dict[str, list[float]] = {}
    for sample_id, kind in types.items():
        groups.setdefault(kind, []).append(each[sample_id])
    return {kind: sum(values) / len(values) for kind, values in sorted(groups.items())}


def _check_ids(records: Sequence[Record]) -> None:
    seen: set[tuple[str, Any]] = set()
    for number, record in enumerate(records):
        if not isinstance(record, Mapping) or not {"sample_id", "prediction"} <= set(record):
            raise DataError(f"prediction {number} has no sample_id or no prediction: is this a file of predictions?")
        if not isinstance(record["prediction"], str):
            raise DataError(f"prediction {number} is {shown(record['prediction'])}, expected text")
        if not all(isinstance(text, str) for text in truth_of(record)):
            raise DataError(f"prediction {number} is to be compared with {shown(truth_of(record))}, expected texts")
        place = (str(record["sample_id"]), str(record.get("index")))
        if place in seen:
            raise DataError(f"sample {record['sample_id']!r} was predicted twice")
        seen.add(place)
