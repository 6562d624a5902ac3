"""Ranking of given candidates by their probability as continuations of a prompt.

Shapes: ``B`` rows, ``L`` positions, ``C`` candidates, ``P`` pairs of a row and a candidate, ``D`` width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lavis_chatbridge.errors import PromptError
from lavis_chatbridge.models.families import LanguageModel, cache_argument, keys_and_values, room_behind


def candidate_scores(
    model: LanguageModel, embeds: Tensor, mask: Tensor, candidates: Sequence[Sequence[int]], keep: int, chunk: int
) -> Tensor:
    """Log-probabilities of candidates as continuations of each row.

    Each row is read once; every candidate continues from the row's keys and values.

    Args:
        model: The language model.
        embeds: ``[B, L, D]``, padded on the left.
        mask: ``[B, L]``, one where a position counts.
        candidates: ``C`` lists of ids, none of them empty.
        keep: Candidates of each row that are scored, those with the likeliest first token (as in BLIP's ranking); the
            others get minus infinity.
        chunk: Candidates that are scored at once.

    Returns:
        ``[B, C]`` sums of the tokens' log-probabilities, in fp32.

    Raises:
        PromptError: If the model has too few positions for a row and the longest candidate.
    """
    device = embeds.device
    longest = max(len(candidate) for candidate in candidates)
    if (room := room_behind(model.config, mask)) < longest:
        raise PromptError(f"a candidate has {longest} tokens, but the longest prompt leaves room for {room:g}")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    read = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=True, return_dict=True)
    first = read.logits[:, -1].float().log_softmax(-1)
    ids = pad_sequence([torch.tensor(list(candidate)) for candidate in candidates], batch_first=True).to(device)
    lengths = torch.tensor([len(candidate) for candidate in candidates], device=device)
    openings = first[:, ids[:, 0]]
    scores = torch.full_like(openings, float("-inf"))
    chosen = openings.topk(min(keep, len(candidates)), dim=1).indices
    rows = torch.arange(len(embeds), device=device).repeat_interleave(chosen.shape[1])
    for row, candidate in zip(rows.split(chunk), chosen.flatten().split(chunk), strict=True):
        rest = _rest_scores(model, keys_and_values(read), mask[row], ids[candidate], lengths[candidate], row)
        scores[row, candidate] = openings[row, candidate] + rest
    return scores


def _rest_scores(model: LanguageModel, cache: Any, mask: Tensor, ids: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
    """``[P]`` log-probabilities of all but the first token of ``P`` candidates, each behind its row."""
    steps = int(lengths.max()) - 1
    if not steps:
        return torch.zeros(len(ids), device=ids.device)
    own = copy.deepcopy(cache)
    own.batch_select_indices(rows)
    counts = torch.arange(1, steps + 1, device=ids.device) < lengths[:, None]
    logits = model(
        input_ids=ids[:, :steps],
        attention_mask=torch.cat([mask, torch.ones_like(ids[:, :steps])], dim=1),
        position_ids=mask.sum(1, keepdim=True) + torch.arange(steps, device=ids.device),
        use_cache=True,
        return_dict=True,
        **cache_argument(model, own),
    ).logits
    values = logits.float().log_softmax(-1).gather(-1, ids[:, 1 : steps + 1, None]).squeeze(-1)
    return (values * counts).sum(1)
