"""Tokenizers of Hugging Face folders, with the same ids in every version of transformers.

The tokenizers library reads the files, because transformers' classes rebuild some tokenizers and differ between
versions. ``tokenizer_config.json`` has the end token, added tokens and chat template. Knows no language model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers
from torch import Tensor

from lavis_chatbridge.errors import CheckpointError, ConfigError, one_line

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
_SAME_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
"""A fixed date for chat templates that print it, so that a prompt has the same ids in training and in later chats."""
_PROBES = ("What is it?", "  two  blanks ", "é 🎈\n\n", "2024: A, B; and <s>")


class Tokenizer:
    """Text to token ids and back.

    Args:
        folder: The folder of the JSON files with the end token, added tokens and chat template.
        tokenizer: The tokenizer itself.
        named: Texts of ``bos_token``, ``eos_token`` and so on, if the JSON files do not name them.
    """

    def __init__(self, folder: Path, tokenizer: tokenizers.Tokenizer, named: Mapping[str, str] | None = None) -> None:
        config = {
            **(named or {}),
            **_json(folder / "special_tokens_map.json"),
            **_json(folder / "tokenizer_config.json"),
        }
        tokenizer.no_truncation()
        tokenizer.no_padding()
        present = tokenizer.get_added_tokens_decoder()
        for i, token in _added_tokens(folder, config):
            if i not in present:
                (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        self._marked = tokenizer
        self._plain = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        self._plain.encode_special_tokens = True
        added = tokenizer.get_added_tokens_decoder().values()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self._size = max(vocabulary.values(), default=-1) + 1

        self.folder = folder
        self.special = frozenset(token.content for token in added if token.special)
        """Special tokens; :meth:`encode` reads them as plain text."""
        self.added = frozenset(token.content for token in added if not token.special)
        """Other added tokens; :meth:`encode` reads them as tokens."""
        self.byte_ids = frozenset(i for token, i in vocabulary.items() if _BYTE.fullmatch(token))
        """Tokens that each stand for one byte of a character."""
        self.chat_template = _chat_template(folder, config)
        """The tokenizer's own chat template, or ""."""
        tokens = {name: config.get(name) for name in _NAMED}
        self._texts = {name: t.get("content") if isinstance(t, dict) else t for name, t in tokens.items()}
        ids = {name: tokenizer.token_to_id(text) for name, text in self._texts.items() if text is not None}
        for name, i in _json(folder / "config.json").items():  # for tokens that the tokenizer's files do not name
            if name.endswith("_token_id") and name[:-3] not in config:
                ids[name[:-3]] = next(iter(i), None) if isinstance(i, list) else i
        self.bos_id: int | None = ids.get("bos_token")
        self.eos_id: int | None = ids.get("eos_token")
        self.eos_token = "" if self.eos_id is None else tokenizer.id_to_token(self.eos_id) or ""
        self.pad_id: int = next(i for i in (ids.get("pad_token"), self.eos_id, 0) if i is not None)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; special tokens in it are read as plain text."""
        return self._plain.encode(_whole_characters(text), add_special_tokens=False).ids

    def encode_marked(self, text: str) -> list[int]:
        """The ids of a text with special tokens. For text of a chat template, never for a user's text."""
        return self._marked.encode(_whole_characters(text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of ids; special tokens and unknown ids are skipped."""
        return self._marked.decode(ids.tolist() if isinstance(ids, Tensor) else list(ids), skip_special_tokens=True)

    def __len__(self) -> int:
        """The largest id plus one."""
        return self._size

    def render(self, messages: Sequence[Mapping[str, str]], generate: bool) -> str:
        """A conversation in the tokenizer's own chat template.

        Raises:
            ConfigError: If there is no template, or it refuses these messages.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        if not self.chat_template:
            raise ConfigError("the language model's tokenizer has no chat template: choose another model.template")
        tokens: dict[str, Any] = {name: text or "" for name, text in self._texts.items()}
        try:
            rendered: Any = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=_SAME_DAY + self.chat_template,
                add_generation_prompt=generate,
                enable_thinking=False,
                **tokens,
            )
        except Exception as error:  # a template is a program and may raise any error
            raise ConfigError(f"the tokenizer's chat template fails: {one_line(error)}") from error
        return (rendered[0] if isinstance(rendered, tuple) else rendered)[0]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Raises:
        CheckpointError: If there is none, or it cannot be read.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            return Tokenizer(folder, tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))
        if (folder / "tokenizer.model").is_file():
            return Tokenizer(folder, *_from_sentencepiece(folder / "tokenizer.model"))
        if (folder / "merges.txt").is_file():
            from transformers import AutoTokenizer

            loaded: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            return Tokenizer(folder, loaded.backend_tokenizer)
    except Exception as error:  # the libraries raise plain Exception
        raise CheckpointError(
            f"cannot read the tokenizer in {folder}: {one_line(error)}; save it again as tokenizer.json"
        ) from error
    raise CheckpointError(f"{folder} does not contain a tokenizer (tokenizer.json or tokenizer.model)")


def _from_sentencepiece(file: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Convert a sentencepiece BPE (LLaMA's and Vicuna's original folders) to a tokenizer and its named tokens.

    Raises:
        ValueError: If it has another algorithm or other settings: ids would differ.
    """
    from sentencepiece import SentencePieceProcessor

    own = SentencePieceProcessor(model_file=str(file))
    pieces = [own.id_to_piece(i) for i in range(own.get_piece_size())]
    special = [piece for i, piece in enumerate(pieces) if own.is_control(i) or own.is_unknown(i)]
    plain = {p: own.get_score(i) for i, p in enumerate(pieces) if p not in special and not own.is_byte(i)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(plain, key=lambda piece: -plain[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in plain and piece[cut:] in plain
    ]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    unknown = pieces[own.unk_id()]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    if any(tokenizer.encode(text).ids != own.encode(text) for text in _PROBES):
        raise ValueError("tokenizer.model is not a BPE with LLaMA's settings")
    tokenizer.add_special_tokens(special)
    made = {left + right for left, right in merges}
    symbols = [piece for piece in plain if len(piece) > 1 and piece not in made]  # user-defined symbols
    tokenizer.add_tokens([tokenizers.AddedToken(symbol, normalized=False) for symbol in symbols])
    named = {"bos_token": own.bos_id(), "eos_token": own.eos_id(), "pad_token": own.pad_id()}
    return tokenizer, {name: pieces[i] for name, i in named.items() if i >= 0}


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> list[tuple[int, tokenizers.AddedToken]]:
    """Added tokens by id, in order."""
    found: dict[int, dict[str, Any]] = {i: {"content": text} for text, i in _json(folder / "added_tokens.json").items()}
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        found[int(i)] = {"content": token} if isinstance(token, str) else token
    return [(i, tokenizers.AddedToken(**{"normalized": False, **found[i]})) for i in sorted(found)]


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = config.get("chat_template") or ""
    if isinstance(found, list):
        return next((one["template"] for one in found if one.get("name") == "default"), "")
    return found


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _whole_characters(text: str) -> str:
    """``text`` with U+FFFD for each lone surrogate, which tokenizers cannot encode."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
