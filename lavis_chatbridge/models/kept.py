"""Key-value caches of earlier turns, kept so that the part of a prompt that is unchanged is not read again.

Only layers that keep every position can be cropped and joined; other caches (sliding windows) are not reused.
Shapes: ``B`` rows, ``L`` positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache, DynamicLayer

Element: TypeAlias = int | tuple[str, int]
"""The content of one position: a token id, or a medium's key and the index of its soft token."""


class Prefix:
    """One conversation's cache: the elements at its positions, and their keys and values."""

    def __init__(self) -> None:
        self.elements: list[Element] = []
        self._cache: Any = None

    def common(self, elements: Sequence[Element]) -> int:
        """Number of a prompt's first elements that are in the cache; never the last one, whose logits are needed."""
        most = max(0, min(len(self.elements), len(elements) - 1))
        return next((i for i in range(most) if self.elements[i] != elements[i]), most)

    def take(self, length: int) -> Any:
        """Remove and return the cache of the first ``length`` elements (None for 0); the rest is dropped."""
        cache, self._cache, self.elements = self._cache, None, []
        if cache is None or not length:
            return None
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
        return cache

    def put(self, elements: Sequence[Element], cache: Any) -> None:
        self.elements, self._cache = list(elements), cache


def is_plain(cache: Any) -> bool:
    """Whether every layer keeps the keys and values of every position."""
    layers = getattr(cache, "layers", [])
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def join(first: Any, second: Any) -> DynamicCache:
    """The rows of two plain caches in one; the shorter rows are padded on the left."""
    length = max(first.get_seq_length(), second.get_seq_length())
    joined = DynamicCache()
    for i, layers in enumerate(zip(first.layers, second.layers, strict=True)):
        keys = torch.cat([_padded(layer.keys, length) for layer in layers])
        joined.update(keys, torch.cat([_padded(layer.values, length) for layer in layers]), i)
    return joined


def select(cache: Any, rows: Sequence[int], start: int = 0) -> DynamicCache:
    """Some rows of a plain cache, from position ``start`` on."""
    chosen = DynamicCache()
    for i, layer in enumerate(cache.layers):
        chosen.update(layer.keys[rows, :, start:], layer.values[rows, :, start:], i)
    return chosen


def _padded(states: Tensor, length: int) -> Tensor:
    return functional.pad(states, (0, 0, length - states.shape[-2], 0))
