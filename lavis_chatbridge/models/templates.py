"""Chat templates: make the same prompt of a conversation in training, evaluation, chat and server.

``model.template`` names one of three: ``human_assistant`` (the paper's), ``vicuna_v1`` (Vicuna 1.1 and 1.5) and
``tokenizer`` (the chat template in the tokenizer's own files). Role markers in a message's text are split with a
blank, so that a text cannot start or end a turn. This module uses tokenizers, but no language model.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.models.tokenizer import Tokenizer
from lavis_chatbridge.prompting.conversation import (
    END_OF_TURN,
    Message,
    Modality,
    Piece,
    Text,
    chat_prompt,
    check_order,
    escape_markers,
    introduce,
)

TEMPLATES = ("human_assistant", "vicuna_v1", "tokenizer")

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
"""The system prompt that the Vicuna models were trained with."""
_CONTENT = "content-of-a-message"
"""Stands for every message while a template's own text is found."""


class Template:
    """The prompt format of a language model's conversations.

    Attributes:
        stops: Texts that end a reply.
        end_ids: Tokens that end a reply.
    """

    name: str

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.end_ids: frozenset[int] = frozenset(() if tokenizer.eos_id is None else (tokenizer.eos_id,))

    def prompt(self, messages: Sequence[Message], generate: bool = False, reply_end: str | None = None) -> list[Piece]:
        """A conversation as pieces, without BOS; replies with their end mark are targets.

        Args:
            messages: Alternating messages, a user's first.
            generate: End with the start of a reply, for generation; the last message must be a user's.
            reply_end: A data set's own text after a reply, in ``human_assistant`` only.
        """
        raise NotImplementedError

    def reply(self, text: str) -> Text:
        """A reply with its end mark, as in :meth:`prompt`."""
        pieces = self.prompt([Message("user", "x"), Message("assistant", text)])
        return next(piece for piece in pieces if isinstance(piece, Text) and piece.target)


def load_template(name: str, tokenizer: Tokenizer, system: str = "", reply_end: str = END_OF_TURN) -> Template:
    """The template with a name; ``reply_end`` ends replies in ``human_assistant``."""
    if name not in TEMPLATES:
        raise ConfigError(f"model.template is {name!r}; known are {', '.join(TEMPLATES)}")
    if name == "human_assistant":
        return HumanAssistant(tokenizer, system, reply_end)
    return VicunaV1(tokenizer, system) if name == "vicuna_v1" else TokenizerTemplate(tokenizer, system)


class HumanAssistant(Template):
    """``###Human: ...###Assistant: ...###``, the paper's template."""

    name = "human_assistant"

    def __init__(self, tokenizer: Tokenizer, system: str = "", reply_end: str = END_OF_TURN) -> None:
        super().__init__(tokenizer, (END_OF_TURN,))
        self._reply_end = reply_end
        self._front = [Text(escape_markers(system))] if system else []

    def prompt(self, messages: Sequence[Message], generate: bool = False, reply_end: str | None = None) -> list[Piece]:
        return [*self._front, *chat_prompt(messages, generate, self._reply_end if reply_end is None else reply_end)]


class VicunaV1(Template):
    """``USER: ... ASSISTANT: ...</s>``, where ``</s>`` is the tokenizer's end token."""

    name = "vicuna_v1"

    def __init__(self, tokenizer: Tokenizer, system: str = "") -> None:
        super().__init__(tokenizer)
        if tokenizer.eos_id is None:
            raise ConfigError("model.template vicuna_v1 needs a tokenizer with an end token; this one has none")
        self._eos, self._markers = tokenizer.eos_id, ("USER:", "ASSISTANT:")
        self._front = f"{break_up(system, self._markers) or VICUNA_SYSTEM} "

    def prompt(self, messages: Sequence[Message], generate: bool = False, reply_end: str | None = None) -> list[Piece]:
        check_order(messages, generate)
        pieces: list[Piece] = [Text(self._front)]
        counts: Counter[Modality] = Counter()
        for message in messages:
            text = break_up(message.text, self._markers)
            if message.role == "user":
                pieces += _user(message.media, text, counts, "USER: ", " ASSISTANT:")
            else:
                pieces.append(Text(text, True, (*self.tokenizer.encode(text), self._eos)))
        return pieces


class TokenizerTemplate(Template):
    """The chat template of the tokenizer's own files, with thinking switched off.

    All text between two media is encoded together, so a conversation without media has the same ids as with
    ``apply_chat_template``. A reply is a target only if the text before it is the same as in a chat: templates such as
    Qwen3's put an empty thought before the newest reply only, so only the last reply is a target.
    """

    name = "tokenizer"

    def __init__(self, tokenizer: Tokenizer, system: str = "") -> None:
        super().__init__(tokenizer)
        self._known: dict[tuple[int, bool], list[str]] = {}
        self._system = ""
        self._opening = self._fixed(1, True)[1]
        closing = self._fixed(2, False)[2].strip()
        longest_first = sorted(tokenizer.special | tokenizer.added, key=len, reverse=True)
        token = next((word for word in longest_first if closing.startswith(word)), "")
        self._end = token or closing
        self._added_end = "" if closing else tokenizer.eos_token
        self.stops = (closing,) if closing and not token else ()
        self.end_ids |= frozenset(tokenizer.encode_marked(token)[:1])
        self._find_markers(self._fixed(3, True)[1:])
        self._trims = {role: "  x  " not in self._shown(role, "  x  ") for role in ("user", "assistant")}
        self._forgets = "thought" not in self._shown("assistant", "<think>\nthought\n</think>\n\nx")
        if system := self._broken(system):
            turns = [{"role": "system", "content": system}, {"role": "user", "content": "x"}]
            with suppress(ConfigError):
                self._system = system if system in tokenizer.render(turns, True) else ""
            self._known.clear()
        self._first = f"{system}\n\n" if system and not self._system else ""  # before the first user message

    def prompt(self, messages: Sequence[Message], generate: bool = False, reply_end: str | None = None) -> list[Piece]:
        check_order(messages, generate)
        opening, *behind = self._fixed(len(messages), generate)
        pieces: list[Piece] = [Text(opening)]
        counts: Counter[Modality] = Counter()
        front, blank, as_in_chat = self._first, "", False
        for message, closing in zip(messages, behind, strict=True):
            text = self._content(message)
            if message.role == "user":
                as_in_chat = closing.startswith(self._opening)
                blank = closing[len(self._opening) :] if as_in_chat else ""
                pieces += _user(message.media, text, counts, front, closing[: len(closing) - len(blank)])
                front = ""
            else:
                ends = bool(self._end) and closing.lstrip().startswith(self._end)
                cut = closing.index(self._end) + len(self._end) if ends else 0
                pieces.append(Text(f"{blank}{text}{closing[:cut]}{self._added_end}", target=as_in_chat))
                pieces.append(Text(closing[cut:]))
        return _encoded(pieces, self.tokenizer)

    def _fixed(self, count: int, generate: bool) -> list[str]:
        """The template's own text before, between and after ``count`` messages."""
        if (count, generate) not in self._known:
            turns = [{"role": "assistant" if i % 2 else "user", "content": _CONTENT} for i in range(count)]
            front = [{"role": "system", "content": self._system}] if self._system else []
            parts = self.tokenizer.render([*front, *turns], generate).split(_CONTENT)
            if len(parts) != count + 1:
                raise ConfigError(
                    "the tokenizer's chat template drops or repeats messages: choose another model.template"
                )
            self._known[count, generate] = parts
        return self._known[count, generate]

    def _find_markers(self, fixed: Sequence[str]) -> None:
        """Find the role markers: special tokens, and words of the template."""
        tokenizer = self.tokenizer
        tokens = tokenizer.special | {
            word for word in tokenizer.added if word.strip() and word in tokenizer.chat_template
        }
        longest_first = "|".join(re.escape(word) for word in sorted(tokens, key=len, reverse=True))
        words = {word for text in fixed for word in re.sub(longest_first or "$^", " ", text).split()}
        self._markers = tokens | {word for word in words if not word.isalnum()}
        if not any(token in text for token in tokens for text in fixed):
            self._markers |= words
        self._forbidden = {ids[0] for ids in map(tokenizer.encode_marked, tokens) if len(ids) == 1}

    def _shown(self, role: str, content: str) -> str:
        """A rendered conversation; the first message of ``role`` has this content."""
        turns = [{"role": r, "content": content if r == role else "y"} for r in ("user", "assistant")]
        return self.tokenizer.render([*turns, {"role": "user", "content": "z"}], True)

    def _content(self, message: Message) -> str:
        """A message's text as the template renders it, without role markers."""
        text = message.text
        if message.role == "assistant" and self._forgets:
            text = text.rpartition("</think>")[2].lstrip("\n")
        return self._broken(text.strip() if self._trims[message.role] else text)

    def _broken(self, text: str) -> str:
        broken = break_up(text, self._markers)
        caught = self._forbidden.intersection(self.tokenizer.encode_marked(broken))
        return " ".join(broken) if caught else broken


def _encoded(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[Piece]:
    """Add ids to pieces; a text is encoded together with all text since the last medium."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if isinstance(piece, Text) and isinstance(last, Text) and not piece.target and not last.target:
            merged[-1] = Text(last.text + piece.text)
        else:
            merged.append(piece)
    read, ids = "", list[int]()
    for i, piece in enumerate(merged):
        if not isinstance(piece, Text):
            read, ids = "", []
            continue
        whole = tokenizer.encode_marked(read + piece.text)
        if whole[: len(ids)] != ids:  # a token would span both texts: encode this one alone
            read, ids, whole = "", [], tokenizer.encode_marked(piece.text)
        merged[i] = replace(piece, ids=tuple(whole[len(ids) :]))
        read, ids = read + piece.text, whole
    return [piece for piece in merged if not isinstance(piece, Text) or piece.text]


def break_up(text: str, markers: Iterable[str]) -> str:
    """``text`` with a blank inserted in every role marker, and in text that Unicode's NFKC turns into one."""
    words = sorted((marker for marker in markers if marker), key=len, reverse=True)
    folded = unicodedata.normalize("NFKC", text)
    if any(word in folded and word not in text for word in words):
        text = folded
    while found := next((word for word in words if word in text), None):
        broken = f"{found[:-1]} {found[-1]}"
        text = text.replace(found, "" if found in broken else broken)
    return text


def _user(media: Sequence[Modality], text: str, counts: Counter[Modality], opening: str, closing: str) -> list[Piece]:
    """A user's message: its media in the paper's format, then its text."""
    if not media:
        return [Text(f"{opening}{text}{closing}")]
    return [*introduce(media, counts, opening), Text(f". {text}{closing}")]
