"""Turns samples into the model's input (prompt pieces, processed media, references), and collates batches.

Every random choice (caption, template, crop, frames) depends only on the seed, the source, the sample and the epoch,
not on the number of workers or ranks.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lavis_chatbridge import schema
from lavis_chatbridge.datasets.settings import DataSettings
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.files import hash_of
from lavis_chatbridge.processors.base import SECTIONS
from lavis_chatbridge.prompting import conversation
from lavis_chatbridge.prompting.conversation import MODALITIES, Message, Modality, Piece, Text
from lavis_chatbridge.prompting.templates import Templates
from lavis_chatbridge.schema import Medium, Sample, SampleFile, check_inside, to_record

if TYPE_CHECKING:
    from lavis_chatbridge.datasets.features import FeatureStore

ITEM_KEYS = (
    "sample_id", "pieces", *MODALITIES, "text_output", "references", "answers", "facts", "task", "held_out", "meta",
)  # fmt: skip
"""The keys of every item, except ``source``; in a batch each is a list with one entry per sample."""

_TEXT_STREAM, _MEDIA_STREAM = 0, 1
_SOME = 64  # number of samples to estimate the length of templates from


@dataclass(eq=False)
class SampleDataset(torch.utils.data.Dataset):
    """One source of a mixture: makes the model's input from samples, usually of one modality."""

    name: str
    """The source's name in mixtures, batches and logs."""
    samples: SampleFile
    settings: DataSettings
    """How prompts are made: stage, task, style, templates, text after a reply."""
    train: bool = True
    """Choose captions, templates and augmentations at random; otherwise use the first caption and template."""
    processors: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """``image``, ``video``, ``audio`` and ``text`` -> the processor of one split."""
    indices: np.ndarray | None = None
    """``[n]`` indices of this source's samples in ``samples``; None: all."""
    ratio: float | None = None
    """Share of the steps within its data set, in any unit; None: its share of the samples."""
    seed: int = 0
    """Seed of all random choices."""
    features: FeatureStore | None = None
    """Store of encoder outputs to use instead of media; None: open the media."""
    chat_prompt: Callable[..., list[Piece]] = conversation.chat_prompt
    """Makes the prompt of a conversation: the paper's, or the model's template's."""

    def __post_init__(self) -> None:
        self.templates = self.settings.instruction_templates()  # None uses questions unchanged

    @property
    def modalities(self) -> set[Modality]:
        """The modalities of its samples' media."""
        own = self.samples.modality if self.indices is None else self.samples.modality[self.indices]
        named = "+".join(self.samples.modalities[number] for number in np.unique(own))
        return {modality for modality in MODALITIES if modality in named}

    @property
    def lengths(self) -> np.ndarray:
        """``[n]`` approximate number of tokens of each sample, without prompt format and templates."""
        return self.samples.lengths if self.indices is None else self.samples.lengths[self.indices]

    def added_tokens(self) -> float:
        """Approximate number of tokens that format and templates add to a sample, estimated from a few samples."""
        added = []
        for index in np.linspace(0, len(self) - 1, num=min(len(self), _SOME)).astype(int).tolist():
            sample = self.sample(index)
            pieces = self.pieces(sample, self._rng(index, 0, _TEXT_STREAM))
            text = sum(len(piece.text) for piece in pieces if isinstance(piece, Text))
            media = schema.TOKENS_PER_MEDIUM * len(sample.files)
            added.append(text / schema.CHARACTERS_PER_TOKEN + media - int(self.lengths[index]))
        return float(np.mean(added))

    def __len__(self) -> int:
        return len(self.samples) if self.indices is None else len(self.indices)

    def sample(self, index: int) -> Sample:
        """The ``index``-th sample, without opening its media."""
        return self.samples[index if self.indices is None else int(self.indices[index])]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(index)

    def item(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """The ``index``-th sample as the model's input, with the keys `ITEM_KEYS` and ``source``.

        An unreadable medium is a `MediaError`, a sample that does not fit the stage a `DataError`.
        """
        sample = self.sample(index)
        pieces = self.pieces(sample, self._rng(index, epoch, _TEXT_STREAM))
        rng = self._rng(index, epoch, _MEDIA_STREAM)
        media: dict[str, list] = {modality: [] for modality in MODALITIES}
        for medium in sample.files:
            media[medium.modality].append(self._load(medium, rng))
        references = list(sample.captions)
        if sample.turns and not self._is_caption(sample):
            references = [*sample.answers] or [turn.text for turn in sample.turns[-1:] if turn.role == "assistant"]
        return {
            "sample_id": sample.id,
            "source": self.name,
            "task": sample.task or self.settings.task,
            "held_out": sample.held_out,
            "pieces": pieces,
            **media,
            "text_output": "".join(piece.text for piece in pieces if isinstance(piece, Text) and piece.target),
            "references": references,
            "answers": list(sample.answers),
            "facts": dict(sample.facts),
            "meta": dict(sample.meta),
        }

    def sample_hash(self, index: int) -> str:
        """A short hash of the ``index``-th sample: its text, and its media by name and size."""
        sample = self.sample(index)
        sizes = [os.path.getsize(m.path) if m.size is None and os.path.exists(m.path) else m.size for m in sample.files]
        return hash_of(to_record(sample, os.path.abspath(self.samples.root)), sizes)[:16]

    def pieces(self, sample: Sample, rng: np.random.Generator | None) -> list[Piece]:
        """The prompt of a sample; without ``rng``, with the first caption and template."""
        chosen = rng if self.train else None
        if self._is_caption(sample):
            if not sample.captions:
                raise DataError(f"{self.name}: sample {sample.id!r} has no captions; alignment needs one")
            clean = self.processors.get("text", conversation.clean_caption)
            pieces = conversation.alignment_prompt(sample.modalities, clean(_choose(sample.captions, chosen)))
        else:
            turns = self._turns(sample, chosen)
            pieces = self.chat_prompt(turns, turns[-1].role == "user", self.settings.reply_end)
        slots = zip(conversation.slots_of(pieces), sample.media, strict=True)
        words = {slot: _choose(medium.words, chosen) for slot, medium in slots if medium.words}
        return conversation.spell_out(pieces, words)

    def _is_caption(self, sample: Sample) -> bool:
        return self.settings.stage == "alignment" or (self.settings.stage == "auto" and not sample.turns)

    def _turns(self, sample: Sample, rng: np.random.Generator | None) -> Sequence[Message]:
        task = sample.task or self.settings.task or f"{sample.modality.replace('+', '_')}_caption"
        style = sample.style or self.settings.style
        if sample.turns:
            if self.templates is None or task not in self.templates.tasks:
                return sample.turns
            first = sample.turns[0]
            question = self.templates.apply(task, first.text, style, rng)
            return (Message("user", question, first.media), *sample.turns[1:])
        templates = self.templates or Templates.load()
        if task not in templates.tasks:
            raise DataError(
                f"{self.name}: sample {sample.id!r} has captions but no turns, and task {task!r} has no template for "
                f"a request; known tasks are {', '.join(templates.tasks)}"
            )
        request = templates.apply(task, "", style, rng)
        return (Message("user", request, sample.modalities), Message("assistant", _choose(sample.captions, rng)))

    def _load(self, medium: Medium, rng: np.random.Generator) -> Any:
        if not self.samples.allow_outside:
            check_inside(medium.path, self.samples.root)
        if self.features is not None and (found := self.features.find(medium)) is not None:
            return found
        if medium.modality not in self.processors:
            section = SECTIONS[medium.modality]
            raise DataError(f"{self.name}: {section} is not set, so {medium.modality} cannot be read")
        return self.processors[medium.modality](media_content(medium), rng=rng if self.train else None)

    def _rng(self, index: int, epoch: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), index, epoch, stream])


class SplitDataset(torch.utils.data.ConcatDataset):
    """The sources of one split (one per modality or data set), as the single data set that LAVIS expects.

    ``ratio`` is the data set's share of the steps, in any unit; None: its share of all samples.
    """

    def __init__(self, name: str, sources: list[SampleDataset], ratio: float | None = None) -> None:
        super().__init__(sources)
        self.name, self.sources, self.ratio = name, sources, ratio

    def set_features(self, features: FeatureStore | None) -> None:
        """Use a store's features for the media that it contains."""
        for source in self.sources:
            source.features = features

    def set_template(self, template: Any) -> None:
        """Make the prompts of every source's conversations by the model's template (`models.templates`)."""
        for source in self.sources:
            source.chat_prompt = template.prompt

    def collater(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """LAVIS's name for `collate`."""
        return collate(items)


def collate(items: Sequence[Mapping[str, Any]], source: str = "") -> dict[str, Any]:
    """Make a batch of items of one source: key -> list, because samples differ in their numbers of media and frames.

    In a batch, ``source`` is one string. Pass ``source`` for an empty batch (all media were unreadable).
    """
    sources = {item["source"] for item in items} or {source}
    if len(sources) > 1:
        raise DataError(f"items of one batch come from different sources: {', '.join(sorted(sources))}")
    keys = [key for key in items[0] if key != "source"] if items else ITEM_KEYS  # evaluation adds ``index``
    return {key: [item[key] for item in items] for key in keys} | {"source": sources.pop()}


def media_content(medium: Medium) -> str | bytes:
    """A processor's input: the path, or the bytes of a medium inside a shard."""
    if medium.offset is None or medium.size is None:
        return medium.path
    try:
        with open(medium.path, "rb") as shard:
            shard.seek(medium.offset)
            content = shard.read(min(medium.size, os.fstat(shard.fileno()).st_size))  # a wrong size may exceed memory
    except OSError as error:
        raise MediaError(medium.path, error.strerror or error) from error
    if len(content) < medium.size:
        raise MediaError(medium.path, f"ends before byte {medium.offset + medium.size}, the end of a medium")
    return content


def _choose(texts: Sequence[str], rng: np.random.Generator | None) -> str:
    return texts[0] if rng is None or len(texts) == 1 else texts[int(rng.integers(len(texts)))]
