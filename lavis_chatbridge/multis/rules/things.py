"""Finds the things, sounds and colours that a text mentions, and those that an annotation supports.

The vocabulary is a tree of names (``things.yaml``). Other words are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lavis_chatbridge.errors import ConfigError

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)?")
_IRREGULAR = {
    "men": "man", "women": "woman", "people": "people", "children": "child", "mice": "mouse", "geese": "goose",
    "feet": "foot", "teeth": "tooth", "knives": "knife", "leaves": "leaf", "loaves": "loaf", "calves": "calf",
    "wolves": "wolf", "shelves": "shelf", "wives": "wife", "oxen": "ox", "scarves": "scarf", "buses": "bus",
    "glasses": "glasses", "dishes": "dish",
}  # fmt: skip


class Things:
    """The vocabulary: a YAML tree, by default ``things.yaml``."""

    def __init__(self, path: str | Path | None = None) -> None:
        file = Path(path) if path else Path(__file__).parent / "things.yaml"
        self._supports: dict[str, set[str]] = {}
        try:
            for group in yaml.safe_load(file.read_text(encoding="utf-8")).values():
                self._add(group, set())
        except (OSError, yaml.YAMLError, AttributeError, TypeError) as error:
            raise ConfigError(f"{file} is not a tree of names: {error}") from error
        self._longest = max((name.count(" ") + 1 for name in self._supports), default=1)

    def mentions(self, text: str) -> list[tuple[str, int]]:
        """All mentions in a text as (name, offset). A name inside a longer name does not count."""
        words = list(_words(text))
        found = []
        position = 0
        while position < len(words):
            names = self._names_at([word for word, _ in words], position)
            if names:
                found.append((names[-1], words[position][1]))
            position += names[-1].count(" ") + 1 if names else 1
        return found

    def support(self, text: str) -> set[str]:
        """The names that an annotation's text supports: those in it, their synonyms, and their ancestors."""
        words = [word for word, _ in _words(text)]
        names = {name for position in range(len(words)) for name in self._names_at(words, position)}
        return set().union(*(self._supports[name] for name in names))

    def _names_at(self, words: Sequence[str], position: int) -> list[str]:
        """The names that start at a word, the longest last."""
        runs = (" ".join(words[position : position + length]) for length in range(1, self._longest + 1))
        return [run for run in dict.fromkeys(runs) if run in self._supports]

    def _add(self, tree: Any, ancestors: set[str]) -> None:
        """Add names to the vocabulary; each supports itself, its synonyms, and their ancestors."""
        if isinstance(tree, str):
            raise TypeError(f"expected a list or a mapping of names, found {tree!r}")
        for names in tree or ():
            synonyms = {" ".join(word for word, _ in _words(name)) for name in names.split("=")}
            for name in synonyms:
                self._supports.setdefault(name, set()).update(synonyms | ancestors)
            if isinstance(tree, dict):
                self._add(tree[names], synonyms | ancestors)


def _words(text: str) -> Iterator[tuple[str, int]]:
    """The words of a text in the singular, with their offsets."""
    for match in _WORD.finditer(text.lower()):
        yield _singular(match.group().removesuffix("'s").removesuffix("\u2019s")), match.start()


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "sses", "xes", "oes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
