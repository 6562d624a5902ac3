"""Replies token by token, several at once: each may join and leave while the others go on, stop, or be cancelled.

A `Generation` is one reply in the making; a `Decoder` moves any number of them forward. They know positions and
tokens, no conversation and no files.

Shapes: ``B`` rows, ``L`` positions, ``N`` new positions, ``Q`` soft tokens of a medium, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache, DynamicLayer

from lavis_chatbridge.models import answering
from lavis_chatbridge.models.interleave import IGNORED, SOFT, Batch, embed
from lavis_chatbridge.models.language_model import Codec
from lavis_chatbridge.models.sampling import Sampling

Finish: TypeAlias = Literal["stop", "length", "cancelled"]


class Generation:
    """One reply in the making.

    Args:
        elements: The whole prompt.
        media: ``[Q, D]`` soft tokens of each medium among the elements, by its key.
        prefix: What has been read before; it is given back longer.
        stream: Where the reply's tokens become text.
        end_ids: Tokens that end a reply.
        sampling: How tokens are chosen.
    """

    def __init__(
        self,
        elements: Sequence[Element],
        media: Mapping[str, Tensor],
        prefix: Prefix,
        stream: TextStream,
        end_ids: frozenset[int],
        sampling: Sampling,
    ) -> None:
        self.elements, self.prefix, self.stream, self.sampling = list(elements), prefix, stream, sampling
        self.media, self.end_ids = media, end_ids
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self.reused = prefix.common(self.elements)
        """Positions of the prompt that need not be read again."""
        self.started = time.monotonic()
        """When the answer was asked for."""
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
        """Ask the reply to end at its next token; may be called from any thread."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether somebody has asked it to end."""
        return self._cancelled.is_set()

    def choose(self, logits: Tensor) -> int:
        """A token for the next position, of ``[V]`` logits in fp32 on the CPU."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        likely, tokens = (logits / self.sampling.temperature).softmax(-1).sort(descending=True, stable=True)
        within = likely.cumsum(0) - likely < self.sampling.top_p  # the likeliest one always is
        drawn = torch.multinomial(torch.where(within, likely, 0.0), 1, generator=self._chance)
        return int(tokens[drawn])

    def accept(self, token: int) -> str:
        """Add a token to the reply; returns the text that has become certain."""
        if self.first_token is None:
            self.first_token = time.monotonic() - self.started
        self.ids.append(token)
        if token in self.end_ids:
            return self.end("stop")
        text = self.stream.push(token)
        if self.stream.stopped is not None:
            return text + self.end("stop")
        if len(self.ids) >= self.sampling.max_new_tokens:
            return text + self.end("length")
        return text

    def end(self, finish: Finish) -> str:
        """The reply is complete; returns what is left of its text."""
        self.finish = self.finish or finish
        return self.stream.finish()

    def embeds(self, start: int, table: Any) -> Tensor:
        """``[N, D]``: the prompt's elements from ``start`` on, in the precision of the language model."""
        rest = self.elements[start:]
        starts: dict[str, int] = {}
        soft: list[Tensor] = []
        for key in dict.fromkeys(element[0] for element in rest if not isinstance(element, int)):
            starts[key] = sum(len(one) for one in soft)
            soft.append(self.media[key])
        ids = torch.tensor([[e if isinstance(e, int) else SOFT for e in rest]])
        which = torch.tensor([starts[e[0]] + e[1] for e in rest if not isinstance(e, int)], dtype=torch.long)
        ones = torch.ones_like(ids)
        batch = Batch(ids, which, ones, ones, torch.full_like(ids, IGNORED))
        return embed(batch, torch.cat(soft) if soft else None, table)[0]


@dataclass
class _Lane:
    """Rows that share a cache. ``pads[i]``: how many positions in front of row ``i`` are padding."""

    rows: list[Generation]
    pads: list[int]
    cache: Any


class Decoder:
    """Moves replies forward together, one token at a time.

    Not for several threads at once; the replies' ``cancel`` may come from any.

    Args:
        language_model: The causal language model; it may be shared with other decoders.
    """

    def __init__(self, language_model: Any) -> None:
        self._model = language_model
        self._table = language_model.get_input_embeddings()
        # Models of the hub compute the logits of chosen positions only, if they know this argument.
        known = inspect.signature(language_model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._lanes: list[_Lane] = []

    def __len__(self) -> int:
        """Replies that are not complete."""
        return sum(len(lane.rows) for lane in self._lanes)

    @torch.no_grad()
    def add(self, generation: Generation) -> str:
        """Read a prompt, and choose the first token of its reply, whose text is returned.

        A reply by search (``num_beams``) comes whole, at once.
        """
        if generation.cancelled:
            return generation.end("cancelled")
        if generation.sampling.num_beams > 1:
            return self._search(generation)
        past = generation.prefix.take(generation.reused)
        embeds = generation.embeds(generation.reused, self._table)[None]
        logits, cache = self._run(past, [0], generation.reused, embeds)
        text = generation.accept(generation.choose(logits[0]))
        lane = _Lane([generation], [0], cache)
        if generation.done:
            self._give_back(lane, 0)
        else:
            self._admit(lane)
        return text

    @torch.no_grad()
    def step(self) -> list[tuple[Generation, str]]:
        """Choose the next token of every reply.

        Returns:
            Each reply that was not complete before, with the text that has become certain (often none).
        """
        texts: list[tuple[Generation, str]] = []
        for lane in self._lanes:
            texts += [(row, row.end("cancelled")) for row in lane.rows if row.cancelled]
            self._remove_done(lane)
            if lane.rows:
                last = torch.tensor([[row.ids[-1]] for row in lane.rows], device=self._table.weight.device)
                past = lane.rows[0].length - 1 + lane.pads[0]
                logits, lane.cache = self._run(lane.cache, lane.pads, past, self._table(last))
                texts += [(row, row.accept(row.choose(one))) for row, one in zip(lane.rows, logits, strict=True)]
                self._remove_done(lane)
        self._lanes = [lane for lane in self._lanes if lane.rows]
        return texts

    def run(self, generation: Generation) -> Iterable[str]:
        """All of one reply, as its text becomes certain."""
        yield self.add(generation)
        while not generation.done:
            yield from (text for _, text in self.step())

    def _run(self, cache: Any, pads: Sequence[int], past: int, embeds: Tensor) -> tuple[Tensor, Any]:
        """Read ``[B, N, D]`` positions behind ``past`` others; ``[B, V]`` logits of the last one, and the cache."""
        columns = torch.arange(past + embeds.shape[1])
        front = torch.tensor(pads)[:, None]
        positions = (columns[past:] - front).clamp(min=0)
        given = {} if cache is None else answering.going_on_from(self._model, cache)
        result = self._model(
            inputs_embeds=embeds,
            attention_mask=(columns >= front).long().to(embeds.device),
            position_ids=positions.to(embeds.device),
            use_cache=True,
            return_dict=True,
            **given,
            **self._last_only,
        )
        return result.logits[:, -1].float().cpu(), answering.keys_and_values(result)

    def _admit(self, new: _Lane) -> None:
        """Let a new row go on with others, where their caches can be joined."""
        lane = next((lane for lane in self._lanes if is_plain(lane.cache)), None)
        if lane is None or not lane.rows or not is_plain(new.cache):
            self._lanes.append(new)
            return
        own, others = new.rows[0].length - 1, lane.rows[0].length - 1 + lane.pads[0]
        longest = max(own, others)
        lane.cache = join(lane.cache, new.cache)
        lane.pads = [pad + longest - others for pad in lane.pads] + [longest - own]
        lane.rows += new.rows

    def _remove_done(self, lane: _Lane) -> None:
        staying = [i for i, row in enumerate(lane.rows) if not row.done]
        if len(staying) == len(lane.rows):
            return
        for i, row in enumerate(lane.rows):
            if row.done:
                self._give_back(lane, i)
        if staying:
            # Columns in which only rows that have left stood go with them.
            cut = min(lane.pads[i] for i in staying)
            lane.cache = select(lane.cache, staying, cut)
            lane.pads = [lane.pads[i] - cut for i in staying]
        lane.rows = [lane.rows[i] for i in staying]

    def _give_back(self, lane: _Lane, row: int) -> None:
        """Leave what a row has read (all but its last token) with its session."""
        generation = lane.rows[row]
        cache = lane.cache
        if len(lane.rows) > 1:
            cache = select(cache, [row], lane.pads[row])
        generation.prefix.put([*generation.elements, *generation.ids[:-1]], cache)

    def _search(self, generation: Generation) -> str:
        """The likeliest reply of a beam search over the whole prompt; nothing of it is kept for later turns."""
        sampling, stream = generation.sampling, generation.stream
        embeds = generation.embeds(0, self._table)[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        more: dict[str, Any] = {"eos_token_id": sorted(generation.end_ids)} if generation.end_ids else {}
        decoding = answering.Decoding(sampling.max_new_tokens, beams=sampling.num_beams)
        ids = answering.generate_ids(self._model, stream.codec, embeds, mask, decoding, stream.stops[:1], **more)
        text = ""
        for token in ids[0].tolist():
            text += generation.accept(token)
            if generation.done:
                return text
        return text + generation.end("length")


Element: TypeAlias = int | tuple[str, int]
"""What stands at one position: a token id, or which medium's which soft token."""


class Prefix:
    """What one row has read: the elements and their keys and values."""

    def __init__(self) -> None:
        self.elements: list[Element] = []
        self._cache: Any = None

    def common(self, elements: Sequence[Element]) -> int:
        """How many of ``elements`` need not be read again; the last one always is, for its prediction."""
        most = min(len(self.elements), len(elements) - 1) if self._cache is not None else 0
        return next((i for i in range(most) if self.elements[i] != elements[i]), max(most, 0))

    def take(self, length: int) -> Any:
        """The cache of the first ``length`` elements (none for 0), which then are no longer kept here."""
        cache, self._cache, self.elements = self._cache, None, []
        if not length:
            return None
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
        return cache

    def put(self, elements: Sequence[Element], cache: Any) -> None:
        """Keep what a row has read."""
        if is_plain(cache):
            self.elements, self._cache = list(elements), cache


def is_plain(cache: Any) -> bool:
    """Whether every layer keeps the keys and values of every position."""
    layers = getattr(cache, "layers", [])
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def join(first: Any, second: Any) -> Any:
    """The rows of two plain caches in one; the shorter rows are padded on the left."""
    length = max(_length(first), _length(second))
    joined = DynamicCache()
    for i, (a, b) in enumerate(zip(first.layers, second.layers, strict=True)):
        keys = torch.cat([_padded(layer.keys, length) for layer in (a, b)])
        joined.update(keys, torch.cat([_padded(layer.values, length) for layer in (a, b)]), i)
    return joined


def select(cache: Any, rows: Sequence[int], start: int = 0) -> Any:
    """Some rows of a plain cache, from position ``start`` on."""
    chosen = DynamicCache()
    for i, layer in enumerate(cache.layers):
        index = torch.tensor(list(rows), device=layer.keys.device)
        chosen.update(layer.keys[index, :, start:], layer.values[index, :, start:], i)
    return chosen


def _length(cache: Any) -> int:
    return cache.layers[0].keys.shape[-2]


def _padded(states: torch.Tensor, length: int) -> torch.Tensor:
    return functional.pad(states, (0, 0, length - states.shape[-2], 0))


_BROKEN = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4  # bytes of a character in UTF-8, and so tokens that may each hold a part of it


class TextStream:
    """The text of a growing row of tokens.

    Stop texts are looked for in the text, so it does not matter into which tokens a model cuts them.

    Args:
        codec: The tokenizer.
        stops: Texts that end the row and are no part of its text.
    """

    def __init__(self, codec: Codec, stops: Sequence[str] = ()) -> None:
        self.text = ""
        """What has been handed out so far."""
        self.stopped: str | None = None
        """The stop text that was found."""
        self.codec = codec
        self.stops = tuple(stop for stop in stops if stop)
        self._ids: list[int] = []
        self._before, self._read = 0, 0  # tokens that give the next ones their context; tokens whose text is known
        self._held = ""

    def push(self, token: int) -> str:
        """Add a token; returns the text that has become certain."""
        self._ids.append(token)
        self._held += self._decoded(final=False)
        return self._hand_out(final=False)

    def finish(self) -> str:
        """No more tokens come; returns the rest of the text."""
        self._held += self._decoded(final=True)
        return self._hand_out(final=True)

    def _decoded(self, final: bool) -> str:
        """The text of the tokens that have not been read, once it holds whole characters only.

        Tokens are decoded together with some before them: a token's text may depend on whether it comes first.
        """
        known = self.codec.decode(self._ids[self._before : self._read])
        whole = self.codec.decode(self._ids[self._before :])
        waiting = len(self._ids) - self._read
        if whole.endswith(_BROKEN) and not final and waiting < _LONGEST_CHARACTER:
            return ""
        if len(whole) <= len(known):
            return ""
        self._before, self._read = self._read, len(self._ids)
        return whole[len(known) :]

    def _hand_out(self, final: bool) -> str:
        if self.stopped is not None:
            return ""
        found = [(self._held.find(stop), stop) for stop in self.stops if stop in self._held]
        if found:
            place, self.stopped = min(found)
            certain, self._held = self._held[:place].rstrip(), ""
        elif final:
            certain, self._held = self._held.rstrip(), ""
        else:
            keep = max((_overlap(self._held, stop) for stop in self.stops), default=0)
            certain = self._held[: len(self._held) - keep].rstrip()
            self._held = self._held[len(certain) :]
        if not self.text:
            certain = certain.lstrip()
        self.text += certain
        return certain


def text_of(codec: Codec, ids: Sequence[int], stops: Sequence[str] = ()) -> str:
    """The text of all ``ids``, up to the first stop text."""
    stream = TextStream(codec, stops)
    for token in ids:
        stream.push(token)
    stream.finish()
    return stream.text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
