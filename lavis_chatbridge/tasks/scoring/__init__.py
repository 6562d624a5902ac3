"""Scores of predictions against references, answers, options and facts.

The names that a configuration may use stand here, so that settings need none of the scorers.
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
"""Metric -> the one of its figures that stands for it, where it has several."""
