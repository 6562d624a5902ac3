"""A prompt is a sequence of pieces: text, and slots for media.

A slot is an object, not a marker inside a string. Text is never parsed for slots, so ``<image>`` or ``<query>`` in a
user's text or in data is plain text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Modality: TypeAlias = Literal["image", "video", "audio"]
MODALITIES: tuple[Modality, ...] = ("image", "video", "audio")


@dataclass(frozen=True)
class Text:
    """A text piece of a prompt."""

    text: str
    target: bool = False
    """Whether the model is trained to generate the text."""
    ids: tuple[int, ...] | None = None
    """The token ids, if a template has already encoded the text; else None."""


@dataclass(frozen=True)
class Slot:
    """A medium of the prompt: the ``index``-th of ``modality`` among the sample's media, from 0."""

    modality: Modality
    index: int = 0


Piece: TypeAlias = Text | Slot


def slots_of(pieces: Sequence[Piece]) -> list[Slot]:
    """The slots of a prompt, in order."""
    return [piece for piece in pieces if isinstance(piece, Slot)]


def context_of(pieces: Sequence[Piece]) -> list[Piece]:
    """The prompt before its last target, to generate that target."""
    for position in range(len(pieces) - 1, -1, -1):
        piece = pieces[position]
        if isinstance(piece, Text) and piece.target:
            return list(pieces[:position])
    return list(pieces)


def spell_out(pieces: Sequence[Piece], words: Mapping[Slot, str]) -> list[Piece]:
    """The prompt with text instead of some slots; the other slots are renumbered."""
    counts: Counter[Modality] = Counter()
    spelt: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, Text):
            spelt.append(piece)
        elif piece in words:
            spelt.append(Text(words[piece]))
        else:
            spelt.append(Slot(piece.modality, counts[piece.modality]))
            counts[piece.modality] += 1
    return spelt


def target_text(pieces: Sequence[Piece]) -> str:
    """The joined text of all targets."""
    return "".join(piece.text for piece in pieces if isinstance(piece, Text) and piece.target)
