"""The attributes of the embedded world, their values, and the combinations held out of training.

A `Scene` is the ground truth of one medium. The renderers draw it and `language` describes it; this module does
neither.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from lavis_chatbridge.prompting.conversation import Modality

_SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
_COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")

ATTRIBUTES: dict[Modality, dict[str, tuple[str, ...]]] = {
    "image": {
        "shape": _SHAPES,
        "colour": _COLOURS,
        "size": ("small", "large"),
        "place": ("left", "right", "top", "bottom", "centre"),
    },
    "video": {"shape": _SHAPES, "colour": _COLOURS, "motion": ("left", "right", "up", "down", "grow", "shrink")},
    "audio": {
        "timbre": ("flute", "organ", "buzzer", "bell", "wind"),
        "pitch": ("low", "middle", "high"),
        "pattern": ("steady", "pulsing", "rising", "falling"),
    },
}
"""Modality -> attribute -> its values."""

TRIPLES = {modality: tuple(name for name in values if name != "size") for modality, values in ATTRIBUTES.items()}
"""Modality -> the three attributes that define held-out combinations (triples)."""

HELD_OUT_SHARE = 0.12


@dataclass(frozen=True)
class Scene:
    """The ground truth of one medium: its modality, and a value for each attribute of that modality."""

    modality: Modality
    values: tuple[tuple[str, str], ...]

    @property
    def facts(self) -> dict[str, str]:
        """Attribute -> value, in the order of `ATTRIBUTES`."""
        return dict(self.values)

    @property
    def held_out(self) -> bool:
        """Whether this scene's triple is excluded from the bridge's training."""
        return tuple(self.facts[name] for name in TRIPLES[self.modality]) in _HELD_OUT[self.modality]


def all_scenes(modality: Modality) -> list[Scene]:
    """Every combination of attribute values, in a fixed order."""
    names = ATTRIBUTES[modality]
    return [Scene(modality, tuple(zip(names, values, strict=True))) for values in itertools.product(*names.values())]


def scenes(modality: Modality, held_out: bool, seed: int) -> Iterator[Scene]:
    """Endless scenes of one split, in rounds; each round has every combination once, in a new random order."""
    pool = [scene for scene in all_scenes(modality) if scene.held_out == held_out]
    order = random.Random(f"{modality}/{held_out}/{seed}")
    while True:
        order.shuffle(pool)
        yield from pool


def _hold_out(modality: Modality) -> frozenset[tuple[str, ...]]:
    """A fixed share of the triples; every pair of values still occurs in training."""
    pool = list(itertools.product(*(ATTRIBUTES[modality][name] for name in TRIPLES[modality])))
    random.Random(f"held out {modality}").shuffle(pool)
    wanted = round(HELD_OUT_SHARE * len(pool))
    chosen: list[tuple[str, ...]] = []
    for triple in pool:
        shares_pair = any(sum(a == b for a, b in zip(triple, other, strict=True)) >= 2 for other in chosen)
        if len(chosen) < wanted and not shares_pair:
            chosen.append(triple)
    return frozenset(chosen)


_HELD_OUT: dict[Modality, frozenset[tuple[str, ...]]] = {modality: _hold_out(modality) for modality in ATTRIBUTES}
