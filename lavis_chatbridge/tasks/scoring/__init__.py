"""Scores of predictions against references, answers, options and facts.

The names that a configuration may use stand here, so that settings need none of the scorers.
"""

from __future__ import annotations

CAPTION_METRICS = ("BLEU", "METEOR", "ROUGE_L", "CIDEr", "SPICE")
"""By pycocoevalcap, against reference captions."""

ANSWER_METRICS = ("vqa_accuracy", "exact_match", "yes_no")
"""Against accepted answers: the official VQA evaluator's, equality after a normalisation, and yes against no."""

OPTION_METRICS = ("choice",)
"""Against a question's options, averaged over their orders."""

METRICS = (*CAPTION_METRICS, *ANSWER_METRICS, *OPTION_METRICS)

NORMALISATION_NAMES = ("plain", "squad", "vqa", "vocabulary")

HEADLINES = {"BLEU": "BLEU_4"}
"""Metric -> the one of its figures that stands for it, where it has several."""
