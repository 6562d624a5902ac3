"""The one token loop: replies of evaluation, chat and server, several at once.

A `Generation` is one reply in the making. A `Decoder` moves any number of them forward by one token at a time; each may
join and leave while the others continue, and any thread may cancel one. Beam search is transformers' own. This module
knows embeddings and token ids, no conversation and no files.

Shapes: ``B`` rows, ``L`` positions, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

import inspect
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import StoppingCriteria

from lavis_chatbridge.models.families import LanguageModel, cache_argument, keys_and_values, own_precision, switch_of
from lavis_chatbridge.models.kept import Element, Prefix, is_plain, join, select
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.models.text import TextStream
from lavis_chatbridge.models.tokenizer import Codec

Finish: TypeAlias = Literal["stop", "length", "cancelled"]


class TokenLogprob(NamedTuple):
    """The log-probability of a reply's token, and those of the likeliest tokens at its position."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Generation:
    """One reply in the making.

    Args:
        elements: What stands at each position of the prompt.
        media: ``[Q, D]`` soft tokens by the keys in ``elements``.
        prefix: What was read before; it receives what this reply reads. None keeps nothing.
        stream: Makes text of the reply's tokens; its stop texts end the reply.
        end_ids: Tokens that end the reply, beside ``sampling.stop_token_ids``.
        sampling: How tokens are chosen.
    """

    def __init__(
        self,
        elements: Sequence[Element],
        media: Mapping[str, Tensor],
        prefix: Prefix | None,
        stream: TextStream,
        end_ids: frozenset[int],
        sampling: Sampling,
    ) -> None:
        self.elements, self.media, self.prefix = list(elements), media, prefix
        self.stream, self.sampling = stream, sampling
        self.end_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else end_ids)
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish: Finish | None = None
        self.reused = 0
        """Positions of the prompt that were not read again."""
        self.started = time.monotonic()
        """When the reply was requested."""
        self.first_token: float | None = None
        """Seconds from the start to the first token."""
        self._cancelled = threading.Event()
        self._chance = torch.Generator()
        if sampling.seed is None:
            self._chance.seed()
        else:
            self._chance.manual_seed(sampling.seed)

    @property
    def done(self) -> bool:
        """Whether the reply is complete."""
        return self.finish is not None

    @property
    def length(self) -> int:
        """Positions of the prompt and of the reply so far."""
        return len(self.elements) + len(self.ids)

    def cancel(self) -> None:
        """End the reply at its next token. Any thread may call this."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called."""
        return self._cancelled.is_set()

    @property
    def takes_likeliest(self) -> bool:
        """Whether the next token is the plain argmax of the logits."""
        own = self.sampling
        penalised = own.repetition_penalty != 1 or own.presence_penalty != 0 or own.frequency_penalty != 0
        waits = len(self.ids) < own.min_new_tokens
        return own.temperature == 0 and own.logprobs is None and not penalised and not waits

    def choose(self, logits: Tensor) -> int:
        """The next token, from ``[V]`` logits in fp32 on the CPU."""
        own = self.sampling
        raw, logits = logits, self._penalised(logits)
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
        """``[N, D]``: the prompt from position ``start``, in the language model's precision.

        Args:
            start: The first position.
            table: The language model's embedding layer.
            scale: See :func:`families.embedding_scale`.
        """
        rest = self.elements[start:]
        device = table.weight.device
        embeds = table(torch.tensor([e if isinstance(e, int) else 0 for e in rest], device=device))
        places: dict[str, list[tuple[int, int]]] = {}
        for i, element in enumerate(rest):
            if not isinstance(element, int):
                places.setdefault(element[0], []).append((i, element[1]))
        for key, pairs in places.items():
            positions, tokens = torch.tensor(pairs, device=device).T
            embeds[positions] = self.media[key].to(device, embeds.dtype)[tokens] / scale
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
        chosen = torch.multinomial(torch.where(kept, likely, 0.0), 1, generator=self._chance)
        return int(tokens[chosen])


@dataclass
class _Lane:
    """Rows that share a cache.

    Attributes:
        rows: The replies.
        pads: How many of the cache's first positions are padding, for each row.
        cache: Keys and values.
        long: Whether the rows are beyond the length at which the model's rotary factors change.
    """

    rows: list[Generation]
    pads: list[int]
    cache: Any
    long: bool = False

    @property
    def read(self) -> int:
        """Positions in the cache, padding included; each row's newest token is not among them."""
        return self.rows[0].length - 1 + self.pads[0]


class Decoder:
    """Moves replies forward together, one token at a time.

    One thread at a time may use it; `Generation.cancel` may be called from any.

    Args:
        language_model: It may be shared with other decoders.
    """

    def __init__(self, language_model: LanguageModel) -> None:
        self._model = language_model
        self._table = language_model.get_input_embeddings()
        self._switch = switch_of(language_model.config)
        self._scale = getattr(language_model, "embedding_scale", 1.0)
        forward: Any = language_model.forward  # type: ignore[attr-defined]
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(forward).parameters else {}
        self._lanes: list[_Lane] = []

    def __len__(self) -> int:
        """Replies that are not complete."""
        return sum(len(lane.rows) for lane in self._lanes)

    def add(self, generation: Generation) -> str:
        """Read a prompt and choose the first token of its reply; returns the text that has become final.

        A beam search (``num_beams`` above 1) completes its reply at once.
        """
        return self.add_all([generation])[0][1]

    @torch.no_grad()
    def add_all(self, generations: Sequence[Generation]) -> list[tuple[Generation, str]]:
        """Read several prompts in one pass, each distinct one once; see :meth:`add`."""
        texts: list[tuple[Generation, str]] = []
        together: list[Generation] = []
        for row in generations:
            is_long = len(row.elements) > self._switch
            row.reused = row.prefix.common(row.elements, is_long) if row.prefix is not None else 0
            if row.cancelled:
                texts.append((row, row.end("cancelled")))
            elif row.sampling.num_beams > 1:
                texts.append((row, self._search(row)))
            elif row.reused or is_long:
                texts += self._read([row])
            else:
                together.append(row)
        return [*texts, *(self._read(together) if together else [])]

    @torch.no_grad()
    def step(self) -> list[tuple[Generation, str]]:
        """Choose the next token of every reply.

        Returns:
            Each reply that was not complete, with the text that has become final (often none).
        """
        texts: list[tuple[Generation, str]] = []
        lanes, self._lanes = self._lanes, []
        crossing: list[Generation] = []
        for lane in lanes:
            texts += [(row, row.end("cancelled")) for row in lane.rows if row.cancelled]
            beyond = [row for row in lane.rows if not lane.long and not row.done and row.length > self._switch]
            crossing += beyond
            self._keep(lane, [row for row in lane.rows if not row.done and row not in beyond])
            if lane.rows:
                last = torch.tensor([[row.ids[-1]] for row in lane.rows], device=self._table.weight.device)
                logits, lane.cache = self._run(lane.cache, lane.pads, lane.read, self._table(last))
                texts += self._chosen(lane.rows, logits)
                self._keep(lane, [row for row in lane.rows if not row.done])
            if lane.rows:
                self._lanes.append(lane)
        for row in crossing:  # what was read before the switch is read again with the other factors
            texts += self._read([row])
        return texts

    def run(self, generation: Generation) -> Iterator[str]:
        """Yields a reply's text as it becomes final."""
        yield self.add(generation)
        while not generation.done:
            yield from (text for _, text in self.step())

    def _read(self, rows: list[Generation]) -> list[tuple[Generation, str]]:
        """Read prompts (of crossing rows, their replies too) and choose a token behind each."""
        distinct = list({tuple(row.elements): row for row in rows}.values())
        index = [next(i for i, one in enumerate(distinct) if one.elements == row.elements) for row in rows]
        start = rows[0].reused if len(rows) == 1 and not rows[0].ids else 0
        parts = [self._unread(row, start) for row in distinct]
        longest = max(map(len, parts))
        embeds = pad_sequence(parts, batch_first=True, padding_side="left")
        pads = [longest - len(part) for part in parts]
        prefix = rows[0].prefix
        past = prefix.take(start) if prefix is not None and len(rows) == 1 else None
        logits, cache = self._run(past, pads, start, embeds)
        if len(distinct) < len(rows):
            cache.batch_select_indices(torch.tensor(index))
        lane = _Lane(rows, [pads[i] for i in index], cache, rows[0].length > self._switch)
        texts = self._chosen(rows, logits[index])
        self._keep(lane, [row for row in rows if not row.done])
        if lane.rows:
            self._admit(lane)
        return texts

    def _unread(self, row: Generation, start: int) -> Tensor:
        prompt = row.embeds(start, self._table, self._scale)
        if not row.ids:
            return prompt
        return torch.cat([prompt, self._table(torch.tensor(row.ids, device=prompt.device))])

    def _run(self, cache: Any, pads: Sequence[int], past: int, embeds: Tensor) -> tuple[Tensor, Any]:
        """Read ``[B, N, D]`` positions behind ``past`` others; returns ``[B, V]`` logits of the last, and the cache."""
        columns = torch.arange(past + embeds.shape[1])
        front = torch.tensor(pads)[:, None]
        positions = (columns[past:] - front).clamp(min=0)
        with own_precision(self._model):
            result = self._model(
                inputs_embeds=embeds,
                attention_mask=(columns >= front).long().to(embeds.device),
                position_ids=positions.to(embeds.device),
                use_cache=True,
                return_dict=True,
                **self._last_only,
                **cache_argument(self._model, cache),
            )
        return result.logits[:, -1], keys_and_values(result)

    def _chosen(self, rows: Sequence[Generation], logits: Tensor) -> list[tuple[Generation, str]]:
        likeliest = logits.argmax(-1).tolist()
        values = None if all(row.takes_likeliest for row in rows) else logits.float().cpu()
        tokens = [
            likeliest[i] if values is None or row.takes_likeliest else row.choose(values[i])
            for i, row in enumerate(rows)
        ]
        return [(row, row.accept(token)) for row, token in zip(rows, tokens, strict=True)]

    def _admit(self, new: _Lane) -> None:
        """Let new rows share the cache of others, where caches can be joined."""
        lane = next((one for one in self._lanes if not one.long and is_plain(one.cache)), None)
        if lane is None or new.long or not is_plain(new.cache):
            self._lanes.append(new)
            return
        longest = max(lane.read, new.read)
        pads = [pad + longest - one.read for one in (lane, new) for pad in one.pads]
        lane.cache = join(lane.cache, new.cache)
        lane.rows, lane.pads = [*lane.rows, *new.rows], pads

    def _keep(self, lane: _Lane, staying: Sequence[Generation]) -> None:
        """Drop all other rows from a lane, and leave what complete ones have read with their prefixes."""
        if len(staying) == len(lane.rows):
            return
        for i, row in enumerate(lane.rows):
            if row.done and row.prefix is not None and is_plain(lane.cache):
                own = select(lane.cache, [i], lane.pads[i]) if len(lane.rows) > 1 else lane.cache
                row.prefix.put([*row.elements, *row.ids[:-1]], own, lane.long)
        index = [lane.rows.index(row) for row in staying]
        if index and is_plain(lane.cache):
            cut = min(lane.pads[i] for i in index)  # columns that only padded rows still use
            lane.cache = select(lane.cache, index, cut)
            lane.pads = [lane.pads[i] - cut for i in index]
        elif index:
            lane.cache.batch_select_indices(torch.tensor(index))
            lane.pads = [lane.pads[i] for i in index]
        lane.rows = list(staying)

    def _search(self, row: Generation) -> str:
        """Complete a reply by beam search over the whole prompt; nothing of it is kept for later turns."""
        embeds = row.embeds(0, self._table, self._scale)[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        codec, stops = row.stream.codec, [row.stream.stops]
        ids = beam_search(self._model, codec, embeds, mask, row.sampling, stops, row.end_ids)
        text = ""
        for token in ids[0].tolist():
            text += row.accept(token)
            if row.done:
                return text
        return text + row.end("length")


def beam_search(
    model: LanguageModel,
    codec: Codec,
    embeds: Tensor,
    mask: Tensor,
    sampling: Sampling,
    stops: Sequence[Sequence[str]],
    end_ids: frozenset[int],
) -> Tensor:
    """The likeliest replies to each row, by transformers' beam search.

    Args:
        model: The language model.
        codec: Its tokenizer.
        embeds: ``[B, L, D]``, padded on the left.
        mask: ``[B, L]``, one where a position counts.
        sampling: Its numbers of beams, results and tokens, and its penalties.
        stops: Each row's stop texts; a text that is found is part of the ids.
        end_ids: Tokens that end a reply.

    Returns:
        ``[B * num_return_sequences, n]`` new ids, padded on the right.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=min(sampling.min_new_tokens, sampling.max_new_tokens),
        do_sample=False,
        num_beams=sampling.num_beams,
        num_return_sequences=sampling.num_return_sequences,
        length_penalty=float(sampling.length_penalty),
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=codec.pad_id,
    )
    # as transformers' own setting the penalty would ignore as many new tokens as a row has padding
    penalty = RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))
    with own_precision(model):
        return model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([StopTexts(codec, stops, sampling.min_new_tokens)]),
            logits_processor=LogitsProcessorList([penalty] if sampling.repetition_penalty != 1 else []),
        )


class StopTexts(StoppingCriteria):
    """Ends a row when a stop text is in its reply. It is given new ids only, since prompts come as embeddings."""

    def __init__(self, codec: Codec, stops: Sequence[Sequence[str]], least: int) -> None:
        self._codec, self._stops, self._least = codec, stops, least

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        beams = len(input_ids) // len(self._stops)
        ended = [
            TextStream.of(self._codec, ids, stops, self._least).stopped is not None
            for ids, stops in zip(input_ids.tolist(), (s for s in self._stops for _ in range(beams)), strict=True)
        ]
        return torch.tensor(ended, device=input_ids.device)
