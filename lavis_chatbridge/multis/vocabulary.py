"""What the checks know about words: things, sounds and colours in a tree, and near duplicates of texts.

A vocabulary, not a parser of English: what is outside the vocabulary is neither found nor judged.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
    parent: _Node | None = None


class Things:
    """The vocabulary of a YAML tree.

    Args:
        path: A tree as ``rules/things.yaml``, which is the default.

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
        """Every mention in a text: the name, and where it begins. A longer name hides those inside it."""
        words = list(_words(text))
        keys = [_singular(word) for word, _ in words]
        found, position = [], 0
        while position < len(words):
            length = self._match(keys, position)
            if length:
                found.append((" ".join(keys[position : position + length]), words[position][1]))
            position += length or 1
        return found

    def support(self, text: str) -> set[str]:
        """All names that a text supports: those in it, their synonyms, and everything above them in the tree."""
        words = [_singular(word) for word, _ in _words(text)]
        lengths = range(1, self._longest + 1)
        runs = {tuple(words[start : start + length]) for start in range(len(words)) for length in lengths}
        supported: set[str] = set()
        for name in runs & self._nodes.keys():
            for node in self._nodes[name]:
                above: _Node | None = node
                while above is not None:
                    supported.update(" ".join(_key(other)) for other in above.names)
                    above = above.parent
        return supported

    def _match(self, keys: list[str], position: int) -> int:
        """How many words the longest name that begins at ``position`` has; 0 without one."""
        lengths = range(min(self._longest, len(keys) - position), 0, -1)
        return next((n for n in lengths if tuple(keys[position : position + n]) in self._nodes), 0)

    def _add(self, tree: Any, parent: _Node | None, file: Path) -> None:
        if isinstance(tree, list):
            tree = dict.fromkeys(tree)
        if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
            raise ConfigError(f"{file}: expected names or a list of names, found {tree!r}")
        for names, below in tree.items():
            node = _Node([name.strip() for name in names.split("=")], parent)
            for name in node.names:
                self._nodes.setdefault(_key(name), []).append(node)
            if below is not None:
                self._add(below, node, file)


def _words(text: str) -> Iterator[tuple[str, int]]:
    for match in _WORD.finditer(text.lower()):
        yield match.group().removesuffix("'s").removesuffix("\u2019s"), match.start()


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


class NearDuplicates:
    """Finds texts that share most of their word triples with an earlier text: MinHash in bands (Broder 1997).

    Args:
        threshold: Estimated Jaccard similarity from which two texts are duplicates.
    """

    _BANDS, _ROWS, _SHINGLE = 20, 6, 3

    def __init__(self, threshold: float = 0.8) -> None:
        self._threshold = threshold
        rng = np.random.default_rng(20230516)
        count = self._BANDS * self._ROWS
        self._factors = rng.integers(0, 1 << 63, count, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._offsets = rng.integers(0, 1 << 63, count, dtype=np.uint64)
        self._first: dict[int, int] = {}  # band -> the first text with it
        self._texts: list[tuple[str, np.ndarray]] = []

    def find(self, text: str) -> tuple[str, float] | None:
        """The most similar earlier text, with the estimated similarity; None below the threshold."""
        signature = self._signature(text)
        near = {self._first[band] for band in self._bands(signature) if band in self._first}
        best = max(((float(np.mean(self._texts[i][1] == signature)), -i) for i in near), default=(0.0, 0))
        return (self._texts[-best[1]][0], best[0]) if best[0] >= self._threshold else None

    def add(self, key: str, text: str) -> None:
        """Remember a text under a name."""
        signature = self._signature(text)
        for band in self._bands(signature):
            self._first.setdefault(band, len(self._texts))
        self._texts.append((key, signature))

    def _bands(self, signature: np.ndarray) -> list[int]:
        return [hash((band, part.tobytes())) for band, part in enumerate(signature.reshape(-1, self._ROWS))]

    def _signature(self, text: str) -> np.ndarray:
        words = _WORD.findall(text.lower())
        width = min(self._SHINGLE, max(1, len(words)))
        shingles = {" ".join(words[i : i + width]) for i in range(len(words) - width + 1)} or {""}
        hashed = b"".join(hashlib.blake2b(shingle.encode(), digest_size=8).digest() for shingle in shingles)
        # Multiply-shift hashing: 64-bit numbers wrap around, and the high half is well mixed.
        mixed = np.frombuffer(hashed, dtype="<u8")[:, None] * self._factors + self._offsets
        return (mixed >> np.uint64(32)).min(axis=0).astype(np.uint32)
