"""Chat templates: one conversation becomes the same prompt in training, evaluation, chat and server.

``model.template`` names one of three: ``human_assistant`` (the paper's), ``vicuna_v1`` (Vicuna 1.1 and 1.5) and
``tokenizer`` (the chat template in the tokenizer's own files). Role markers in a message's text are broken up, so that
no text opens or closes a turn. This module knows tokenizers, no language model.
"""

from __future__ import annotations

import re
import secrets
import unicodedata
from collections.abc import Iterable, Sequence

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.models.tokenizer import Codec
from lavis_chatbridge.prompting import Message, Modality, Piece, Text, chat_prompt, escape_markers
from lavis_chatbridge.prompting.conversation import END_OF_TURN, check_order, introduce

TEMPLATES = ("human_assistant", "vicuna_v1", "tokenizer")

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
"""The system prompt that the Vicuna models were trained with."""


class Template:
    """How a language model reads conversations."""

    name: str
    stops: tuple[str, ...]
    """Texts that end a reply."""
    end_ids: frozenset[int]
    """Tokens that end a reply."""

    def prompt(self, messages: Sequence[Message], generate: bool = False, reply_end: str | None = None) -> list[Piece]:
        """A conversation as pieces, without BOS; replies with their end mark are targets.

        Args:
            messages: Alternating messages, a user's first.
            generate: End with the opening of a reply; the last message is then a user's.
            reply_end: What closes a reply in ``human_assistant``, where a data set has its own.

        Raises:
            PromptError: If the messages do not alternate, or ``generate`` does not fit the last one.
            ConfigError: If the tokenizer's template refuses the conversation.
        """
        raise NotImplementedError

    def reply(self, text: str) -> Text:
        """A reply with its end mark, as :meth:`prompt` words it."""
        raise NotImplementedError


def load_template(name: str, codec: Codec, system: str = "", reply_end: str = END_OF_TURN) -> Template:
    """A template by its name.

    Args:
        name: One of ``TEMPLATES``.
        codec: The tokenizer.
        system: Words in front of the conversation.
        reply_end: What closes a reply in ``human_assistant``.

    Raises:
        ConfigError: If there is no such template, or the tokenizer lacks what it needs.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"model.template is {name!r}; known are {', '.join(TEMPLATES)}")
    if name == "human_assistant":
        return HumanAssistant(codec, system, reply_end)
    return VicunaV1(codec, system) if name == "vicuna_v1" else TokenizerTemplate(codec, system)


class HumanAssistant(Template):
    """``###Human: ...###Assistant: ...###``, the paper's template."""

    name = "human_assistant"

    def __init__(self, codec: Codec, system: str = "", reply_end: str = END_OF_TURN) -> None:
        self.stops: tuple[str, ...] = (END_OF_TURN,)
        self.end_ids = _set_of(codec.eos_id)
        self._codec, self._reply_end = codec, reply_end
        self._front = [Text(escape_markers(system))] if system else []

    def prompt(self, messages: Sequence[Message], generate: bool = False, reply_end: str | None = None) -> list[Piece]:
        end = self._reply_end if reply_end is None else reply_end
        replies = iter([message for message in messages if message.role == "assistant"])
        pieces: list[Piece] = list(self._front)
        for piece in chat_prompt(messages, generate, end):
            is_reply = isinstance(piece, Text) and piece.target
            pieces += self._generated(next(replies), piece, end) if is_reply else [piece]
        return pieces

    def reply(self, text: str) -> Text:
        return Text(escape_markers(text) + self._reply_end, target=True)

    def _generated(self, message: Message, piece: Piece, end: str) -> list[Piece]:
        """A reply in the tokens that it was generated as, where they are known."""
        if message.ids is None:
            return [piece]
        ids = _without_end(message.ids, self.end_ids)
        closed = self._codec.decode(ids).endswith(self.stops)
        return [Text(message.text, True, ids), *([] if closed else [Text(end, target=True)])]


class VicunaV1(Template):
    """``USER: ... ASSISTANT: ...</s>``, where ``</s>`` is the tokenizer's end token.

    Raises:
        ConfigError: If the tokenizer has no end token.
    """

    name = "vicuna_v1"

    def __init__(self, codec: Codec, system: str = "") -> None:
        if codec.eos_id is None:
            raise ConfigError("model.template vicuna_v1 needs a tokenizer with an end token; this one has none")
        self.stops: tuple[str, ...] = ()
        self.end_ids = _set_of(codec.eos_id)
        self._codec, self._eos = codec, codec.eos_id
        self._markers = ("USER:", "ASSISTANT:")
        self._front = f"{break_up(system, self._markers) or VICUNA_SYSTEM} "

    def prompt(self, messages: Sequence[Message], generate: bool = False, reply_end: str | None = None) -> list[Piece]:
        check_order(messages, generate)
        pieces: list[Piece] = [Text(self._front)]
        counts: dict[Modality, int] = {}
        for message in messages:
            text = break_up(message.text, self._markers)
            if message.role == "assistant":
                pieces.append(self.reply(message.text) if message.ids is None else self._closed(text, message.ids))
            else:
                pieces += _user(message.media, text, counts, "USER: ", " ASSISTANT:")
        return pieces

    def reply(self, text: str) -> Text:
        broken = break_up(text, self._markers)
        return self._closed(broken, tuple(self._codec.encode(broken)))

    def _closed(self, text: str, ids: tuple[int, ...]) -> Text:
        return Text(text, True, (*_without_end(ids, self.end_ids), self._eos))


class TokenizerTemplate(Template):
    """The chat template of the tokenizer's own files, with thinking switched off.

    Text between two media is encoded in one go, so a conversation without media has the ids that the tokenizer's own
    rendering has. A reply is a target where the words before it are those that a chat would give: templates such as
    Qwen3's put an empty thought before the newest reply only, so there only the last reply is a target.

    Raises:
        ConfigError: If the tokenizer has no template, or one that drops or repeats messages.
    """

    name = "tokenizer"

    def __init__(self, codec: Codec, system: str = "") -> None:
        self._codec = codec
        self._known: dict[tuple[int, bool], list[str]] = {}
        self._system = ""
        self._system_is_user = False
        self._opening = self._fixed(1, True)[1]
        closing = self._fixed(2, False)[2].strip()
        longest_first = sorted(codec.special | codec.added, key=len, reverse=True)
        token = next((word for word in longest_first if closing.startswith(word)), "")
        self._end = token or closing
        self.stops: tuple[str, ...] = (closing,) if closing and not token else ()
        self.end_ids = _set_of(codec.eos_id) | frozenset(codec.encode_marked(token)[:1])
        self._find_markers(self._fixed(3, True)[1:])
        self._trims = {role: "  x  " not in self._shown(role, "  x  ") for role in ("user", "assistant")}
        self._forgets = "thought" not in self._shown("assistant", "<think>\nthought\n</think>\n\nx")
        self._system = self._broken(system)
        self._system_is_user = bool(system) and not self._takes_system()
        self._known.clear()

    def prompt(self, messages: Sequence[Message], generate: bool = False, reply_end: str | None = None) -> list[Piece]:
        check_order(messages, generate)
        opening, *behind = self._fixed(len(messages), generate)
        run = _Run(self._codec, opening)
        counts: dict[Modality, int] = {}
        as_in_chat, blank = False, ""
        for number, (message, closing) in enumerate(zip(messages, behind, strict=True)):
            text = self._content(message)
            if message.role == "user":
                as_in_chat = closing.startswith(self._opening)
                blank = closing[len(self._opening) :] if as_in_chat else ""
                front = f"{self._system}\n\n" if self._system_is_user and number == 0 else ""
                for piece in _user(message.media, text, counts, front, closing[: len(closing) - len(blank)]):
                    run.add(piece)
            else:
                ends = bool(self._end) and closing.lstrip().startswith(self._end)
                cut = closing.index(self._end) + len(self._end) if ends else 0
                eos = self._codec.eos_id if not self._end else None
                run.reply(f"{blank}{text}{closing[:cut]}", as_in_chat, eos)
                run.add(Text(closing[cut:]))
        return run.finish()

    def reply(self, text: str) -> Text:
        said = self.prompt([Message("user", "x"), Message("assistant", text)])
        targets = [piece for piece in said if isinstance(piece, Text) and piece.target]
        return Text("".join(t.text for t in targets), True, tuple(i for t in targets for i in t.ids or ()))

    def _fixed(self, count: int, generate: bool) -> list[str]:
        """The template's own words before, between and behind ``count`` messages."""
        if (count, generate) in self._known:
            return self._known[count, generate]
        marks = [f"content-{secrets.token_hex(12)}" for _ in range(count)]
        roles = ("user", "assistant")
        said = [{"role": roles[i % 2], "content": mark} for i, mark in enumerate(marks)]
        front = [{"role": "system", "content": self._system}] if self._system and not self._system_is_user else []
        parts = re.split("|".join(marks), self._codec.render([*front, *said], generate))
        if len(parts) != count + 1:
            raise ConfigError("the tokenizer's chat template drops or repeats messages: choose another model.template")
        self._known[count, generate] = parts
        return parts

    def _find_markers(self, fixed: Sequence[str]) -> None:
        """Learn what opens and closes turns: special tokens, and words of the template."""
        codec = self._codec
        tokens = codec.special | {word for word in codec.added if word.strip() and word in codec.chat_template}
        self._markers = set(tokens)
        longest_first = "|".join(re.escape(word) for word in sorted(tokens, key=len, reverse=True))
        words = {word for text in fixed for word in re.sub(longest_first or "$^", " ", text).split()}
        self._markers |= {word for word in words if not word.isalnum()}
        if not any(token in text for token in tokens for text in fixed):
            self._markers |= words
        self._forbidden = {ids[0] for ids in map(codec.encode_marked, tokens) if len(ids) == 1}

    def _shown(self, role: str, content: str) -> str:
        """A conversation whose first message of a role has this content."""
        said = [{"role": r, "content": content if r == role else "y"} for r in ("user", "assistant")]
        return self._codec.render([*said, {"role": "user", "content": "z"}], True)

    def _takes_system(self) -> bool:
        front = {"role": "system", "content": self._system}
        try:
            return self._system in self._codec.render([front, {"role": "user", "content": "x"}], True)
        except ConfigError:
            return False

    def _content(self, message: Message) -> str:
        """A message's text as the template renders it, without role markers."""
        text = message.text
        if message.role == "assistant" and self._forgets:
            text = text.rpartition("</think>")[2].lstrip("\n")
        return self._broken(text.strip() if self._trims[message.role] else text)

    def _broken(self, text: str) -> str:
        broken = break_up(text, self._markers)
        caught = self._forbidden.intersection(self._codec.encode_marked(broken))
        return " ".join(broken) if caught else broken


class _Run:
    """Pieces whose text is encoded with everything since the last medium as its context."""

    def __init__(self, codec: Codec, opening: str) -> None:
        self._codec, self._pieces = codec, list[Piece]()
        self._read, self._ids, self._pending = "", list[int](), opening

    def add(self, piece: Piece) -> None:
        """Add words that are no target, or a medium."""
        if isinstance(piece, Text):
            self._pending += piece.text
            return
        self._flush()
        self._pieces.append(piece)
        self._read, self._ids = "", []

    def reply(self, text: str, target: bool, eos: int | None) -> None:
        """Add a reply, followed by ``eos`` where the template has no end mark."""
        self._flush()
        self._pending = text
        self._flush(target, () if eos is None else (eos,))

    def finish(self) -> list[Piece]:
        """All pieces."""
        self._flush()
        return self._pieces

    def _flush(self, target: bool = False, end: tuple[int, ...] = ()) -> None:
        text, self._pending = self._pending, ""
        if not text and not end:
            return
        whole = self._codec.encode_marked(self._read + text)
        known = len(self._ids)
        if whole[:known] == self._ids:
            self._read, self._ids, new = self._read + text, whole, whole[known:]
        else:
            self._read, self._ids = text, (new := self._codec.encode_marked(text))
        self._pieces.append(Text(text, target, (*new, *end)))
        if end:
            self._read, self._ids = "", []


def break_up(text: str, markers: Iterable[str]) -> str:
    """``text`` with a blank inside everything that is a role marker, or that Unicode's NFKC turns into one."""
    words = sorted((marker for marker in markers if marker), key=len, reverse=True)
    folded = unicodedata.normalize("NFKC", text)
    if any(word in folded and word not in text for word in words):
        text = folded
    while found := next((word for word in words if word in text), None):
        broken = f"{found[:-1]} {found[-1]}"
        text = text.replace(found, "" if found in broken else broken)
    return text


def _user(media: Sequence[Modality], text: str, counts: dict[Modality, int], opening: str, closing: str) -> list[Piece]:
    """A user's message: its media in the paper's words, then its text."""
    if not media:
        return [Text(f"{opening}{text}{closing}")]
    return [*introduce(media, counts, opening), Text(f". {text}{closing}")]


def _set_of(token: int | None) -> frozenset[int]:
    return frozenset(() if token is None else (token,))


def _without_end(ids: tuple[int, ...], ends: frozenset[int]) -> tuple[int, ...]:
    return ids[:-1] if ids and ids[-1] in ends else ids
