"""Scores of captions and answers against facts and accepted answers: functions over strings, no model, no files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lavis_chatbridge.tasks.scoring.answers import squad

Facts = Mapping[str, str]
Values = Mapping[str, Sequence[str]]
"""Attribute -> the words that it can be."""

_WORD = re.compile(r"[^\W_]+")


@dataclass
class Share:
    """How many of a number of things were right."""

    right: int = 0
    total: int = 0

    def add(self, right: bool) -> None:
        """Count one thing."""
        self.right += right
        self.total += 1

    @property
    def value(self) -> float:
        """The share, 0 where there was nothing."""
        return self.right / self.total if self.total else 0.0


@dataclass
class AttributeScore:
    """Captions against facts.

    Attributes:
        overall: Over all pairs of caption and attribute.
        whole: Captions that are right in every attribute.
        attributes: Per attribute.
    """

    overall: Share = field(default_factory=Share)
    whole: Share = field(default_factory=Share)
    attributes: dict[str, Share] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As shares, for reports."""
        return {
            "attribute_accuracy": self.overall.value,
            "all_attributes_right": self.whole.value,
            "attributes": {name: share.value for name, share in self.attributes.items()},
            "samples": self.whole.total,
        }


def names_exactly(text: str, value: str, values: Iterable[str]) -> bool:
    """Whether ``text`` names ``value`` and no other of ``values``; whole words, in any case."""
    words = f" {' '.join(_WORD.findall(text.lower()))} "
    named = {candidate for candidate in {value, *values} if f" {' '.join(_WORD.findall(candidate.lower()))} " in words}
    # "light blue" also holds the word "blue": a value inside a longer named one does not count by itself
    named = {name for name in named if not any(name != other and name in other for other in named)}
    return named == {value}


def attribute_accuracy(captions: Sequence[str], facts: Sequence[Facts], values: Values) -> AttributeScore:
    """How often captions name the right value, and no other, of each attribute that their medium has.

    Args:
        captions: What the model said.
        facts: What is true, one mapping per caption.
        values: All values of each attribute.
    """
    score = AttributeScore()
    for caption, truth in zip(captions, facts, strict=True):
        rights = {name: names_exactly(caption, value, values.get(name, ())) for name, value in truth.items()}
        for name, right in rights.items():
            score.attributes.setdefault(name, Share()).add(right)
            score.overall.add(right)
        score.whole.add(all(rights.values()))
    return score


def values_of(facts: Iterable[Facts]) -> dict[str, list[str]]:
    """Every value that each attribute takes, in the order of appearance."""
    found: dict[str, dict[str, None]] = {}
    for truth in facts:
        for name, value in truth.items():
            found.setdefault(name, {})[value] = None
    return {name: list(values) for name, values in found.items()}


def text_prior(train: Iterable[Facts], test: Iterable[Facts]) -> float:
    """The attribute accuracy to expect of captions drawn from training without looking at the medium.

    The mean over attributes of the sum over values of p_train(value) p_test(value).
    """
    before, after = _frequencies(train), _frequencies(test)
    shared = [name for name in after if name in before]
    if not shared:
        return 0.0
    agreement = (sum(p * before[name].get(value, 0.0) for value, p in after[name].items()) for name in shared)
    return sum(agreement) / len(shared)


def exact_match(answers: Sequence[str], accepted: Sequence[Sequence[str]]) -> Share:
    """How many answers equal one of their accepted ones, without case, punctuation, articles and extra spaces."""
    share = Share()
    for answer, choices in zip(answers, accepted, strict=True):
        share.add(squad(answer) in {squad(choice) for choice in choices})
    return share


def _frequencies(facts: Iterable[Facts]) -> dict[str, dict[str, float]]:
    counts: dict[str, Counter[str]] = {}
    for truth in facts:
        for name, value in truth.items():
            counts.setdefault(name, Counter())[value] += 1
    return {name: {value: n / sum(count.values()) for value, n in count.items()} for name, count in counts.items()}
