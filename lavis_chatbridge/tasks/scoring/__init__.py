"""Scores of predictions against references, answers, options and facts.

It has the names of metrics for configurations, so that settings do not import the scorers.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

CaptionMetric: TypeAlias = Literal["BLEU", "METEOR", "ROUGE_L", "CIDEr", "SPICE"]
"""By pycocoevalcap, against reference captions."""

Metric: TypeAlias = CaptionMetric | Literal["vqa_accuracy", "exact_match", "yes_no", "choice"]
"""Also the official VQA evaluator's, equality after a normalisation, yes against no, and options in all orders."""

Normalisation: TypeAlias = Literal["plain", "squad", "vqa", "vocabulary"]

CAPTION_METRICS: tuple[str, ...] = get_args(CaptionMetric)

HEADLINES = {"BLEU": "BLEU_4"}
"""Metric with several figures -> its main figure."""
