"""Answers of the language model: generation until a stop text, and ranking of given candidates.

It knows embeddings, masks and token ids, no media and no prompts.

Shapes: ``B`` rows, ``L`` positions, ``C`` candidates, ``D`` width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import StoppingCriteria, StoppingCriteriaList

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.models.language_model import Codec

Cache: TypeAlias = Literal["dynamic", "static"]


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
        ConfigError: If the cache is neither.
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
        if self.cache not in ("dynamic", "static"):
            raise ConfigError(f"cache {self.cache!r} is neither 'dynamic' nor 'static'")

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
            "repetition_penalty": float(self.repetition_penalty),
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
    """Token ids that go on from each row.

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
    """
    criteria = StoppingCriteriaList([_StopTexts(codec, stops, decoding.min_tokens)] if any(stops) else [])
    return model.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        stopping_criteria=criteria,
        **decoding.arguments(),
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
    """
    device = embeds.device
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


class _StopTexts(StoppingCriteria):
    """Ends a row once its stop text stands at its end.

    The ids given to it are new ones only, since the prompt came as embeddings.
    """

    def __init__(self, codec: Codec, stops: Sequence[str], min_tokens: int) -> None:
        self._codec = codec
        self._stops = stops
        self._min_tokens = min_tokens
        # A token may hold no whole character (byte pieces of a character take up to four).
        self._tail = max(len(stop) for stop in stops) + 4

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
