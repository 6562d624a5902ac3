"""Answers of the language model: generation until a stop text, and ranking of given candidates.

It knows embeddings, masks and token ids, no media and no prompts.

Shapes: ``B`` rows, ``L`` positions, ``C`` candidates, ``D`` width.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from lavis_chatbridge.errors import ConfigError, PromptError
from lavis_chatbridge.models.language_model import Codec

log = logging.getLogger(__name__)

Cache: TypeAlias = Literal["dynamic", "static"]

MOST = 1000
"""The most beams of a search, and the most results of a row: each holds keys and values of its own."""

_LARGEST_POWER = 30
"""Lengths to the power of the length penalty stay below ten to this power, far from where fp32 ends."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Args:
        max_tokens: The most new tokens.
        min_tokens: The fewest new tokens before a stop counts.
        sample: Draw instead of searching.
        beams: Beams of the search; a draw has none.
        results: Continuations of each row.
        top_p: Nucleus of the draw.
        temperature: Temperature of the draw.
        repetition_penalty: Above one: repeating new tokens costs.
        length_penalty: Exponent of the length in a beam's score.
        cache: How keys and values are held. ``"dynamic"`` grows with every token; ``"static"`` has its full length from
            the start, so that transformers compiles the step of a token on a GPU: worth its minutes where many calls
            have the same ``B``, ``L`` and ``max_tokens``.

    Raises:
        ConfigError: With all that is out of range, under the names that ``ChatBridge.generate`` gives to them.
    """

    max_tokens: int
    min_tokens: int = 1
    sample: bool = False
    beams: int = 1
    results: int = 1
    top_p: float = 1.0
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    cache: Cache = "dynamic"

    def __post_init__(self) -> None:
        if faults := [*self._wrong_numbers(), *self._contradictions()]:
            raise ConfigError("; ".join(faults))

    def _wrong_numbers(self) -> Iterator[str]:
        counts = (
            ("max_length", self.max_tokens, 1, math.inf),
            ("min_length", self.min_tokens, 0, math.inf),
            ("num_beams", self.beams, 1, MOST),
            ("num_captions", self.results, 1, MOST),
        )
        for name, count, least, most in counts:
            if not isinstance(count, Integral) or not least <= count <= most:
                span = f"from {least} up" if most == math.inf else f"from {least} to {most}"
                yield f"{name} {count!r} is not a whole number {span}"
        if self.sample and not 0 < self.top_p <= 1:
            yield f"top_p {self.top_p!r} is not in (0, 1]"
        if self.sample and not 0 < self.temperature < math.inf:
            yield f"temperature {self.temperature!r} is not positive and finite"
        if not 0 < self.repetition_penalty < math.inf:
            yield f"repetition_penalty {self.repetition_penalty!r} is not positive and finite"
        if not math.isfinite(self.length_penalty):
            yield f"length_penalty {self.length_penalty!r} is not finite"

    def _contradictions(self) -> Iterator[str]:
        if self.cache not in ("dynamic", "static"):
            yield f"cache {self.cache!r} is neither 'dynamic' nor 'static'"
        if list(self._wrong_numbers()) or self.sample:
            return
        if self.results > self.beams:
            yield (
                f"num_captions {self.results} is more than num_beams {self.beams}: set num_beams to {self.results} or "
                "more, or use_nucleus_sampling"
            )
        if self.beams > 1 and abs(self.length_penalty) * math.log10(self.max_tokens) > _LARGEST_POWER:
            yield f"length_penalty {self.length_penalty!r} is too large for max_length {self.max_tokens}"

    def arguments(self) -> dict[str, Any]:
        """The same for transformers' ``generate``, which warns of what does not concern the chosen way."""
        beams = 1 if self.sample else self.beams
        drawing = {"top_p": self.top_p, "temperature": float(self.temperature), "top_k": 0} if self.sample else {}
        searching = {"length_penalty": float(self.length_penalty)} if beams > 1 else {}
        holding = {"cache_implementation": "static"} if self.cache == "static" else {}
        return {
            "max_new_tokens": self.max_tokens,
            "min_new_tokens": min(self.min_tokens, self.max_tokens),
            "do_sample": self.sample,
            "num_beams": beams,
            "num_return_sequences": self.results,
            **drawing,
            **searching,
            **holding,
        }


def generate_ids(
    model: Any,
    codec: Codec,
    embeds: Tensor,
    mask: Tensor,
    decoding: Decoding,
    stops: Sequence[str] = (),
    **more: Any,
) -> Tensor:
    """Token ids that go on from each row: no more than ``max_tokens``, and than the model has positions for.

    Args:
        model: A causal language model.
        codec: Its tokenizer.
        embeds: ``[B, L, D]``, padded on the left.
        mask: ``[B, L]``, one where a position counts.
        decoding: How tokens are chosen.
        stops: Each row's stop text; it is part of the ids. None at all: only the model's own end stops.
        **more: For transformers' ``generate`` (a ``streamer``, say).

    Returns:
        ``[B * results, n]`` new ids, padded on the right.

    Raises:
        PromptError: If a row is longer than what the model has positions for.
    """
    criteria = StoppingCriteriaList([_StopTexts(codec, stops, decoding.min_tokens)] if any(stops) else [])
    processors = LogitsProcessorList(more.pop("logits_processor", None) or [])
    if decoding.repetition_penalty != 1.0:
        # As transformers' own argument it would pass over as many new tokens of a row as the row has padding.
        processors.append(RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty)))
    if any(stops) and decoding.min_tokens > 1:
        processors.append(_NoEarlyStop(codec, stops, decoding.min_tokens))
    arguments = decoding.arguments()
    most = _room(model, mask)
    if most < decoding.max_tokens:
        log.warning("answers end after %d tokens, where the language model's positions do", most)
        arguments |= {"max_new_tokens": most, "min_new_tokens": min(arguments["min_new_tokens"], most)}
    return model.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        stopping_criteria=criteria,
        logits_processor=processors,
        **arguments,
        **more,
    )


def text_before(codec: Codec, ids: Tensor, stop: str) -> str:
    """The text of new ids, up to the stop text or the tokenizer's own end, without spaces around it."""
    listed = ids.tolist()
    if codec.eos_id is not None and codec.eos_id in listed:
        listed = listed[: listed.index(codec.eos_id)]
    text = codec.decode(listed)
    return (text.split(stop)[0] if stop else text).strip()


def candidate_scores(
    model: Any, embeds: Tensor, mask: Tensor, candidates: Sequence[Sequence[int]], keep: int, chunk: int
) -> Tensor:
    """Log-probabilities of candidates as continuations of each row.

    The rows are read once; each candidate then goes on from the stored keys and values.

    Args:
        model: A causal language model.
        embeds: ``[B, L, D]``, padded on the left.
        mask: ``[B, L]``, one where a position counts.
        candidates: ``C`` lists of ids, none empty.
        keep: Of each row, so many candidates with the likeliest first token are scored, the others get minus infinity
            (as in BLIP's ranking).
        chunk: Candidates scored at once.

    Returns:
        ``[B, C]`` sums of the tokens' log-probabilities, in fp32.

    Raises:
        PromptError: If a row with the longest candidate is longer than what the model has positions for.
    """
    device = embeds.device
    longest = max(len(candidate) for candidate in candidates)
    if (most := _room(model, mask)) < longest:
        raise PromptError(f"a candidate has {longest} tokens, but behind the longest prompt there is room for {most}")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    read = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=True, return_dict=True)
    first = read.logits[:, -1].float().log_softmax(-1)
    ids = pad_sequence([torch.tensor(list(candidate)) for candidate in candidates], batch_first=True).to(device)
    lengths = torch.tensor([len(candidate) for candidate in candidates], device=device)
    openings = first[:, ids[:, 0]]
    scores = torch.full_like(openings, float("-inf"))
    chosen = openings.topk(min(keep, len(candidates)), dim=1).indices
    rows = torch.arange(len(embeds), device=device).repeat_interleave(chosen.shape[1])
    pairs = zip(rows.split(chunk), chosen.flatten().split(chunk), strict=True)
    for row, candidate in pairs:
        rest = _rest_scores(model, keys_and_values(read), mask[row], ids[candidate], lengths[candidate], row)
        scores[row, candidate] = openings[row, candidate] + rest
    return scores


def _rest_scores(model: Any, cache: Any, mask: Tensor, ids: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
    """``[P]`` log-probabilities of all but the first token of ``P`` candidates, each after the row it belongs to."""
    steps = int(lengths.max()) - 1
    if not steps:
        return torch.zeros(len(ids), device=ids.device)
    own = copy.deepcopy(cache)
    own.batch_select_indices(rows)
    counts = torch.arange(1, steps + 1, device=ids.device) < lengths[:, None]
    whole = torch.cat([mask, torch.ones_like(ids[:, :steps])], dim=1)
    positions = mask.sum(1, keepdim=True) + torch.arange(steps, device=ids.device)
    logits = model(
        input_ids=ids[:, :steps],
        attention_mask=whole,
        position_ids=positions,
        use_cache=True,
        return_dict=True,
        **going_on_from(model, own),
    ).logits
    values = logits.float().log_softmax(-1).gather(-1, ids[:, 1 : steps + 1, None]).squeeze(-1)
    return (values * counts).sum(1)


def keys_and_values(result: Any) -> Any:
    """What a language model's result keeps of all it has read: ``cache``, in older transformers ``past_key_values``."""
    return result.cache if "cache" in result else result.past_key_values


def going_on_from(model: Any, cache: Any) -> dict[str, Any]:
    """What makes a language model go on from kept keys and values: an argument whose name depends on its version."""
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def _room(model: Any, mask: Tensor) -> float:
    """How many new tokens the model has positions for behind the longest row; the last one needs none.

    Raises:
        PromptError: If the row itself has too many.
    """
    longest, most = int(mask.sum(1).max()), positions_of(model.config)
    if longest > most:
        raise PromptError(
            f"a prompt has {longest} positions with its media, the language model no more than {most:g}: shorten it"
        )
    return most - longest + 1


def positions_of(config: Any) -> float:
    """The positions that a language model was made for; without end where its configuration names none."""
    own = getattr(config, "max_position_embeddings", None)
    if not own:
        return math.inf
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    stretched = scaling.get("rope_type", scaling.get("type")) in ("linear", "dynamic")
    # Vicuna v1.5-16k, say: 4096 positions of the LLaMA, drawn out by 4
    return own * scaling.get("factor", 1) if stretched else own


class _StopTexts(StoppingCriteria):
    """Ends a row once its stop text stands at its end.

    The ids given to it are new ones only, since the prompt came as embeddings.
    """

    def __init__(self, codec: Codec, stops: Sequence[str], min_tokens: int) -> None:
        self._codec = codec
        self._stops = stops
        self._min_tokens = min_tokens
        self._tail = max(_most_tokens(stop) for stop in stops)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.shape[1] < self._min_tokens:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        per_row = len(input_ids) // len(self._stops)
        tails = input_ids[:, -self._tail :].tolist()
        ended = [
            bool(stop) and stop in self._codec.decode(tail)
            for tail, stop in zip(tails, (s for s in self._stops for _ in range(per_row)), strict=True)
        ]
        return torch.tensor(ended, device=input_ids.device)


class _NoEarlyStop(LogitsProcessor):
    """Keeps a row from completing its stop text before it may stop."""

    def __init__(self, codec: Any, stops: Sequence[str], min_tokens: int) -> None:
        self._codec = codec
        self._stops = stops
        self._min_tokens = min_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] + 1 >= self._min_tokens:
            return scores
        per_row = len(input_ids) // len(self._stops)
        barred = torch.zeros_like(scores, dtype=torch.bool)
        for i, ids in enumerate(input_ids.tolist()):
            if stop := self._stops[i // per_row]:
                tail = ids[-_most_tokens(stop) :]
                may_end = _ids_with(self._codec, stop[-1])
                barred[i, [t for t in may_end if stop in self._codec.decode([*tail, t])]] = True
        return scores.masked_fill(barred, float("-inf"))


def _most_tokens(stop: str) -> int:
    """The last tokens in which a stop text that ends with them lies: one for each byte, and those of a character."""
    return len(stop.encode("utf-8", "surrogatepass")) + 4


@functools.lru_cache(maxsize=16)
def _ids_with(codec: Any, character: str) -> list[int]:
    """The tokens that hold a character, or may complete one that takes several tokens."""
    wanted = (character,) if character.isascii() else (character, "\N{REPLACEMENT CHARACTER}")
    texts = ((token, codec.decode([token])) for token in range(len(codec)))
    return [token for token, text in texts if any(part in text for part in wanted)]
