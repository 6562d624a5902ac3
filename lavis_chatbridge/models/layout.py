"""Layout of prompts in batches: pieces and soft tokens become rows of positions, with mask, position ids and labels.

There are two layouts. ``"text"``: BOS, then the pieces; padding on the right in training, on the left in generation.
``"original"``: the batches of the original ChatBridge, for its checkpoints (its ``models/chatbridge.py``, 249-295 and
361-437). A prompt whose first piece is encoded already (by the tokenizer's own chat template) brings its own BOS.
This module knows a tokenizer and counts of soft tokens, no encoder and no language model.

Shapes: ``B`` rows, ``L`` positions, ``S`` soft tokens of the whole batch, ``K`` positions that hold one, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lavis_chatbridge.errors import PromptError
from lavis_chatbridge.models.kept import Element
from lavis_chatbridge.models.settings import Layout
from lavis_chatbridge.models.tokenizer import Codec
from lavis_chatbridge.prompting import Modality, Piece, Slot, Text

SOFT = -1
"""In place of a token id: a soft token."""
PADDING = -2
"""In place of a token id: no embedding."""
IGNORED = -100
"""The label of a position that is not trained."""

Places: TypeAlias = Mapping[tuple[Modality, int], range]
"""The range of each of a sample's media among the soft tokens of the batch."""


@dataclass(frozen=True)
class Batch:
    """Rows ready for the language model, on the CPU.

    Attributes:
        token_ids: ``[B, L]`` ids, ``SOFT`` or ``PADDING``.
        soft: ``[K]`` which soft token each ``SOFT`` position holds, row by row.
        attention_mask: ``[B, L]`` one where a position may be seen.
        position_ids: ``[B, L]``.
        labels: ``[B, L]`` the id where it is a target, else ``IGNORED``.
        lost: Rows whose targets were all cut off.
    """

    token_ids: Tensor
    soft: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    lost: int = 0

    @property
    def needs_mask(self) -> bool:
        """Whether padding precedes any row's text.

        Padding behind a row cannot affect it in causal attention, which runs as flash attention without a mask.
        """
        ends_only = (self.attention_mask[:, 1:] <= self.attention_mask[:, :-1]).all()
        counted = (self.position_ids == torch.arange(self.position_ids.shape[1])).all()
        return not bool(ends_only & counted)

    @property
    def last_supervised(self) -> int:
        """The last column of all rows that predicts a target; -1 without targets."""
        columns = self.supervised()[1]
        return int(columns.max()) if len(columns) else -1

    def supervised(self) -> tuple[Tensor, Tensor, Tensor]:
        """``[K]`` rows, columns and targets of the predictions in the loss: each position predicts the next one."""
        rows, columns = (self.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        return rows, columns, self.labels[rows, columns + 1]


def lay_out(
    prompts: Sequence[Sequence[Piece]],
    places: Sequence[Places],
    codec: Codec,
    layout: Layout,
    max_text_length: int,
) -> Batch:
    """Training rows.

    Args:
        prompts: Each sample's pieces; each text piece is tokenised on its own.
        places: Each sample's soft tokens.
        codec: The tokenizer.
        layout: ``"text"`` or ``"original"``.
        max_text_length: In layout ``"text"``, and in the original's stage 1: text tokens of a sample; further text, and
            media behind it, are cut off. In the original's stage 2: positions.

    Raises:
        PromptError: If a prompt names a medium that its sample lacks.
    """
    rows = [_row(pieces, media, codec, i) for i, (pieces, media) in enumerate(zip(prompts, places, strict=True))]
    if layout == "original" and not all(_is_alignment(pieces) for pieces in prompts):
        kept = [row.first(max_text_length) for row in rows]
        batch = _original_chat(kept, codec)
    else:
        bos = codec.bos_id
        pairs = zip(rows, prompts, strict=True)
        kept = [row.within(max_text_length).after(None if _is_encoded(p) else bos) for row, p in pairs]
        # The original pads with EOS, and trains no position that holds it.
        ignored = codec.eos_id if layout == "original" else None
        batch = _padded_right(kept, codec, ignored)
    lost = sum(bool(row.target.any() and not cut.target.any()) for row, cut in zip(rows, kept, strict=True))
    return replace(batch, lost=lost)


def elements_of(
    pieces: Sequence[Piece], media: Mapping[Slot, tuple[str, int]], codec: Codec, bos: bool = True
) -> list[Element]:
    """What stands at each position of one prompt, for :class:`decoding.Generation`.

    Args:
        pieces: The prompt.
        media: Key and number of soft tokens of each slot's medium.
        codec: The tokenizer.
        bos: Begin with BOS, unless the prompt brings its own.

    Raises:
        PromptError: If the prompt is empty, or names a medium that is not given.
    """
    places = {(slot.modality, slot.index): range(count) for slot, (_, count) in media.items()}
    row = _row(pieces, places, codec, 0)
    keys = iter([(media[p][0], i) for p in pieces if isinstance(p, Slot) for i in range(media[p][1])])
    elements: list[Element] = [next(keys) if token == SOFT else token for token in row.ids.tolist()]
    if not elements:
        raise PromptError("the prompt is empty: it needs text or a medium")
    return elements if not bos or codec.bos_id is None or _is_encoded(pieces) else [codec.bos_id, *elements]


def embed(batch: Batch, soft: Tensor | None, table: nn.Module, scale: float = 1.0) -> Tensor:
    """The rows as ``[B, L, D]`` embeddings of a language model's table; gradients reach the soft tokens.

    Args:
        batch: The rows.
        soft: ``[S, D]`` soft tokens of the whole batch, None if no row has one.
        table: The language model's embedding layer.
        scale: See :func:`families.embedding_scale`.
    """
    ids = batch.token_ids.to(next(table.parameters()).device)
    embeds = table(ids.clamp(min=0)) * (ids != PADDING).unsqueeze(-1)
    if soft is None or not len(batch.soft):
        return embeds
    rows, columns = (batch.token_ids == SOFT).nonzero(as_tuple=True)
    device = embeds.device
    chosen = (soft / scale).to(embeds.dtype)[batch.soft.to(device)]
    return embeds.index_put((rows.to(device), columns.to(device)), chosen)


@dataclass(frozen=True)
class _Row:
    """One sample in positions: ids (or ``SOFT``), whether each is a target, and the soft token of each (else -1)."""

    ids: Tensor
    target: Tensor
    soft: Tensor

    def first(self, length: int) -> _Row:
        """The first positions."""
        return _Row(self.ids[:length], self.target[:length], self.soft[:length])

    def within(self, text_length: int) -> _Row:
        """The positions before the first text token beyond ``text_length``."""
        over = ((self.soft < 0).cumsum(0) > text_length).nonzero()
        return self.first(int(over[0])) if len(over) else self

    def after(self, token: int | None) -> _Row:
        """The row behind a token, if there is one."""
        if token is None:
            return self
        front = (self.ids.new_tensor([token]), self.target.new_tensor([False]), self.soft.new_tensor([-1]))
        own = (self.ids, self.target, self.soft)
        return _Row(*(torch.cat(pair) for pair in zip(front, own, strict=True)))


def _row(pieces: Sequence[Piece], media: Places, codec: Codec, sample: int) -> _Row:
    ids: list[int] = []
    target: list[bool] = []
    soft: list[int] = []
    for piece in pieces:
        if isinstance(piece, Slot):
            place = media.get((piece.modality, piece.index))
            if place is None:
                have = ", ".join(f"{modality} {i}" for modality, i in media) or "none"
                named = f"{piece.modality} {piece.index}"
                raise PromptError(f"the prompt of sample {sample} names {named}, which it lacks (it has: {have})")
            ids += [SOFT] * len(place)
            target += [False] * len(place)
            soft += place
        else:
            tokens = codec.encode(piece.text) if piece.ids is None else piece.ids
            ids += tokens
            target += [piece.target] * len(tokens)
            soft += [-1] * len(tokens)
    long = torch.long
    return _Row(torch.tensor(ids, dtype=long), torch.tensor(target, dtype=torch.bool), torch.tensor(soft, dtype=long))


def _padded_right(rows: Sequence[_Row], codec: Codec, ignored: int | None) -> Batch:
    pad = codec.pad_id if ignored is None else ignored
    ids = pad_sequence([row.ids for row in rows], True, pad)
    mask = pad_sequence([torch.ones_like(row.ids) for row in rows], True, 0)
    target = pad_sequence([row.target for row in rows], True, False)
    if ignored is not None:
        target = target & (ids != ignored)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Batch(ids, _soft(rows), mask, positions, torch.where(target, ids, IGNORED))


def _original_chat(rows: Sequence[_Row], codec: Codec) -> Batch:
    """The original's stage 2: padding on the left, then one column of BOS, visible where column 0 of the rest is."""
    ids = pad_sequence([row.ids for row in rows], True, PADDING, padding_side="left")
    mask = pad_sequence([torch.ones_like(row.ids) for row in rows], True, 0, padding_side="left")
    target = pad_sequence([row.target for row in rows], True, False, padding_side="left")
    labels = torch.where(target, ids, IGNORED)
    if codec.bos_id is not None:
        ids = torch.cat([torch.full_like(ids[:, :1], codec.bos_id), ids], dim=1)
        mask = torch.cat([mask[:, :1], mask], dim=1)
        labels = torch.cat([torch.full_like(labels[:, :1], IGNORED), labels], dim=1)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Batch(ids, _soft(rows), mask, positions, labels)


def _soft(rows: Sequence[_Row]) -> Tensor:
    """The soft tokens of all rows in order."""
    return torch.cat([row.soft[row.soft >= 0] for row in rows])


def _is_encoded(pieces: Sequence[Piece]) -> bool:
    """Whether a template has encoded a prompt, with the BOS that belongs to it."""
    return bool(pieces) and isinstance(pieces[0], Text) and pieces[0].ids is not None and not pieces[0].target


def _is_alignment(pieces: Sequence[Piece]) -> bool:
    """Whether a prompt is of stage 1: media and targets only."""
    return all(isinstance(piece, Slot) or piece.target for piece in pieces)
