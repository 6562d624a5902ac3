"""Tokenizers of Hugging Face folders: the ids of the folder's own file, under every version of transformers.

``tokenizer.json`` is read by the tokenizers library and ``tokenizer.model`` by sentencepiece, because the classes of
transformers rebuild some tokenizers and differ between versions. End, added tokens and chat template come from
``tokenizer_config.json``. This module knows no language model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lavis_chatbridge.errors import CheckpointError, ConfigError

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass
class _Folder:
    """What the JSON files beside a tokenizer say about it."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> _Folder:
        merged: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (path / name).is_file():
                merged |= json.loads((path / name).read_text(encoding="utf-8"))
        return cls(path, merged)

    def token(self, name: str) -> str | None:
        """The text of ``bos_token``, ``eos_token`` or ``pad_token``."""
        value = self.config.get(name)
        return value.get("content") if isinstance(value, dict) else value

    def model_id(self, name: str) -> int | None:
        """The id that the language model's configuration names, for a token that the tokenizer's files do not."""
        if name in self.config or not (self.path / "config.json").is_file():
            return None
        found = json.loads((self.path / "config.json").read_text(encoding="utf-8")).get(f"{name}_id")
        return next(iter(found), None) if isinstance(found, list) else found

    @cached_property
    def added(self) -> dict[int, dict[str, Any]]:
        """Added tokens by id."""
        listed = self.config.get("added_tokens_decoder") or {}
        found = {int(i): {"content": t} if isinstance(t, str) else dict(t) for i, t in listed.items()}
        if (self.path / "added_tokens.json").is_file():
            for text, i in json.loads((self.path / "added_tokens.json").read_text(encoding="utf-8")).items():
                found.setdefault(int(i), {"content": text, "special": False})
        return dict(sorted(found.items()))

    @cached_property
    def template(self) -> str | None:
        """The chat template."""
        if (self.path / "chat_template.jinja").is_file():
            return (self.path / "chat_template.jinja").read_text(encoding="utf-8")
        found = self.config.get("chat_template")
        if isinstance(found, list):
            return next((one["template"] for one in found if one.get("name") == "default"), None)
        return found


_SAME_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
"""Templates that print the date get a fixed one: a prompt has the same ids in training as in every later chat."""


class Codec:
    """Text to token ids and back."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int
    byte_ids: frozenset[int]
    """Tokens that each stand for one byte of a character."""
    special: frozenset[str]
    """Special tokens; :meth:`encode` reads them as plain text."""
    added: frozenset[str]
    """Further added tokens; :meth:`encode` reads them as tokens."""
    chat_template: str
    """The tokenizer's own chat template, empty without one."""
    folder: Path
    """Where its files are."""

    def __init__(self, folder: _Folder) -> None:
        self._folder = folder
        self.folder, self.chat_template = folder.path, folder.template or ""
        self.bos_id, self.eos_id, pad = (self._id_of(name) for name in ("bos_token", "eos_token", "pad_token"))
        self.pad_id = next(i for i in (pad, self.eos_id, 0) if i is not None)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, encoded on its own; a special token that somebody typed is plain text."""
        raise NotImplementedError

    def encode_marked(self, text: str) -> list[int]:
        """The ids of a text in which special tokens count as such: for a chat template's words, never for a user's."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of ids; special tokens and unknown ids yield nothing."""
        raise NotImplementedError

    def __len__(self) -> int:
        """The largest id plus one."""
        raise NotImplementedError

    def _known(self, token: str) -> int | None:
        """The id of a token."""
        raise NotImplementedError

    def _id_of(self, name: str) -> int | None:
        text = self._folder.token(name)
        return self._folder.model_id(name) if text is None else self._known(text)

    def render(self, messages: Sequence[Mapping[str, str]], generate: bool) -> str:
        """A conversation in the tokenizer's own chat template.

        Raises:
            ConfigError: If there is no template, or it refuses these messages.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        if not self.chat_template:
            raise ConfigError("the language model's tokenizer has no chat template: choose another model.template")
        names: Any = {
            name: self._folder.token(name) or "" for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        try:
            rendered: Any = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=_SAME_DAY + self.chat_template,
                add_generation_prompt=generate,
                enable_thinking=False,
                **names,
            )
        except Exception as error:  # a template is a program, and may raise anything
            raise ConfigError(f"the tokenizer's chat template fails: {one_line(error)}") from error
        return (rendered[0] if isinstance(rendered, tuple) else rendered)[0]


class TokenizersCodec(Codec):
    """A ``tokenizer.json``, read by the tokenizers library."""

    def __init__(self, folder: _Folder, tokenizer: Any) -> None:
        from tokenizers import AddedToken, Tokenizer

        tokenizer.no_truncation()
        tokenizer.no_padding()
        present = tokenizer.get_added_tokens_decoder()
        for token in (AddedToken(**described) for i, described in folder.added.items() if i not in present):
            tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])
        self._marked = tokenizer
        self._plain = Tokenizer.from_str(tokenizer.to_str())
        self._plain.encode_special_tokens = True
        added = tokenizer.get_added_tokens_decoder().values()
        self.special = frozenset(token.content for token in added if token.special)
        self.added = frozenset(token.content for token in added if not token.special)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.byte_ids = frozenset(i for token, i in vocabulary.items() if _BYTE.fullmatch(token))
        self._size = max(vocabulary.values(), default=-1) + 1
        super().__init__(folder)

    def encode(self, text: str) -> list[int]:
        return self._plain.encode(_whole_characters(text), add_special_tokens=False).ids

    def encode_marked(self, text: str) -> list[int]:
        return self._marked.encode(_whole_characters(text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        return self._marked.decode(_listed(ids), skip_special_tokens=True)

    def __len__(self) -> int:
        return self._size

    def _known(self, token: str) -> int | None:
        return self._marked.token_to_id(token)


class SentencePieceCodec(Codec):
    """A ``tokenizer.model`` alone, read by sentencepiece: LLaMA's and Vicuna's original folders."""

    def __init__(self, folder: _Folder) -> None:
        from sentencepiece import SentencePieceProcessor

        self._pieces = SentencePieceProcessor(model_file=str(folder.path / "tokenizer.model"))
        size = self._pieces.get_piece_size()
        later = {i: token for i, token in folder.added.items() if i >= size}
        self._later = {i: token["content"] for i, token in later.items()}
        self.added = frozenset(token["content"] for token in later.values() if not token.get("special"))
        control = [self._pieces.id_to_piece(i) for i in range(size) if self._pieces.is_control(i)]
        self.special = frozenset((*control, *self._later.values())) - self.added
        self.byte_ids = frozenset(i for i in range(size) if self._pieces.is_byte(i))
        self._size = max((size - 1, *self._later)) + 1
        super().__init__(folder)

    def encode(self, text: str) -> list[int]:
        return self._split(_whole_characters(text), self.added)

    def encode_marked(self, text: str) -> list[int]:
        return self._split(_whole_characters(text), self.added | self.special)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        size = self._pieces.get_piece_size()
        texts, run = [], []
        for i in _listed(ids):
            if 0 <= i < size:
                run.append(i)
            elif (word := self._later.get(i)) in self.added:
                texts += [self._pieces.decode(run), word or ""]
                run = []
        return "".join([*texts, self._pieces.decode(run)])

    def __len__(self) -> int:
        return self._size

    def _split(self, text: str, words: frozenset[str]) -> list[int]:
        if not any(word in text for word in words):
            return self._pieces.encode(text)
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})", text):
            ids += [self._known(part) or 0] if part in words else self._pieces.encode(part)
        return ids

    def _id_of(self, name: str) -> int | None:
        own = {"bos_token": self._pieces.bos_id, "eos_token": self._pieces.eos_id, "pad_token": self._pieces.pad_id}
        if self._folder.token(name) is not None:
            return super()._id_of(name)
        return found if (found := own[name]()) >= 0 else None

    def _known(self, token: str) -> int | None:
        later = next((i for i, text in self._later.items() if text == token), None)
        if later is not None:
            return later
        found = self._pieces.piece_to_id(token)
        return found if self._pieces.id_to_piece(found) == token else None


def load_codec(folder: Path) -> Codec:
    """The tokenizer of a Hugging Face folder.

    Raises:
        CheckpointError: If there is none, or it cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        described = _Folder.read(folder)
        if (folder / "tokenizer.json").is_file():
            return TokenizersCodec(described, Tokenizer.from_file(str(folder / "tokenizer.json")))
        if (folder / "tokenizer.model").is_file():
            return SentencePieceCodec(described)
        if (folder / "merges.txt").is_file() or (folder / "vocab.txt").is_file():
            return TokenizersCodec(described, _converted(folder))
    except Exception as error:  # the libraries raise plain Exception
        raise CheckpointError(
            f"no tokenizer can be read from {folder}: {one_line(error)}; save it again as tokenizer.json"
        ) from error
    raise CheckpointError(f"{folder} holds no tokenizer (tokenizer.json or tokenizer.model)")


def _converted(folder: Path) -> Any:
    """The tokenizer of an older family (vocabulary and merges) as the tokenizers library has it."""
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return loaded.backend_tokenizer


def _whole_characters(text: str) -> str:
    """``text`` with U+FFFD for each lone surrogate, which tokenizers cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _listed(ids: Sequence[int] | Tensor) -> list[int]:
    return ids.tolist() if isinstance(ids, Tensor) else list(ids)


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
