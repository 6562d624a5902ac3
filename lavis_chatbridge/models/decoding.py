"""The token loop of evaluation, chat and server: decodes several replies at once.

A `Decoder` extends any number of `Generation` by one token per step; replies may be added and end while others
continue. The key-value cache of a conversation is kept in a `Prefix`, so that its next prompt is read from where it
differs. Beam search is transformers' own. This module handles embeddings and token ids, no conversation and no files.

Shapes: ``B`` rows, ``L`` positions, ``N`` new positions, ``Q`` soft tokens, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import StoppingCriteria
from transformers.cache_utils import DynamicCache, DynamicLayer

from lavis_chatbridge.models.encoding import own_precision
from lavis_chatbridge.models.families import LanguageModel
from lavis_chatbridge.models.layout import Element
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.models.tokenizer import Tokenizer

Finish: TypeAlias = Literal["stop", "length", "cancelled"]
Texts: TypeAlias = "list[tuple[Generation, str]]"
"""Replies, each with the text that has become final (often none)."""

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Decoder:
    """Extends all its replies by one token per step.

    Not thread-safe, except that any thread may call `Generation.cancel`. Decoders may share a language model.
    """

    def __init__(self, language_model: LanguageModel) -> None:
        self._model = language_model
        self._table = language_model.get_input_embeddings()
        self._groups: list[_Group] = []

    def __len__(self) -> int:
        """Number of incomplete replies."""
        return sum(len(group.rows) for group in self._groups)

    @torch.no_grad()
    def complete(self, rows: Sequence[Generation]) -> None:
        """Complete replies with equal settings together."""
        self._begin(rows)
        while len(self):
            self.step()

    @torch.no_grad()
    def add(self, row: Generation) -> str:
        """Read a prompt and choose the first token of its reply; returns the text that has become final.

        A beam search (``num_beams`` above 1) completes its reply at once.
        """
        return row.end("cancelled") if row.cancelled else self._begin([row])[0][1]

    @torch.no_grad()
    def step(self) -> Texts:
        """Choose the next token of every incomplete reply."""
        texts: Texts = []
        groups, self._groups = self._groups, []
        for group in groups:
            texts += [(row, row.end("cancelled")) for row in group.rows if row.cancelled]
            _drop_complete(group)
            if group.rows:
                last = torch.tensor([[row.ids[-1]] for row in group.rows], device=self._table.weight.device)
                logits, group.cache = self._run(group.cache, group.pads, group.length, self._table(last))
                texts += _chosen(group, logits)
            if group.rows:
                self._groups.append(group)
        return texts

    def _begin(self, rows: Sequence[Generation]) -> Texts:
        """Read prompts in one pass and choose the first token of each reply; a single prompt may use its prefix."""
        if rows[0].sampling.num_beams > 1:
            return beam_search(self._model, rows)
        start, past, prefix = 0, None, rows[0].prefix
        if len(rows) == 1 and prefix is not None:
            rows[0].reused = start = prefix.common(rows[0].elements)
            past = prefix.take(start)
        embeds, mask = padded(self._model, rows, start)
        pads = (1 - mask).sum(1).tolist()
        logits, cache = self._run(past, pads, start, embeds)
        group = _Group(list(rows), pads, cache)
        texts = _chosen(group, logits)
        if group.rows:
            self._admit(group)
        return texts

    def _run(self, cache: Any, pads: Sequence[int], past: int, embeds: Tensor) -> tuple[Tensor, Any]:
        """Read ``[B, N, D]`` positions after ``past`` cached ones; returns the last ``[B, V]`` logits and the cache."""
        columns = torch.arange(past + embeds.shape[1], device=embeds.device)
        front = torch.tensor(pads, device=embeds.device)[:, None]
        mask, positions = (columns >= front).long(), (columns[past:] - front).clamp(min=0)
        with own_precision(self._model):
            logits, cache = read(self._model, cache, mask, positions, last_only=True, inputs_embeds=embeds)
        return logits[:, -1], cache

    def _admit(self, new: _Group) -> None:
        """Add new rows to the batch: join their cache with an existing one if possible."""
        group = next((one for one in self._groups if one.is_plain), None)
        if group is None or not new.is_plain:
            self._groups.append(new)
            return
        longest = max(group.length, new.length)
        pads = [pad + longest - one.length for one in (group, new) for pad in one.pads]
        joined = DynamicCache()
        for i, layers in enumerate(zip(group.cache.layers, new.cache.layers, strict=True)):
            joined.update(_stacked(one.keys for one in layers), _stacked(one.values for one in layers), i)
        group.rows, group.pads, group.cache = [*group.rows, *new.rows], pads, joined


@dataclass
class _Group:
    """Replies that share a cache; ``pads`` is each row's number of padding positions on the left."""

    rows: list[Generation]
    pads: list[int]
    cache: Any

    @property
    def length(self) -> int:
        """Number of positions in the cache, with padding, without each row's newest token."""
        return len(self.rows[0].elements) + len(self.rows[0].ids) - 1 + self.pads[0]

    @property
    def is_plain(self) -> bool:
        """Whether every layer keeps all positions (no sliding window): only such a cache can be cut and joined."""
        layers = getattr(self.cache, "layers", [])
        return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _chosen(group: _Group, logits: Tensor) -> Texts:
    """Choose each row's token from ``[B, V]`` logits; complete rows are removed."""
    texts = [(row, row.accept(row.choose(own))) for row, own in zip(group.rows, logits, strict=True)]
    _drop_complete(group)
    return texts


def _drop_complete(group: _Group) -> None:
    """Remove complete rows from a group, and store their part of the cache in their prefixes."""
    index = [i for i, row in enumerate(group.rows) if not row.done]
    if len(index) == len(group.rows):
        return
    for i, (row, pad) in enumerate(zip(group.rows, group.pads, strict=True)):
        if row.done and row.prefix is not None and group.is_plain:
            row.prefix.put([*row.elements, *row.ids[:-1]], _selected(group.cache, [i], pad))
    group.rows, group.pads = [group.rows[i] for i in index], [group.pads[i] for i in index]
    if index and group.is_plain:
        cut = min(group.pads)  # columns that only removed rows used
        group.cache, group.pads = _selected(group.cache, index, cut), [pad - cut for pad in group.pads]
    elif index:
        group.cache.batch_select_indices(torch.tensor(index))


def _stacked(states: Iterable[Tensor]) -> Tensor:
    """Keys or values of several batches in one batch; the shorter ones are padded on the left."""
    parts = list(states)
    length = max(part.shape[-2] for part in parts)
    return torch.cat([functional.pad(part, (0, 0, length - part.shape[-2], 0)) for part in parts])


def _selected(cache: Any, rows: Sequence[int], start: int) -> DynamicCache:
    """Some rows of a plain cache, from position ``start`` on."""
    chosen = DynamicCache()
    for i, layer in enumerate(cache.layers):
        chosen.update(layer.keys[rows, :, start:], layer.values[rows, :, start:], i)
    return chosen


def read(
    model: LanguageModel, cache: Any, mask: Tensor, positions: Tensor, last_only: bool = False, **inputs: Any
) -> tuple[Tensor, Any]:
    """Read new positions after those in a cache (None: none); returns their ``[B, N, V]`` logits and the cache.

    ``mask`` is ``[B, L]`` of all positions, ``positions`` ``[B, N]`` of the new ones. ``last_only`` returns the last
    logits only, ``[B, 1, V]``, if the model can. The name of the cache depends on the version of transformers.
    """
    parameters = _parameters(type(model).forward)
    name = "cache" if "cache" in parameters else "past_key_values"
    if cache is not None:
        inputs[name] = cache
    if last_only and "logits_to_keep" in parameters:
        inputs["logits_to_keep"] = 1
    result = model(attention_mask=mask, position_ids=positions, use_cache=True, return_dict=True, **inputs)
    return result.logits, result.get(name)


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def padded(model: LanguageModel, rows: Sequence[Generation], start: int = 0) -> tuple[Tensor, Tensor]:
    """``[B, L, D]`` embeddings and ``[B, L]`` mask of prompts from position ``start``, padded on the left."""
    parts = [row.embeds(start, model.get_input_embeddings(), model.embedding_scale) for row in rows]
    mask = [torch.ones(len(part), dtype=torch.long, device=part.device) for part in parts]
    return pad_sequence(parts, True, padding_side="left"), pad_sequence(mask, True, padding_side="left")


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


class TokenLogprob(NamedTuple):
    """The log-probability of a reply's token, and those of the likeliest tokens at its position."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


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
        if sampling.ignore_eos:
            stops, end_ids = (), frozenset()
        self.stream = TextStream(tokenizer, (*stops, *sampling.stop), sampling.min_new_tokens)
        self.end_ids = end_ids | frozenset(sampling.stop_token_ids)
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish: Finish | None = None
        self.reused = 0
        """Number of the prompt's positions that came from the cache."""
        self.first_token: float | None = None
        """Seconds from the start to the first token."""
        self.cancelled = False
        self.started = time.monotonic()
        seed = torch.Generator().seed() if sampling.seed is None else sampling.seed
        self._random = torch.Generator().manual_seed(seed)

    @property
    def done(self) -> bool:
        return self.finish is not None

    def cancel(self) -> None:
        """End the reply at its next token. Any thread may call this."""
        self.cancelled = True

    def embeds(self, start: int, table: nn.Embedding, scale: float = 1.0) -> Tensor:
        """``[N, D]`` embeddings of the prompt from position ``start``; soft tokens are divided by ``scale``."""
        rest = self.elements[start:]
        device = table.weight.device
        embeds = table(torch.tensor([e if isinstance(e, int) else 0 for e in rest], device=device))
        soft = {i: self.media[e[0]][e[1]] for i, e in enumerate(rest) if not isinstance(e, int)}
        if soft:
            embeds[list(soft)] = torch.stack(list(soft.values())).to(device, embeds.dtype) / scale
        return embeds

    def choose(self, logits: Tensor) -> int:
        """The next token, from ``[V]`` logits."""
        own = self.sampling
        penalised = own.repetition_penalty != 1 or own.presence_penalty != 0 or own.frequency_penalty != 0
        too_short = len(self.ids) < own.min_new_tokens
        if own.temperature == 0 and own.logprobs is None and not penalised and not too_short:
            return int(logits.argmax())
        raw = logits.float().cpu()
        counts = torch.bincount(torch.tensor(self.ids, dtype=torch.long), minlength=len(raw))
        seen = counts > 0
        scaled = torch.where(raw > 0, raw / own.repetition_penalty, raw * own.repetition_penalty)
        logits = torch.where(seen, scaled, raw) - own.presence_penalty * seen - own.frequency_penalty * counts
        if too_short and self.end_ids:
            logits[sorted(i for i in self.end_ids if i < len(logits))] = -math.inf
        token = int(logits.argmax()) if own.temperature == 0 else self._sampled(logits / max(own.temperature, 1e-6))
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

    def _sampled(self, logits: Tensor) -> int:
        own = self.sampling
        likely, tokens = logits.softmax(-1).sort(descending=True, stable=True)
        kept = (likely.cumsum(0) - likely < own.top_p) & (likely >= own.min_p * likely[0])
        if own.top_k > 0:
            kept[own.top_k :] = False
        kept[0] = True
        chosen = torch.multinomial(torch.where(kept, likely, 0.0), 1, generator=self._random)
        return int(tokens[chosen])


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
        elif not final:  # the end of the text may be the beginning of a stop text
            begun = [n for stop in self.stops for n in range(1, len(stop)) if whole.endswith(stop[:n])]
            whole = whole[: len(whole) - max(begun, default=0)]
        new = whole.rstrip()[len(self.text) :]
        self.text += new
        return new


def beam_search(model: LanguageModel, rows: Sequence[Generation]) -> Texts:
    """Complete replies with equal settings by transformers' beam search; its cache is not kept for later turns.

    ``num_return_sequences`` consecutive rows are the results of one prompt.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    own = rows[0].sampling
    first = rows[:: own.num_return_sequences]
    embeds, mask = padded(model, first)
    tokenizer, limit = first[0].stream.tokenizer, min(row.sampling.max_new_tokens for row in rows)
    config = GenerationConfig(
        max_new_tokens=limit,
        min_new_tokens=min(own.min_new_tokens, limit),
        do_sample=False,
        num_beams=own.num_beams,
        num_return_sequences=own.num_return_sequences,
        length_penalty=float(own.length_penalty),
        eos_token_id=sorted(first[0].end_ids) or None,
        pad_token_id=tokenizer.pad_id,
    )
    # set in the config, the penalty would ignore as many new tokens as a row has padding positions
    penalty = RepetitionPenaltyLogitsProcessor(float(own.repetition_penalty))
    stops = StopTexts(tokenizer, [row.stream.stops for row in first], own.min_new_tokens)
    with own_precision(model):
        found = model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([stops]),
            logits_processor=LogitsProcessorList([penalty]),
        )
    texts: Texts = []
    for row, ids in zip(rows, found.tolist(), strict=False):
        text = "".join(row.accept(token) for token in ids if not row.done)  # padding follows a reply's end
        texts.append((row, text + row.end("length")))
    return texts


class StopTexts(StoppingCriteria):
    """Ends a row when a stop text is in its reply. transformers passes new ids only, since prompts are embeddings."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[Sequence[str]], least: int) -> None:
        self._tokenizer, self._stops, self._least = tokenizer, stops, least

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        beams = len(input_ids) // len(self._stops)
        ended = [
            TextStream.of(self._tokenizer, ids, self._stops[i // beams], self._least).stopped is not None
            for i, ids in enumerate(input_ids.tolist())
        ]
        return torch.tensor(ended, device=input_ids.device)
