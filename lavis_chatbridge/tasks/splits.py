"""Splits for evaluation: items with their index and, if requested, with another sample's media or none.

This module opens no media; it rearranges the items of a data set's sources.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.prompting.conversation import HUMAN
from lavis_chatbridge.prompting.pieces import Modality, Piece, Slot, Text
from lavis_chatbridge.tasks.settings import MediaMode, WithheldWords

_TRIES = 16


class Source(Protocol):
    """The interface of a data set's source."""

    name: str
    modalities: Collection[Modality]

    def __len__(self) -> int:
        """Number of samples."""

    def item(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """The ``index``-th sample, ready for the model."""

    def sample(self, index: int) -> Any:
        """The ``index``-th sample, without opening media; its ``files`` have ``modality``, ``path`` and ``offset``."""

    def pieces(self, sample: Any, rng: Any) -> list[Piece]:
        """The prompt of a sample."""


class EvaluationSource:
    """A source whose items have their position as ``index``, and possibly other media.

    Args:
        source: The original source.
        mode: ``normal``; ``shuffled``: every sample has another sample's media, the same ones in every run;
            ``withheld``: none, and the prompt has no slot for them.
        modalities: The modalities that are concerned.
        seed: Of the shuffling.
        words: What becomes of the words that introduce a withheld medium.
    """

    def __init__(
        self,
        source: Source,
        mode: MediaMode,
        modalities: Sequence[Modality],
        seed: int = 0,
        words: WithheldWords = "kept",
    ) -> None:
        self.source, self.mode, self.modalities = source, mode, tuple(modalities)
        self.seed, self.words = seed, words
        self.name = source.name

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "source" not in self.__dict__:  # asked while a data worker rebuilds this object
            raise AttributeError(name)
        return getattr(self.source, name)

    def item(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """The sample with its media replaced. Its own are always read, so that the same samples are scored.

        Raises:
            MediaError: If a medium cannot be read, or no other sample has as many media of these modalities.
        """
        item = self.source.item(index, epoch) | {"index": index}
        if self.mode == "withheld":
            return item | {"pieces": self._withheld(index, item)} | {modality: [] for modality in self.modalities}
        if self.mode == "shuffled":
            return item | self._media_of_another(index, epoch, item)
        return item

    def _withheld(self, index: int, item: dict[str, Any]) -> list[Piece]:
        """The prompt of a sample without its media."""
        if self.words == "kept":
            return [p for p in item["pieces"] if not (isinstance(p, Slot) and p.modality in self.modalities)]
        sample = self.source.sample(index)
        lost = [medium.modality for medium in sample.files if medium.modality in self.modalities]
        media = tuple(medium for medium in sample.media if medium.words or medium.modality not in self.modalities)
        spelt = {medium.modality for medium in sample.media if medium.words}
        turns = tuple(
            replace(turn, media=tuple(m for m in turn.media if m in spelt or m not in self.modalities))
            for turn in sample.turns
        )
        pieces = self.source.pieces(replace(sample, media=media, turns=turns), None)
        return told(pieces, lost) if self.words == "told" and lost else pieces

    def _media_of_another(self, index: int, epoch: int, item: dict[str, Any]) -> dict[str, list]:
        if not self._files(index):
            return {}
        for partner in itertools.islice(self._partners(index), _TRIES):
            with contextlib.suppress(MediaError):  # try the next sample
                found = self.source.item(partner, epoch)
                return {modality: found[modality] for modality in self.modalities}
        raise MediaError(
            f"another sample's media for {item['sample_id']!r}",
            f"{self.name} has no other readable sample with as many of each modality (run.media is shuffled)",
        )

    def _partners(self, index: int) -> Iterator[int]:
        """Samples with as many media per modality: first those that share no medium with this one, then the others."""
        own = self._files(index)
        others = np.random.default_rng([self.seed, index]).permutation(len(self.source) - 1)
        for fits in (set.isdisjoint, set.__ne__):
            for other in others:
                partner = int(other) + int(other >= index)
                files = self._files(partner)
                if _modalities(files) == _modalities(own) and fits(set(files), set(own)):
                    yield partner

    def _files(self, index: int) -> list[tuple]:
        """Modality, path and offset of each affected medium of a sample, without opening it."""
        files = self.source.sample(index).files
        return [(medium.modality, medium.path, medium.offset) for medium in files if medium.modality in self.modalities]


class EvaluationSplit:
    """The sources of one or several data sets of a split, for evaluation.

    Sources without media of the modalities that are withheld or exchanged are left out: nothing would change for them.
    The arguments are those of `EvaluationSource`.

    Raises:
        DataError: If no source has such media.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        mode: MediaMode = "normal",
        modalities: Sequence[Modality] = (),
        seed: int = 0,
        words: WithheldWords = "kept",
    ) -> None:
        concerned = [
            source for source in sources if mode == "normal" or set(source.modalities).intersection(modalities)
        ]
        if sources and not concerned:
            names = ", ".join(source.name for source in sources)
            raise DataError(f"run.media is {mode}, but {names} have no {' and no '.join(modalities)}")
        self.sources = [EvaluationSource(source, mode, modalities, seed, words) for source in concerned]

    def __len__(self) -> int:
        return sum(map(len, self.sources))


def told(pieces: Sequence[Piece], lost: Sequence[Modality]) -> list[Piece]:
    """A prompt that says which media are ``lost``, at the beginning of the first request after the others."""
    names = [f"the {modality}" for modality in dict.fromkeys(lost)]
    note = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing. "
    note = note[0].upper() + note[1:]
    first = max((i + 1 for i, piece in enumerate(pieces) if isinstance(piece, Slot)), default=0)
    for position in range(first, len(pieces)):
        piece = pieces[position]
        if isinstance(piece, Text) and not piece.target:
            text = piece.text.replace(HUMAN, HUMAN + note, 1) if HUMAN in piece.text else note + piece.text
            return [*pieces[:position], Text(text), *pieces[position + 1 :]]
    return [*pieces[:first], Text(note), *pieces[first:]]


def _modalities(files: Sequence[tuple]) -> Counter[str]:
    return Counter(modality for modality, *_ in files)
