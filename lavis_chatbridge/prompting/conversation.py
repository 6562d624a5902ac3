"""Conversations in the paper's format: ``###Human: ...###Assistant: ...###``, media in any turn.

Roles, the text before media, and the end marker of a reply are the original ChatBridge's (its
``datasets/datasets/valor_data/data_task.py``). This module knows no tokenizer and no data set.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lavis_chatbridge.errors import PromptError
from lavis_chatbridge.prompting.pieces import Modality, Piece, Slot, Text

END_OF_TURN = "###"
HUMAN = "Human: "
ASSISTANT = "###Assistant:"
END_OF_CAPTION = "\n"
_LEADING_PUNCTUATION = ",.!?*#:;~"
_WORD_JOINERS = str.maketrans("-/", "  ")


@dataclass(frozen=True)
class Message:
    """One message of a conversation; ``role`` is ``"user"`` or ``"assistant"``."""

    role: str
    text: str
    media: tuple[Modality, ...] = ()
    """The modalities of the media in a user's message, in order."""
    ids: tuple[int, ...] | None = None
    """The token ids of a generated reply, with its end marker; None if unknown."""


class Wording(Protocol):
    """Interface of :class:`models.templates.Template`, which turns conversations into prompts."""

    def prompt(self, messages: Sequence[Message], generate: bool = False, reply_end: str | None = None) -> list[Piece]:
        """A conversation as pieces; see :func:`chat_prompt`."""


def alignment_prompt(media: Sequence[Modality], caption: str, end: str = END_OF_CAPTION) -> list[Piece]:
    """Stage 1: the media's slots, then the caption and its end marker as the target (paper, section 3.2)."""
    return [*_numbered(media, {}), Text(caption + end, target=True)]


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
    counts: dict[Modality, int] = {}
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


def introduce(media: Sequence[Modality], counts: dict[Modality, int], opening: str = "") -> list[Piece]:
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


def escape_markers(text: str) -> str:
    """``text`` with spaces in every run of three or more ``#`` (also full-width), which could be a turn marker."""
    return re.sub("[#\N{FULLWIDTH NUMBER SIGN}\N{SMALL NUMBER SIGN}]{3,}", lambda run: " ".join(run.group()), text)


def clean_caption(text: str) -> str:
    """Clean a stage-1 caption like the original's reader.

    Lower case, no leading punctuation, spaces for hyphens and slashes, ``person`` for ``<person>``, white space
    collapsed and stripped. (Original: ``pre_caption``.)
    """
    words = text.lower().lstrip(_LEADING_PUNCTUATION).translate(_WORD_JOINERS)
    words = words.replace("<person>", "person").rstrip("\n")
    return re.sub(r"\s{2,}", " ", words).strip(" ")


def check_order(turns: Sequence[Message], generate: bool) -> None:
    """Check that messages alternate, and that the last one fits ``generate``.

    Raises:
        PromptError: With the first fault.
    """
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


def _numbered(media: Sequence[Modality], counts: dict[Modality, int]) -> list[Slot]:
    slots = []
    for modality in media:
        slots.append(Slot(modality, counts.get(modality, 0)))
        counts[modality] = counts.get(modality, 0) + 1
    return slots
