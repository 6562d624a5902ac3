"""The names that a configuration may use for metrics and normalisations, importable without what computes them."""

from __future__ import annotations

CAPTION_METRICS = ("BLEU", "METEOR", "ROUGE_L", "CIDEr", "SPICE")
"""By pycocoevalcap, against reference captions."""

ANSWER_METRICS = ("vqa_accuracy", "exact_match")
"""Against accepted answers: the official VQA evaluator's, and equality after a normalisation."""

METRICS = (*CAPTION_METRICS, *ANSWER_METRICS)

NORMALISATION_NAMES = ("plain", "squad", "vqa")

HEADLINES = {"BLEU": "BLEU_4"}
"""Metric -> which of its figures stands for it, where it has several."""
