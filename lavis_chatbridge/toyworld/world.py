"""What exists in the embedded world: the attributes of its media, and which combinations are held out.

Nothing here renders or words anything: `Scene` is the truth that the renderers draw and the grammar describes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from lavis_chatbridge.prompting.pieces import Modality

ATTRIBUTES: dict[Modality, dict[str, tuple[str, ...]]] = {
    "image": {
        "shape": ("circle", "square", "triangle", "star", "cross", "ring"),
        "colour": ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"),
        "size": ("small", "large"),
        "place": ("left", "right", "top", "bottom", "centre"),
    },
    "video": {
        "shape": ("circle", "square", "triangle", "star", "cross", "ring"),
        "colour": ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"),
        "motion": ("left", "right", "up", "down", "grow", "shrink"),
    },
    "audio": {
        "timbre": ("flute", "organ", "buzzer", "bell", "wind"),
        "pitch": ("low", "middle", "high"),
        "pattern": ("steady", "pulsing", "rising", "falling"),
    },
}
"""The values of every attribute, per kind of medium."""

TRIPLES: dict[Modality, tuple[str, str, str]] = {
    "image": ("shape", "colour", "place"),
    "video": ("shape", "colour", "motion"),
    "audio": ("timbre", "pitch", "pattern"),
}
"""The three attributes whose combinations are held out, per kind."""

HELD_OUT_SHARE = 0.12


@dataclass(frozen=True)
class Scene:
    """The truth about one medium: its kind, and a value for each attribute of that kind."""

    kind: Modality
    values: tuple[tuple[str, str], ...]

    @property
    def facts(self) -> dict[str, str]:
        """Attribute to value, in the order of `ATTRIBUTES`."""
        return dict(self.values)

    @property
    def held_out(self) -> bool:
        """Whether this scene's triple is kept from the bridge's training."""
        return tuple(self.facts[name] for name in TRIPLES[self.kind]) in _HELD_OUT[self.kind]


def all_scenes(kind: Modality) -> list[Scene]:
    """Every combination of attribute values of a kind, in a fixed order."""
    names = ATTRIBUTES[kind]
    return [Scene(kind, tuple(zip(names, values, strict=True))) for values in itertools.product(*names.values())]


def scenes(kind: Modality, held_out: bool, seed: int) -> Iterator[Scene]:
    """Endless scenes of one split, each combination equally often, shuffled anew in every round."""
    pool = [scene for scene in all_scenes(kind) if scene.held_out == held_out]
    order = random.Random(f"{kind}/{held_out}/{seed}")
    while True:
        order.shuffle(pool)
        yield from pool


def _hold_out(kind: Modality) -> frozenset[tuple[str, ...]]:
    """A fixed share of a kind's triples, spread so that no pair of values is missing from what remains."""
    pool = list(itertools.product(*(ATTRIBUTES[kind][name] for name in TRIPLES[kind])))
    random.Random(f"held out {kind}").shuffle(pool)
    wanted = round(HELD_OUT_SHARE * len(pool))
    chosen: list[tuple[str, ...]] = []
    for triple in pool:
        shares_pair = any(sum(a == b for a, b in zip(triple, other, strict=True)) >= 2 for other in chosen)
        if len(chosen) < wanted and not shares_pair:
            chosen.append(triple)
    return frozenset(chosen)


_HELD_OUT: dict[Modality, frozenset[tuple[str, ...]]] = {kind: _hold_out(kind) for kind in ATTRIBUTES}
