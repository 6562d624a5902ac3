"""Find the things, sounds and colours that a text names, and those that an annotation supports.

The vocabulary is a tree of names (``rules/things.yaml``). Words outside it are neither found nor judged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
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


@dataclass
class _Node:
    names: list[str]
    children: list[_Node] = field(default_factory=list)
    parent: _Node | None = None


class Things:
    """The vocabulary.

    Args:
        path: A YAML tree as ``rules/things.yaml``, which is the default.

    Raises:
        ConfigError: If the file is not such a tree.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        file = Path(path) if path else Path(__file__).parent / "rules" / "things.yaml"
        try:
            tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read the vocabulary {file}: {error}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{file}: expected a mapping of groups, found {type(tree).__name__}")
        self._nodes: dict[tuple[str, ...], list[_Node]] = {}
        for group in tree.values():
            self._add(group, None, file)
        self._longest = max(map(len, self._nodes), default=1)

    def mentions(self, text: str) -> list[tuple[str, int]]:
        """Find every mention in a text as (name, offset). A name inside a longer name is not a mention."""
        words = list(_words(text))
        keys = [_singular(word) for word, _ in words]
        found = []
        position = 0
        while position < len(words):
            length = self._match(keys, position)
            if length:
                found.append((" ".join(keys[position : position + length]), words[position][1]))
            position += length or 1
        return found

    def support(self, text: str) -> set[str]:
        """The names that an annotation's words support: those in it, their synonyms, and their ancestors."""
        supported: set[str] = set()
        words = [_singular(word) for word, _ in _words(text)]
        runs = {
            tuple(words[start : start + length])
            for start in range(len(words))
            for length in range(1, self._longest + 1)
        }
        for name in runs & self._nodes.keys():
            for first in self._nodes[name]:
                node: _Node | None = first
                while node is not None:
                    supported.update(" ".join(_key(other)) for other in node.names)
                    node = node.parent
        return supported

    def _match(self, keys: list[str], position: int) -> int:
        """Number of words of the longest name that begins at ``position``, or 0."""
        for length in range(min(self._longest, len(keys) - position), 0, -1):
            if tuple(keys[position : position + length]) in self._nodes:
                return length
        return 0

    def _add(self, tree: Any, parent: _Node | None, file: Path) -> None:
        if tree is None:
            return
        if isinstance(tree, list):
            tree = dict.fromkeys(tree)
        if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
            raise ConfigError(f"{file}: expected names or a list of names, found {tree!r}")
        for names, below in tree.items():
            node = _Node([name.strip() for name in names.split("=")], parent=parent)
            for name in node.names:
                self._nodes.setdefault(_key(name), []).append(node)
            self._add(below, node, file)


def _words(text: str) -> Iterator[tuple[str, int]]:
    for match in _WORD.finditer(text.lower()):
        word = match.group()
        for ending in ("'s", "\u2019s"):
            word = word.removesuffix(ending)
        yield word, match.start()


def _key(name: str) -> tuple[str, ...]:
    return tuple(_singular(word) for word, _ in _words(name))


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
