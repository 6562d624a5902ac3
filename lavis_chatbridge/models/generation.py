"""One reply while it is generated: how its tokens are chosen, what ends it, and its text.

This module knows token ids and embeddings, no language model. Shapes: ``V`` vocabulary, ``Q`` soft tokens, ``D`` width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lavis_chatbridge.models.layout import Element
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.models.tokenizer import Tokenizer

Finish: TypeAlias = Literal["stop", "length", "cancelled"]

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TokenLogprob(NamedTuple):
    """The log-probability of a reply's token, and those of the likeliest tokens at its position."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class TextStream:
    """The text of a growing list of tokens; in total, the same as decoding all ids at once and stripping the result.

    Stop texts are searched in the text, so they are found even if they begin or end inside a token.

    Args:
        tokenizer: The tokenizer.
        stops: Texts that end the text and are not part of it.
        least: Ignore stop texts within the first ``least - 1`` tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), least: int = 0) -> None:
        self.text = ""
        """The text returned so far."""
        self.stopped: str | None = None
        """The stop text that was found, or None."""
        self.tokenizer = tokenizer
        self.stops = tuple(stop for stop in stops if stop)
        self._least, self._ids = least, list[int]()

    @classmethod
    def of(cls, tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str] = (), least: int = 0) -> TextStream:
        """A finished stream of these ids."""
        stream = cls(tokenizer, stops, least)
        stream._ids = list(ids)
        stream.finish()
        return stream

    def push(self, token: int) -> str:
        """Add a token; returns the text that has become final."""
        self._ids.append(token)
        # an incomplete character, or a run of bytes, may still change
        certain = len(self._ids)
        while certain and self._ids[certain - 1] in self.tokenizer.byte_ids:
            certain -= 1
        return self._advance(self.tokenizer.decode(self._ids[:certain]).rstrip(_BROKEN), final=False)

    def finish(self) -> str:
        """Return the rest of the text; no more tokens follow."""
        return self._advance(self.tokenizer.decode(self._ids), final=True)

    def _advance(self, whole: str, final: bool) -> str:
        if self.stopped is not None:
            return ""
        whole = whole.lstrip()
        exempt = len(self.tokenizer.decode(self._ids[: self._least - 1]).lstrip()) if self._least > 1 else 0
        found = [(i, stop) for stop in self.stops if (i := whole.find(stop, exempt)) >= 0]
        if found:
            offset, self.stopped = min(found)
            whole = whole[:offset]
        elif not final:
            whole = whole[: len(whole) - max((_overlap(whole, stop) for stop in self.stops), default=0)]
        new = whole.rstrip()[len(self.text) :]
        self.text += new
        return new


def _overlap(text: str, stop: str) -> int:
    """Number of characters at the end of ``text`` that may be the beginning of ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Prefix:
    """The key-value cache of one conversation, and the elements at its positions."""

    def __init__(self) -> None:
        self.elements: list[Element] = []
        self._cache: Any = None

    def common(self, elements: Sequence[Element]) -> int:
        """Number of a prompt's first elements that are in the cache; never the last one, whose logits are needed."""
        most = max(0, min(len(self.elements), len(elements) - 1))
        return next((i for i in range(most) if self.elements[i] != elements[i]), most)

    def take(self, length: int) -> Any:
        """Remove and return the cache of the first ``length`` elements (None for 0); the rest is dropped."""
        cache, self._cache, self.elements = self._cache, None, []
        if cache is None or not length:
            return None
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
        return cache

    def put(self, elements: Sequence[Element], cache: Any) -> None:
        self.elements, self._cache = list(elements), cache


class Generation:
    """One reply while it is generated.

    Args:
        elements: The content of each position of the prompt: a token id or a soft token.
        media: ``[Q, D]`` soft tokens by the keys in ``elements``.
        tokenizer: The tokenizer.
        sampling: How tokens are chosen; its ``stop`` and ``stop_token_ids`` end the reply.
        stops: Texts of the template that end the reply, unless ``sampling.ignore_eos``.
        end_ids: Tokens of the template that end the reply, unless ``sampling.ignore_eos``.
        prefix: The key-value cache of earlier turns, updated when this reply ends. None keeps no cache.
    """

    def __init__(
        self,
        elements: Sequence[Element],
        media: Mapping[str, Tensor],
        tokenizer: Tokenizer,
        sampling: Sampling,
        stops: Sequence[str] = (),
        end_ids: frozenset[int] = frozenset(),
        prefix: Prefix | None = None,
    ) -> None:
        self.elements, self.media, self.sampling, self.prefix = list(elements), media, sampling, prefix
        ends: tuple[Sequence[str], frozenset[int]] = ((), frozenset()) if sampling.ignore_eos else (stops, end_ids)
        self.stream = TextStream(tokenizer, (*ends[0], *sampling.stop), sampling.min_new_tokens)
        self.end_ids = ends[1] | frozenset(sampling.stop_token_ids)
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish: Finish | None = None
        self.reused = 0
        """Number of the prompt's positions that came from the cache."""
        self.started = time.monotonic()
        self.first_token: float | None = None
        """Seconds from the start to the first token."""
        self.cancelled = False
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    @property
    def done(self) -> bool:
        return self.finish is not None

    def cancel(self) -> None:
        """End the reply at its next token. Any thread may call this."""
        self.cancelled = True

    def choose(self, logits: Tensor) -> int:
        """The next token, from ``[V]`` logits."""
        own = self.sampling
        penalised = own.repetition_penalty != 1 or own.presence_penalty != 0 or own.frequency_penalty != 0
        too_short = len(self.ids) < own.min_new_tokens
        if own.temperature == 0 and own.logprobs is None and not penalised and not too_short:
            return int(logits.argmax())
        raw = logits.float().cpu()
        logits = self._penalised(raw)
        token = int(logits.argmax()) if own.temperature == 0 else self._sampled(logits / own.temperature)
        if own.logprobs is not None:
            values = raw.log_softmax(-1)
            top = values.topk(min(own.logprobs, len(values)))
            pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            self.logprobs.append(TokenLogprob(token, float(values[token]), pairs))
        return token

    def accept(self, token: int) -> str:
        """Add a token to the reply; returns the text that has become final."""
        if self.first_token is None:
            self.first_token = time.monotonic() - self.started
        self.ids.append(token)
        if token in self.end_ids:
            return self.end("stop")
        text = self.stream.push(token)
        if self.stream.stopped is not None:
            return text + self.end("stop")
        return text + self.end("length") if len(self.ids) >= self.sampling.max_new_tokens else text

    def end(self, finish: Finish) -> str:
        """Complete the reply; returns the rest of its text."""
        self.finish = self.finish or finish
        return self.stream.finish()

    def embeds(self, start: int, table: nn.Embedding, scale: float = 1.0) -> Tensor:
        """``[N, D]`` embeddings of the prompt from position ``start``; soft tokens are divided by ``scale``."""
        rest = self.elements[start:]
        device = table.weight.device
        embeds = table(torch.tensor([e if isinstance(e, int) else 0 for e in rest], device=device))
        soft = {i: self.media[e[0]][e[1]] for i, e in enumerate(rest) if not isinstance(e, int)}
        if soft:
            embeds[list(soft)] = torch.stack(list(soft.values())).to(device, embeds.dtype) / scale
        return embeds

    def _penalised(self, logits: Tensor) -> Tensor:
        own = self.sampling
        counts = torch.bincount(torch.tensor(self.ids, dtype=torch.long), minlength=len(logits))
        seen = counts > 0
        scaled = torch.where(logits > 0, logits / own.repetition_penalty, logits * own.repetition_penalty)
        logits = torch.where(seen, scaled, logits) - own.presence_penalty * seen - own.frequency_penalty * counts
        if len(self.ids) < own.min_new_tokens and self.end_ids:
            logits[sorted(i for i in self.end_ids if i < len(logits))] = -math.inf
        return logits

    def _sampled(self, logits: Tensor) -> int:
        own = self.sampling
        likely, tokens = logits.softmax(-1).sort(descending=True, stable=True)
        kept = (likely.cumsum(0) - likely < own.top_p) & (likely >= own.min_p * likely[0])
        if own.top_k > 0:
            kept[own.top_k :] = False
        kept[0] = True
        chosen = torch.multinomial(torch.where(kept, likely, 0.0), 1, generator=self._random)
        return int(tokens[chosen])
