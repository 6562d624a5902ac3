"""The samples of an evaluated split: with their media, another sample's (``shuffled``) or none (``withheld``)."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.prompting.conversation import HUMAN, Modality, Piece, Slot, Text
from lavis_chatbridge.schema import Medium, Sample
from lavis_chatbridge.tasks.settings import MediaSettings

_TRIES = 16


class Source(Protocol):
    """A data set's source: `datasets.dataset.SampleDataset`, which this floor cannot import."""

    name: str
    modalities: Collection[Modality]
    lengths: Sequence[int] | np.ndarray
    processors: Mapping[str, Any]

    def __len__(self) -> int: ...
    def item(self, index: int, epoch: int = 0) -> dict[str, Any]: ...
    def sample(self, index: int) -> Sample: ...
    def pieces(self, sample: Sample, rng: np.random.Generator | None) -> list[Piece]: ...
    def sample_hash(self, index: int) -> str: ...


class EvaluationSource:
    """A source whose items have their position as ``index``, and possibly other media: the same ones for a ``seed``."""

    def __init__(self, source: Source, replacement: MediaSettings, seed: int = 0) -> None:
        self.source, self.replacement, self.seed = source, replacement, seed
        self.name, self.lengths, self.sample = source.name, source.lengths, source.sample

    def __len__(self) -> int:
        return len(self.source)

    def item(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """The sample with its media replaced. Its own are always read, so that the same samples are scored.

        Raises:
            MediaError: If a medium cannot be read, or no other sample has as many media of these modalities.
        """
        item = self.source.item(index, epoch) | {"index": index}
        if self.replacement.media == "withheld":
            none: dict[str, list] = {modality: [] for modality in self.replacement.media_modalities}
            return item | {"pieces": self._without_media(index, item["pieces"])} | none
        if self.replacement.media == "shuffled" and (own := self._media(index)):
            return item | self._media_of_another(index, own, epoch)
        return item

    def _without_media(self, index: int, pieces: list[Piece]) -> list[Piece]:
        """The prompt of a sample without its media."""
        withheld, words = self.replacement.media_modalities, self.replacement.withheld_words
        if words == "kept":
            return [piece for piece in pieces if not (isinstance(piece, Slot) and piece.modality in withheld)]
        sample = self.source.sample(index)
        media = tuple(medium for medium in sample.media if medium.words or medium.modality not in withheld)
        shown = {medium.modality for medium in media}
        turns = tuple(replace(turn, media=tuple(m for m in turn.media if m in shown)) for turn in sample.turns)
        pieces = self.source.pieces(replace(sample, media=media, turns=turns), None)
        missing = [medium.modality for medium in self._media(index)]
        return with_notice(pieces, missing) if words == "told" and missing else pieces

    def _media_of_another(self, index: int, own: list[Medium], epoch: int) -> dict[str, list]:
        for partner in itertools.islice(self._partners(index, own), _TRIES):
            with contextlib.suppress(MediaError):  # try the next sample
                found = self.source.item(partner, epoch)
                return {modality: found[modality] for modality in self.replacement.media_modalities}
        raise MediaError(
            f"another sample's media for {self.source.sample(index).id!r}",
            f"{self.name} has no other readable sample with as many of each modality (run.media is shuffled)",
        )

    def _partners(self, index: int, own: list[Medium]) -> Iterator[int]:
        """Samples with as many media of each modality, none of them shared with this sample."""
        files = {(medium.path, medium.offset) for medium in own}
        wanted = Counter(medium.modality for medium in own)
        others = np.random.default_rng([self.seed, index]).permutation(len(self.source) - 1)
        for other in others.tolist():
            partner = other + (other >= index)
            media = self._media(partner)
            fits = Counter(medium.modality for medium in media) == wanted
            if fits and files.isdisjoint((medium.path, medium.offset) for medium in media):
                yield partner

    def _media(self, index: int) -> list[Medium]:
        """The media of a sample that are replaced."""
        return [m for m in self.source.sample(index).files if m.modality in self.replacement.media_modalities]


class EvaluationSplit:
    """The sources of a split for evaluation, without those that have no media to withhold or exchange."""

    def __init__(self, sources: Sequence[Source], how: MediaSettings, seed: int = 0) -> None:
        replaced = set(how.media_modalities)
        concerned = [source for source in sources if how.media == "normal" or replaced.intersection(source.modalities)]
        if sources and not concerned:
            names = ", ".join(source.name for source in sources)
            raise DataError(f"run.media is {how.media}, but {names} have no {' and no '.join(how.media_modalities)}")
        self.sources = [EvaluationSource(source, how, seed) for source in concerned]


def with_notice(pieces: Sequence[Piece], missing: Sequence[Modality]) -> list[Piece]:
    """A prompt with the notice that media are missing, at the beginning of the first request after the other media."""
    names = [f"the {modality}" for modality in dict.fromkeys(missing)]
    note = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing. ".capitalize()
    first = max((i + 1 for i, piece in enumerate(pieces) if isinstance(piece, Slot)), default=0)
    for position, piece in enumerate(pieces[first:], start=first):
        if isinstance(piece, Text) and not piece.target:
            text = piece.text.replace(HUMAN, HUMAN + note, 1) if HUMAN in piece.text else note + piece.text
            return [*pieces[:position], Text(text), *pieces[position + 1 :]]
    return [*pieces[:first], Text(note), *pieces[first:]]
