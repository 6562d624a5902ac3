"""Scores of predictions against references, answers, options and facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lavis_chatbridge.tasks.predictions import Prediction


@dataclass
class Measured:
    """Scores of some predictions, in total and of each.

    Attributes:
        records: The predictions that have references, answers, options or facts.
        scores: Metric -> percent.
        each: Metric -> ``[n]`` percent; only metrics that are means over samples.
        weights: Metric -> ``[n]``, for means that are weighted.
        by_attribute: Attribute -> number of samples and accuracy, for captions that are scored by facts.
        tokenizer: Of captions: ``"ptb"`` (official, Java) or ``"python"`` (a rule); their scores are not comparable.
        left_out: Metric -> the reason why it was not computed.
    """

    records: Sequence[Prediction]
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
        return [tuple(record.media) or number for number, record in enumerate(self.records)]
