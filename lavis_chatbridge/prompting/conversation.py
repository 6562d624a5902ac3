"""Prompts as pieces of text and slots for media, and conversations in the paper's format.

A slot is an object, not a marker inside a string. Text is never parsed for slots, so ``<image>`` or ``<query>`` in a
user's text or in data is plain text.

The format is the original ChatBridge's (its ``datasets/datasets/valor_data/data_task.py``):
``###Human: ...###Assistant: ...###``, with media in any user's turn. This module uses no tokenizer and no data set.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from lavis_chatbridge.errors import PromptError

Modality: TypeAlias = Literal["image", "video", "audio"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)

END_OF_TURN = "###"
HUMAN = "Human: "
ASSISTANT = "###Assistant:"
END_OF_CAPTION = "\n"
_LEADING_PUNCTUATION = ",.!?*#:;~"
_WORD_JOINERS = str.maketrans("-/", "  ")


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


@dataclass(frozen=True)
class Message:
    """One message of a conversation; ``role`` is ``"user"`` or ``"assistant"``."""

    role: str
    text: str
    media: tuple[Modality, ...] = ()
    """The modalities of the media in a user's message, in order."""


def alignment_prompt(media: Sequence[Modality], caption: str, end: str = END_OF_CAPTION) -> list[Piece]:
    """Stage 1: the media's slots, then the caption and its end marker as the target (paper, section 3.2)."""
    return [*_numbered(media, Counter()), Text(caption + end, target=True)]


def chat_prompt(turns: Sequence[Message], generate: bool = False, reply_end: str = END_OF_TURN) -> list[Piece]:
    """A conversation as pieces. The replies, each with its end marker, are the targets.

    Args:
        turns: Alternating messages of ``user`` and ``assistant``, starting with a user's.
        generate: End with the assistant's role, for a reply to follow; the last message must then be a user's.
        reply_end: The end marker of a reply: ``"###"``. The original adds a newline before it, except in conversations.

    Raises:
        PromptError: If the messages do not alternate, or ``generate`` does not fit the last one.
    """
    check_order(turns, generate)
    pieces: list[Piece] = []
    counts: Counter[Modality] = Counter()
    opening = END_OF_TURN
    for turn in turns:
        if turn.role == "assistant":
            pieces.append(Text(escape_markers(turn.text) + reply_end, target=True))
            opening = ""  # the reply's end marker is also the start of the next turn
            continue
        if turn.media:
            pieces.extend(introduce(turn.media, counts, opening + HUMAN))
            opening = f".{END_OF_TURN}"
        pieces.append(Text(f"{opening}{HUMAN}{escape_markers(turn.text)}{ASSISTANT}"))
    return pieces


def introduce(media: Sequence[Modality], counts: Counter[Modality], opening: str = "") -> list[Piece]:
    """``Given following video: <slot> and its background audio: <slot>`` as pieces, without the final full stop.

    ``counts`` has the number of earlier media of each modality; it is updated.
    """
    pieces: list[Piece] = []
    previous: Modality | None = None
    for slot in _numbered(media, counts):
        if previous is None:
            words = f"{opening}Given following {slot.modality}: "
        elif previous == "video" and slot.modality == "audio":
            words = " and its background audio: "
        else:
            words = f" and {slot.modality}: "
        pieces += [Text(words), slot]
        previous = slot.modality
    return pieces


def check_order(turns: Sequence[Message], generate: bool) -> None:
    """Raise a `PromptError` if messages do not alternate, or the last one does not fit ``generate``."""
    for position, turn in enumerate(turns):
        expected = "assistant" if position % 2 else "user"
        if turn.role != expected:
            raise PromptError(
                f"turn {position} has role {turn.role!r}, expected {expected!r}: turns alternate, user first"
            )
        if turn.media and turn.role != "user":
            raise PromptError(f"turn {position}: an assistant's turn cannot have media")
    if not turns or (generate and turns[-1].role != "user"):
        raise PromptError("the conversation must end with a user's turn for the model to answer")


def escape_markers(text: str) -> str:
    """``text`` with spaces in every run of three or more ``#`` (also full-width), which could be a turn marker."""
    return re.sub("[#\N{FULLWIDTH NUMBER SIGN}\N{SMALL NUMBER SIGN}]{3,}", lambda run: " ".join(run.group()), text)


def clean_caption(text: str) -> str:
    """Clean a stage-1 caption like the original's reader (``pre_caption``).

    Lower case, no leading punctuation, spaces for hyphens and slashes, ``person`` for ``<person>``, white space
    collapsed and stripped.
    """
    words = text.lower().lstrip(_LEADING_PUNCTUATION).translate(_WORD_JOINERS)
    words = words.replace("<person>", "person").rstrip("\n")
    return re.sub(r"\s{2,}", " ", words).strip(" ")


def slots_of(pieces: Sequence[Piece]) -> list[Slot]:
    """The slots of a prompt, in order."""
    return [piece for piece in pieces if isinstance(piece, Slot)]


def context_of(pieces: Sequence[Piece]) -> list[Piece]:
    """The prompt before its last target, to generate that target."""
    targets = [i for i, piece in enumerate(pieces) if isinstance(piece, Text) and piece.target]
    return list(pieces[: targets[-1]] if targets else pieces)


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
            spelt += _numbered([piece.modality], counts)
    return spelt


def _numbered(media: Sequence[Modality], counts: Counter[Modality]) -> list[Slot]:
    slots = []
    for modality in media:
        slots.append(Slot(modality, counts[modality]))
        counts[modality] += 1
    return slots
