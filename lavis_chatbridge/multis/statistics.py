"""Counting what was accepted and turned down, per kind and modality, with reasons, beside the paper's numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lavis_chatbridge.multis.annotation import MEDIA_KINDS
from lavis_chatbridge.multis.prompts import DATA_KINDS
from lavis_chatbridge.schema import Sample

PAPER_COUNTS = {"conversation": 24_000, "detail": 18_000, "reasoning": 9_000}
"""Samples of the paper's video, audio and video+audio chat data (arXiv 2305.16103, section 4.2), rounded as there."""

_WORD = re.compile(r"\b[\w'\u2019-]+\b")


class Statistics:
    """Takes one answer after the other; holds counts, never texts."""

    def __init__(self) -> None:
        self.accepted: Counter[tuple[str, str]] = Counter()
        self.rejected: Counter[tuple[str, str]] = Counter()
        self.reasons: Counter[str] = Counter()
        self.openings: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self._sums: dict[str, Counter[str]] = {}
        self._vocabulary: set[str] = set()

    def take(self, record: Mapping[str, Any], sample: Sample | None, rules: Sequence[str]) -> None:
        """Count one answer.

        Args:
            record: The answer, with ``kind`` and ``modality``.
            sample: What became of it; None if it was turned down.
            rules: The rules against it; each counts once.
        """
        cell = (str(record["kind"]), str(record.get("modality", "")))
        if sample is None:
            self.rejected[cell] += 1
            self.reasons.update(set(rules))
            return
        self.accepted[cell] += 1
        self.sources[sample.source] += 1
        sums = self._sums.setdefault(cell[0], Counter())
        for turn in sample.turns:
            words = [word.lower() for word in _WORD.findall(turn.text)]
            self._vocabulary.update(words)
            name = "question" if turn.role == "user" else "answer"
            sums[f"{name}s"] += 1
            sums[f"{name}_words"] += len(words)
            if name == "question":
                self.openings[" ".join(words[:2])] += 1

    def to_json(self) -> dict[str, Any]:
        """All counts, ready for ``json.dumps``."""
        kinds = {}
        for kind in DATA_KINDS:
            sums = self._sums.get(kind, Counter())
            kinds[kind] = {
                "accepted": sum(count for cell, count in self.accepted.items() if cell[0] == kind),
                "rejected": sum(count for cell, count in self.rejected.items() if cell[0] == kind),
                "paper": PAPER_COUNTS[kind],
                "questions": sums["questions"],
                "mean_question_words": _mean(sums["question_words"], sums["questions"]),
                "mean_answer_words": _mean(sums["answer_words"], sums["answers"]),
                "by_modality": {
                    modality: {"accepted": self.accepted[kind, modality], "rejected": self.rejected[kind, modality]}
                    for modality in MEDIA_KINDS
                    if self.accepted[kind, modality] + self.rejected[kind, modality]
                },
            }
        return {
            "accepted": self.accepted.total(),
            "rejected": self.rejected.total(),
            "kinds": kinds,
            "reasons": dict(self.reasons.most_common()),
            "vocabulary": len(self._vocabulary),
            "question_openings": dict(self.openings.most_common(20)),
            "sources": dict(self.sources.most_common()),
        }


def table(statistics: Mapping[str, Any]) -> str:
    """The statistics as text for a terminal."""
    lines = [f"{'kind':14}{'accepted':>10}{'rejected':>10}{'paper':>9}{'words asked':>13}{'answered':>10}"]
    for kind, row in statistics["kinds"].items():
        lines.append(
            f"{kind:14}{row['accepted']:10}{row['rejected']:10}{row['paper']:9}"
            f"{row['mean_question_words']:13.1f}{row['mean_answer_words']:10.1f}"
        )
    lines.append(f"{'all':14}{statistics['accepted']:10}{statistics['rejected']:10}{sum(PAPER_COUNTS.values()):9}")
    if statistics["reasons"]:
        lines.append(
            "turned down for: " + ", ".join(f"{rule} {count}" for rule, count in statistics["reasons"].items())
        )
    lines.append(f"distinct words: {statistics['vocabulary']}")
    return "\n".join(lines)


def _mean(total: int, count: int) -> float:
    return round(total / count, 2) if count else 0.0
