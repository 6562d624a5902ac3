"""Scores of captions against facts: the attributes that a caption names correctly, and the score of guessing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

Facts = Mapping[str, str]
Values = Mapping[str, Sequence[str]]
"""Attribute -> its possible words."""

_WORD = re.compile(r"[^\W_]+")


def names_exactly(text: str, value: str, values: Iterable[str]) -> bool:
    """Whether ``text`` names ``value`` and no other of ``values``; whole words, in any case."""
    words = f" {' '.join(_WORD.findall(text.lower()))} "
    named = {candidate for candidate in {value, *values} if f" {' '.join(_WORD.findall(candidate.lower()))} " in words}
    # "light blue" also holds the word "blue": a value inside a longer mentioned one does not count
    return {name for name in named if not any(name != other and name in other for other in named)} == {value}


def attributes_right(caption: str, facts: Facts, values: Values) -> dict[str, bool]:
    """Attribute -> whether a caption names its right value and no other one of ``values``."""
    return {name: names_exactly(caption, value, values.get(name, ())) for name, value in facts.items()}


def values_of(facts: Iterable[Facts]) -> dict[str, list[str]]:
    """Every value that each attribute takes, in the order of appearance."""
    found: dict[str, dict[str, None]] = {}
    for truth in facts:
        for name, value in truth.items():
            found.setdefault(name, {})[value] = None
    return {name: list(values) for name, values in found.items()}


def text_prior(train: Iterable[Facts], test: Iterable[Facts]) -> float:
    """The expected attribute accuracy of random training captions, without looking at the medium.

    The mean over attributes of the sum over values of p_train(value) p_test(value).
    """
    before, after = _frequencies(train), _frequencies(test)
    shared = [name for name in after if name in before]
    if not shared:
        return 0.0
    agreement = (sum(p * before[name].get(value, 0.0) for value, p in after[name].items()) for name in shared)
    return sum(agreement) / len(shared)


def _frequencies(facts: Iterable[Facts]) -> dict[str, dict[str, float]]:
    counts: dict[str, Counter[str]] = {}
    for truth in facts:
        for name, value in truth.items():
            counts.setdefault(name, Counter())[value] += 1
    return {name: {value: n / count.total() for value, n in count.items()} for name, count in counts.items()}
