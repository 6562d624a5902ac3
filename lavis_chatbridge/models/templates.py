"""Conversations in the words of one model or another: turns become parts, which a tokenizer turns into positions.

``human_assistant`` is the paper's format, ``vicuna_v1`` that of Vicuna 1.1 and 1.5 (FastChat's ``vicuna_v1.1``),
``tokenizer`` the language model's own chat template. What a user types is always tokenised as plain text, and what
could be taken for a role is spaced out. This module knows no model.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.models.language_model import Codec
from lavis_chatbridge.prompting import Message, Modality, Slot, Text, chat_prompt, escape_markers
from lavis_chatbridge.prompting.conversation import END_OF_TURN, introduce


@dataclass(frozen=True)
class Ids:
    """Tokens that are known as such."""

    ids: tuple[int, ...]


Part: TypeAlias = Text | Slot | Ids

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
"""What the Vicuna models were trained to find in front of every conversation."""


class Template(Protocol):
    """How one model wants conversations.

    Attributes:
        stops: Texts that end a reply.
        end_ids: Tokens that end a reply.
    """

    stops: tuple[str, ...]
    end_ids: frozenset[int]

    def parts(self, turns: Sequence[Message]) -> list[Part]:
        """A conversation up to the opening of the reply to its last turn; slots count its media that were reached."""

    def escape(self, text: str) -> str:
        """``text`` in which nothing can be taken for a role or the end of a turn."""


class HumanAssistant:
    """``###Human: ...###Assistant: ...###``, the paper's format.

    Args:
        codec: The tokenizer.
        system: Words in front of the conversation; the paper has none.
        reply_end: What closes a reply.
    """

    def __init__(self, codec: Codec, system: str = "", reply_end: str = END_OF_TURN) -> None:
        self.stops: tuple[str, ...] = (END_OF_TURN,)
        self.end_ids = _ids(codec.eos_id)
        self._codec, self._reply_end = codec, reply_end
        front: list[Part] = [Ids((codec.bos_id,))] if codec.bos_id is not None else []
        self._front = [*front, *([Text(escape_markers(system))] if system else [])]

    def parts(self, turns: Sequence[Message]) -> list[Part]:
        """See `Template`."""
        replies = iter([turn for turn in turns if turn.role == "assistant"])
        parts = list(self._front)
        for piece in chat_prompt(turns, generate=True, reply_end=self._reply_end):
            if isinstance(piece, Text) and piece.target:
                parts += self._reply(next(replies), piece)
            else:
                parts.append(piece)
        return parts

    def escape(self, text: str) -> str:
        """See `Template`."""
        return escape_markers(text)

    def _reply(self, turn: Message, piece: Text) -> list[Part]:
        """A reply in the tokens in which it was made, or in the tokenizer's where those are not known."""
        if turn.ids is None:
            return [piece]
        ids = _without(turn.ids, self.end_ids)
        if self._codec.decode(list(ids)).endswith(self.stops):
            return [Ids(ids)]
        return [Ids(ids), Text(self._reply_end)]


class VicunaV1:
    """``USER: ... ASSISTANT: ...</s>``, where ``</s>`` is the tokenizer's own end.

    Args:
        codec: The tokenizer.
        system: Words in front of the conversation, Vicuna's own where empty.

    Raises:
        ConfigError: If the tokenizer has no end.
    """

    def __init__(self, codec: Codec, system: str = "") -> None:
        if codec.eos_id is None:
            raise ConfigError("template vicuna_v1 needs a tokenizer with an end-of-sequence token; this one has none")
        self.stops: tuple[str, ...] = ()
        self.end_ids = _ids(codec.eos_id)
        self._end = Ids((codec.eos_id,))
        front: list[Part] = [Ids((codec.bos_id,))] if codec.bos_id is not None else []
        self._front = [*front, Text(f"{self.escape(system) or VICUNA_SYSTEM} ")]

    def parts(self, turns: Sequence[Message]) -> list[Part]:
        """See `Template`."""
        parts, counts = list(self._front), dict[Modality, int]()
        for turn in turns:
            if turn.role == "assistant":
                content = Text(self.escape(turn.text)) if turn.ids is None else Ids(_without(turn.ids, self.end_ids))
                parts += [content, self._end]
            else:
                parts += _user(turn, counts, "USER: ", " ASSISTANT:", self.escape)
        return parts

    def escape(self, text: str) -> str:
        """See `Template`."""
        return re.sub(r"(USER|ASSISTANT)(\s*):", r"\1 \2:", text)


class TokenizerTemplate:
    """The chat template that comes with a tokenizer, special tokens included.

    Args:
        codec: The tokenizer, one of transformers.
        system: The system message, none where empty.

    Raises:
        ConfigError: If the tokenizer has no template.
    """

    def __init__(self, codec: Any, system: str = "") -> None:
        if not hasattr(codec, "render"):
            raise ConfigError(
                "template 'tokenizer' needs a tokenizer of transformers; this one is a sentencepiece file"
            )
        self._codec, self._system = codec, system
        user, reply = _marks(2)
        rendered = codec.render(_messages("", [("user", user), ("assistant", reply)]), False)
        closing = rendered.partition(reply)[2]
        ids = codec.encode_marked(closing)
        special = frozenset(i for i in ids[:1] if not codec.decode([i]))
        self.end_ids = _ids(codec.eos_id) | special
        self.stops: tuple[str, ...] = (closing.strip(),) if closing.strip() and not special else ()

    def parts(self, turns: Sequence[Message]) -> list[Part]:
        """See `Template`."""
        marks = _marks(len(turns) + 1)
        said = [(turn.role, mark) for turn, mark in zip(turns, marks[1:], strict=True)]
        rendered = self._codec.render(_messages(marks[0] if self._system else "", said), True)
        contents: dict[str, list[Part]] = {marks[0]: [Text(self._system)]}
        counts: dict[Modality, int] = {}
        for turn, mark in zip(turns, marks[1:], strict=True):
            if turn.role == "user":
                contents[mark] = _user(turn, counts, "", "", self.escape)
            else:
                contents[mark] = [Text(turn.text) if turn.ids is None else Ids(_without(turn.ids, self.end_ids))]
        parts: list[Part] = []
        for fixed in re.split("(" + "|".join(map(re.escape, marks)) + ")", rendered):
            if fixed:
                parts += contents.get(fixed) or [Ids(tuple(self._codec.encode_marked(fixed)))]
        return parts

    def escape(self, text: str) -> str:
        """See `Template`: roles are special tokens here, which text never becomes."""
        return text


TEMPLATES = ("human_assistant", "vicuna_v1", "tokenizer")


def load_template(name: str, codec: Codec, system: str = "", reply_end: str = END_OF_TURN) -> Template:
    """A template by its name.

    Raises:
        ConfigError: If there is none of that name, or the tokenizer does not serve it.
    """
    if name == "human_assistant":
        return HumanAssistant(codec, system, reply_end)
    if name == "vicuna_v1":
        return VicunaV1(codec, system)
    if name == "tokenizer":
        return TokenizerTemplate(codec, system)
    raise ConfigError(f"unknown template {name!r}; known are {', '.join(TEMPLATES)}")


def _user(
    turn: Message, counts: dict[Modality, int], opening: str, closing: str, escape: Callable[[str], str]
) -> list[Part]:
    """A user's turn: its media, introduced in the paper's words, then its text."""
    if not turn.media:
        return [Text(f"{opening}{escape(turn.text)}{closing}")]
    return [*introduce(turn.media, counts, opening), Text(f". {escape(turn.text)}{closing}")]


def _messages(system: str, said: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    front = [("system", system)] if system else []
    return [{"role": role, "content": content} for role, content in (*front, *said)]


def _marks(count: int) -> list[str]:
    """Words that stand for contents while a template is rendered; nobody can guess and type them."""
    return [f"content-{secrets.token_hex(12)}" for _ in range(count)]


def _ids(token: int | None) -> frozenset[int]:
    return frozenset(() if token is None else (token,))


def _without(ids: tuple[int, ...], ends: frozenset[int]) -> tuple[int, ...]:
    return ids[:-1] if ids and ids[-1] in ends else ids
