"""From a batch of LAVIS's tasks to rows of positions: its prompts and media, then ids, mask, position ids and labels.

A batch (``samples``) is a dict. ``image``, ``video`` and ``audio`` are tensors with a batch axis, or lists with one
medium or a list of media per sample. ``pieces`` are the prompts; without them, a template makes prompts from LAVIS's
text keys. An inconsistent batch raises a `PromptError`.

Prompts and soft tokens become rows in one of two layouts. ``"text"``: BOS, then the pieces, padding on the right.
``"original"``: the rows of the original ChatBridge, for its checkpoints (its ``models/chatbridge.py``, 249-295 and
361-437). This module runs no language model.

Shapes: ``B`` rows, ``L`` positions, ``S`` soft tokens of the batch, ``K`` positions of a soft token or target, ``D``
width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lavis_chatbridge.errors import PromptError
from lavis_chatbridge.media.source import AudioClips, EncodedMedium
from lavis_chatbridge.models.settings import Layout
from lavis_chatbridge.models.templates import Template
from lavis_chatbridge.models.tokenizer import Tokenizer
from lavis_chatbridge.prompting.conversation import (
    END_OF_TURN,
    HUMAN,
    MODALITIES,
    Message,
    Modality,
    Piece,
    Slot,
    Text,
    alignment_prompt,
    context_of,
)

Medium: TypeAlias = Tensor | AudioClips | EncodedMedium
Media: TypeAlias = dict[Modality, list[list[Medium]]]
"""Modality -> for each sample, the list of its media."""
MediaRanges: TypeAlias = Mapping[Slot, range]
"""A sample's media -> the range of each in the batch's soft tokens."""
Element: TypeAlias = int | tuple[str, int]
"""The content of one position: a token id, or a medium's key and the index of its soft token."""

SOFT = -1
"""Stands for a soft token in ``token_ids``."""
PADDING = -2
"""Stands for padding in ``token_ids``; its embedding is zero."""
IGNORED = -100
"""The label of a position without a target."""
_SHAPES: dict[Modality, str] = {"image": "[B, 3, H, W]", "video": "[B, T, 3, H, W]", "audio": "[B, T, F, M]"}
"""The shape of a batch's tensor: ``F`` frames of ``M`` mel bins in each of a sound's ``T`` clips."""


def media_of(samples: Mapping[str, Any]) -> Media:
    """The media of a batch."""
    media = {name: _by_sample(name, samples[name]) for name in MODALITIES if samples.get(name) is not None}
    sizes = {modality: len(listed) for modality, listed in media.items()}
    if len(set(sizes.values())) > 1:
        raise PromptError(f"the modalities of a batch have different numbers of samples: {sizes}")
    return media


def training_prompts(samples: Mapping[str, Any], media: Media, template: Template) -> list[list[Piece]]:
    """Each sample's prompt with its targets.

    The first of these that the batch has: ``pieces``; ``text_input`` and an answer (``text_output`` or ``answer``) as a
    conversation; ``text_input`` alone as the caption of the media.
    """
    if samples.get("pieces") is not None:
        return _given_prompts(samples["pieces"], media, template)
    if samples.get("text_input") is None:
        raise PromptError("a training batch needs 'pieces' or 'text_input'")
    questions = _user_messages(samples["text_input"], media)
    answers = _answers(samples)
    if answers is None:
        return [alignment_prompt(message.media, message.text) for message in questions]
    if len(answers) != len(questions):
        raise PromptError(f"{len(questions)} questions in 'text_input', but {len(answers)} answers")
    replies = [Message("assistant", answer) for answer in answers]
    return [template.prompt(turns) for turns in zip(questions, replies, strict=True)]


def contexts(samples: Mapping[str, Any], media: Media, template: Template, question: Any = None) -> list[list[Piece]]:
    """Each sample's prompt for the model to continue.

    The first of these that is given: ``pieces`` up to the last target; ``question``, ``prompt`` or ``text_input`` as
    the first message of a conversation; only the media, to be captioned.
    """
    if samples.get("pieces") is not None:
        return [context_of(pieces) for pieces in _given_prompts(samples["pieces"], media, template)]
    given = question or samples.get("prompt") or samples.get("text_input")
    if given:
        return [template.prompt([message], generate=True) for message in _user_messages(given, media)]
    if not media:
        raise PromptError("there is nothing to answer: the batch has neither text nor media")
    return [context_of(alignment_prompt(message.media, "")) for message in _user_messages("", media)]


@dataclass(frozen=True)
class Rows:
    """Rows ready for the language model, on the CPU.

    Attributes:
        token_ids: ``[B, L]`` ids, ``SOFT`` or ``PADDING``.
        soft: ``[K]`` index of the soft token at each ``SOFT`` position, row by row.
        attention_mask: ``[B, L]`` zero where attention is masked.
        position_ids: ``[B, L]``.
        labels: ``[B, L]`` ids of targets, else ``IGNORED``.
        without_targets: Number of rows whose targets were all cut off by ``max_text_length``.
    """

    token_ids: Tensor
    soft: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    without_targets: int = 0

    @property
    def needs_mask(self) -> bool:
        """Whether padding precedes any row's text.

        Padding after a row cannot affect it, because attention is causal; without a mask, flash attention is possible.
        """
        ends_only = (self.attention_mask[:, 1:] <= self.attention_mask[:, :-1]).all()
        counted = (self.position_ids == torch.arange(self.position_ids.shape[1])).all()
        return not bool(ends_only & counted)

    def supervised(self) -> tuple[Tensor, Tensor, Tensor]:
        """``[K]`` rows, columns and targets of the loss; the position at a column predicts the next one."""
        rows, columns = (self.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        return rows, columns, self.labels[rows, columns + 1]


def lay_out(
    prompts: Sequence[Sequence[Piece]],
    ranges: Sequence[MediaRanges],
    tokenizer: Tokenizer,
    layout: Layout,
    max_text_length: int,
) -> Rows:
    """The rows of a training batch; each text piece is tokenised on its own.

    ``max_text_length`` is the most text tokens of a sample in layout ``"text"`` and in the original's stage 1: text and
    media after them are cut off. In the original's stage 2 it is the most positions.
    """
    full = [_positions(pieces, own, tokenizer, i) for i, (pieces, own) in enumerate(zip(prompts, ranges, strict=True))]
    if layout == "original" and not all(is_alignment(pieces) for pieces in prompts):
        kept = [row[:max_text_length] for row in full]
        ids, mask, labels = _original_chat(kept, tokenizer)
    else:
        kept = [_within(row, max_text_length) for row in full]
        bos = [] if tokenizer.bos_id is None else [_Position(tokenizer.bos_id)]
        opened = [row if _is_encoded(pieces) else [*bos, *row] for row, pieces in zip(kept, prompts, strict=True)]
        padding = tokenizer.eos_id if layout == "original" and tokenizer.eos_id is not None else tokenizer.pad_id
        ids, mask, labels = _stacked(opened, padding, "right")
        if layout == "original":  # the original pads with EOS, and has no targets at EOS
            labels = labels.masked_fill(ids == padding, IGNORED)
    soft = torch.tensor([p.soft for row in kept for p in row if p.id == SOFT], dtype=torch.long)
    without = sum(any(p.target for p in row) for row in full) - sum(any(p.target for p in row) for row in kept)
    return Rows(ids, soft, mask, torch.arange(ids.shape[1]).expand_as(ids), labels, without)


def embed(rows: Rows, soft: Tensor | None, table: nn.Embedding, scale: float = 1.0) -> Tensor:
    """The rows as ``[B, L, D]`` embeddings of a language model's table; gradients reach the ``[S, D]`` soft tokens.

    ``scale`` is that of :func:`families.embedding_scale`.
    """
    ids = rows.token_ids.to(table.weight.device)
    embeds = table(ids.clamp(min=0)) * (ids != PADDING).unsqueeze(-1)
    if soft is None or not len(rows.soft):
        return embeds
    chosen = (soft / scale).to(embeds.dtype)[rows.soft.to(embeds.device)]
    return embeds.index_put((ids == SOFT).nonzero(as_tuple=True), chosen)


def elements_of(
    pieces: Sequence[Piece], media: Mapping[Slot, tuple[str, Sized]], tokenizer: Tokenizer, bos: bool = True
) -> list[Element]:
    """The content of each position of one prompt, for :class:`decoding.Generation`.

    ``media`` has the key and the soft tokens of each slot's medium. ``bos`` puts BOS first, unless the prompt's own
    ids start with it.
    """
    ranges = {slot: range(len(soft)) for slot, (_, soft) in media.items()}
    elements: list[Element] = []
    for piece in pieces:
        row = _positions([piece], ranges, tokenizer, 0)
        elements += [(media[piece][0], p.soft) if isinstance(piece, Slot) else p.id for p in row]
    if not elements:
        raise PromptError("the prompt is empty: it needs text or a medium")
    return elements if not bos or tokenizer.bos_id is None or _is_encoded(pieces) else [tokenizer.bos_id, *elements]


def is_alignment(pieces: Sequence[Piece]) -> bool:
    """Whether a prompt is of stage 1: only media and target captions."""
    return all(isinstance(piece, Slot) or piece.target for piece in pieces)


def _by_sample(modality: Modality, given: Any) -> list[list[Medium]]:
    if isinstance(given, Tensor):
        if given.dim() < len(_SHAPES[modality].split(",")):
            raise PromptError(
                f"'{modality}' is a tensor of shape {list(given.shape)}, expected a batch {_SHAPES[modality]}: "
                f"{modality}.unsqueeze(0) makes a batch of one"
            )
        return [[medium] for medium in given]
    if not isinstance(given, (list, tuple)) or isinstance(given, Medium):
        raise PromptError(f"'{modality}' of a batch is a {type(given).__name__}, expected a tensor or a list by sample")
    media = [[one] if isinstance(one, Medium) else list(one or ()) for one in given]
    for i, listed in enumerate(media):
        if wrong := [type(medium).__name__ for medium in listed if not isinstance(medium, Medium)]:
            raise PromptError(f"'{modality}' of sample {i} contains a {wrong[0]}, expected a processed medium")
    return media


def _user_messages(texts: str | Sequence[Any], media: Media) -> list[Message]:
    """One message per sample, its media in the order image, video, audio; a single string is used for all samples."""
    size = max(map(len, media.values()), default=1)
    listed = [texts] * size if isinstance(texts, str) else [str(text) for text in texts]
    _check_size(len(listed), media, "texts")
    shown = [tuple(modality for modality in media for _ in media[modality][i]) for i in range(len(listed))]
    return [Message("user", text, modalities) for text, modalities in zip(listed, shown, strict=True)]


def _answers(samples: Mapping[str, Any]) -> list[str] | None:
    """One answer per question; with LAVIS's several weighted answers (``n_answers``), the one of largest weight."""
    given = next((samples[key] for key in ("text_output", "answer") if samples.get(key) is not None), None)
    if given is None:
        return None
    answers = [given] if isinstance(given, str) else [str(answer) for answer in given]
    if samples.get("n_answers") is None:
        return answers
    weighted = zip([float(w) for w in samples.get("weight", [1.0] * len(answers))], answers, strict=True)
    groups = [[next(weighted) for _ in range(int(count))] for count in samples["n_answers"]]
    return [max(group, key=lambda pair: pair[0])[1] for group in groups]


def _given_prompts(prompts: Sequence[Sequence[Piece]], media: Media, template: Template) -> list[list[Piece]]:
    """The batch's own prompts; a `PromptError` if they were made for another template."""
    _check_size(len(prompts), media, "prompts")
    first = next((piece for pieces in prompts for piece in pieces[:1] if isinstance(piece, Text)), Text(""))
    if template.name != "human_assistant" and first.text.startswith(END_OF_TURN + HUMAN):
        raise PromptError(
            f"model.template is {template.name}, but the batch's prompts are worded as human_assistant: call "
            "set_template(model.template) of the data sets (this package's runner does)"
        )
    return [list(pieces) for pieces in prompts]


def _check_size(count: int, media: Media, what: str) -> None:
    if not count:
        raise PromptError("the batch is empty")
    if any(len(listed) != count for listed in media.values()):
        size = len(next(iter(media.values())))
        raise PromptError(f"the batch has {count} {what}, but media for {size} samples")


class _Position(NamedTuple):
    """A token id or ``SOFT``, whether it is a target, and the index of its soft token."""

    id: int
    target: bool = False
    soft: int = -1


def _positions(pieces: Sequence[Piece], media: MediaRanges, tokenizer: Tokenizer, sample: int) -> list[_Position]:
    row: list[_Position] = []
    for piece in pieces:
        if isinstance(piece, Text):
            ids = tokenizer.encode(piece.text) if piece.ids is None else piece.ids
            row += [_Position(i, piece.target) for i in ids]
        elif piece in media:
            row += [_Position(SOFT, False, i) for i in media[piece]]
        else:
            found = ", ".join(f"{slot.modality} {slot.index}" for slot in media) or "no media"
            raise PromptError(
                f"the prompt of sample {sample} refers to {piece.modality} {piece.index}, but the sample has {found}"
            )
    return row


def _stacked(rows: Sequence[list[_Position]], padding: int, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, L]`` ids, mask and labels, padded on one side."""

    def stack(values: Sequence[list[int]], fill: int) -> Tensor:
        return pad_sequence([torch.tensor(row, dtype=torch.long) for row in values], True, fill, side)

    ids = stack([[p.id for p in row] for row in rows], padding)
    labels = stack([[p.id if p.target else IGNORED for p in row] for row in rows], IGNORED)
    return ids, stack([[1] * len(row) for row in rows], 0), labels


def _original_chat(rows: Sequence[list[_Position]], tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the original's stage 2.

    Rows are padded on the left, then BOS is put before the padding. As in the original, BOS is masked wherever the
    first position is.
    """
    ids, mask, labels = _stacked(rows, PADDING, "left")
    if tokenizer.bos_id is None:
        return ids, mask, labels
    bos, untrained = torch.full_like(ids[:, :1], tokenizer.bos_id), torch.full_like(ids[:, :1], IGNORED)
    return torch.cat([bos, ids], 1), torch.cat([mask[:, :1], mask], 1), torch.cat([untrained, labels], 1)


def _within(row: list[_Position], text_length: int) -> list[_Position]:
    """The positions before the first text token beyond ``text_length``."""
    texts = [i for i, position in enumerate(row) if position.soft < 0]
    return row[: texts[text_length]] if len(texts) > text_length else row


def _is_encoded(pieces: Sequence[Piece]) -> bool:
    """Whether a template has already encoded the prompt to ids, including BOS."""
    return bool(pieces) and isinstance(pieces[0], Text) and pieces[0].ids is not None and not pieces[0].target
