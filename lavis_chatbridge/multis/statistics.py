"""Counts of accepted and rejected answers per kind and modality, with reasons, beside the paper's numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lavis_chatbridge.multis.annotation import MODALITIES
from lavis_chatbridge.multis.prompts import DATA_KINDS
from lavis_chatbridge.schema import Sample

PAPER_COUNTS = {"conversation": 24_000, "detail": 18_000, "reasoning": 9_000}
"""Samples of the paper's video, audio and video+audio chat data (arXiv 2305.16103, section 4.2), rounded as there."""

WORD = re.compile(r"\b[\w'\u2019-]+\b")


class Statistics:
    """Adds one answer after the other; keeps counts, no texts."""

    def __init__(self) -> None:
        self.accepted: Counter[tuple[str, str]] = Counter()
        self.rejected: Counter[tuple[str, str]] = Counter()
        self.reasons: Counter[str] = Counter()
        self.openings: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self._sums: Counter[tuple[str, str]] = Counter()
        self._vocabulary: set[str] = set()

    def add(self, record: Mapping[str, Any], sample: Sample | None, rules: Sequence[str]) -> None:
        """Count one answer: its ``kind`` and ``modality``, the accepted sample or None, and the rules against it."""
        kind, modality = str(record["kind"]), str(record.get("modality", ""))
        if sample is None:
            self.rejected[kind, modality] += 1
            self.reasons.update(set(rules))
            return
        self.accepted[kind, modality] += 1
        self.sources[sample.source] += 1
        for turn in sample.turns:
            words = [word.lower() for word in WORD.findall(turn.text)]
            self._vocabulary.update(words)
            self._sums[kind, turn.role] += 1
            self._sums[kind, f"{turn.role} words"] += len(words)
            if turn.role == "user":
                self.openings[" ".join(words[:2])] += 1

    def to_json(self) -> dict[str, Any]:
        """All counts."""
        return {
            "accepted": self.accepted.total(),
            "rejected": self.rejected.total(),
            "kinds": {kind: self._of_kind(kind) for kind in DATA_KINDS},
            "reasons": dict(self.reasons.most_common()),
            "vocabulary": len(self._vocabulary),
            "question_openings": dict(self.openings.most_common(20)),
            "sources": dict(self.sources.most_common()),
        }

    def _of_kind(self, kind: str) -> dict[str, Any]:
        by_modality = {
            modality: {"accepted": self.accepted[kind, modality], "rejected": self.rejected[kind, modality]}
            for modality in MODALITIES
            if self.accepted[kind, modality] + self.rejected[kind, modality]
        }
        return {
            "accepted": sum(counts["accepted"] for counts in by_modality.values()),
            "rejected": sum(counts["rejected"] for counts in by_modality.values()),
            "paper": PAPER_COUNTS[kind],
            "questions": self._sums[kind, "user"],
            "mean_question_words": round(self._sums[kind, "user words"] / max(1, self._sums[kind, "user"]), 2),
            "mean_answer_words": round(self._sums[kind, "assistant words"] / max(1, self._sums[kind, "assistant"]), 2),
            "by_modality": by_modality,
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
        lines.append("rejected for: " + ", ".join(f"{rule} {n}" for rule, n in statistics["reasons"].items()))
    return "\n".join([*lines, f"distinct words: {statistics['vocabulary']}"])
