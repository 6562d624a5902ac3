"""A split as evaluation sees it: every item with its place, and, to learn whether the model really uses its media, with
another sample's media or none.

This module opens nothing itself; it rearranges what a data set's sources return.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.prompting.pieces import Modality, Piece, Slot
from lavis_chatbridge.tasks.settings import MediaMode

_TRIES = 16


class Source(Protocol):
    """What this module needs of a data set's source."""

    name: str
    kinds: Collection[Modality]

    def __len__(self) -> int:
        """How many samples it has."""

    def item(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """The ``index``-th sample, ready for the model."""

    def sample(self, index: int) -> Any:
        """The ``index``-th sample itself, nothing opened; its ``files`` have ``kind``, ``path`` and ``offset``."""


class EvaluationSource:
    """A source whose items say where they stand (``index``), and may have lost their own media.

    Args:
        source: The source as it is.
        mode: ``normal``; ``shuffled``: every sample has another sample's media, the same ones in every run;
            ``withheld``: none, and the prompt has no slot for them.
        kinds: The kinds of media that are concerned.
        seed: Of the shuffling.
    """

    def __init__(self, source: Source, mode: MediaMode, kinds: Sequence[Modality], seed: int = 0) -> None:
        self.source, self.mode, self.kinds, self.seed = source, mode, tuple(kinds), seed
        self.name = source.name

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "source" not in self.__dict__:  # asked while a data worker rebuilds this object
            raise AttributeError(name)
        return getattr(self.source, name)

    def item(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """The sample with its media replaced. Its own are read in any case, so that the same samples are scored.

        Raises:
            MediaError: If a medium cannot be read, or no other sample has as many media of these kinds.
        """
        item = self.source.item(index, epoch) | {"index": index}
        if self.mode == "withheld":
            return item | {"pieces": without(item["pieces"], self.kinds)} | {kind: [] for kind in self.kinds}
        if self.mode == "shuffled":
            return item | self._media_of_another(index, epoch, item)
        return item

    def _media_of_another(self, index: int, epoch: int, item: dict[str, Any]) -> dict[str, list]:
        if not self._files(index):
            return {}
        for place in itertools.islice(self._partners(index), _TRIES):
            with contextlib.suppress(MediaError):  # another one's are as good
                found = self.source.item(place, epoch)
                return {kind: found[kind] for kind in self.kinds}
        raise MediaError(
            f"another sample's media for {item['sample_id']!r}",
            f"{self.name} has no other readable sample with as many of each kind (run.media is shuffled)",
        )

    def _partners(self, index: int) -> Iterator[int]:
        """Those with as many media of each kind: first those that share none with this one, then the others."""
        own = self._files(index)
        others = np.random.default_rng([self.seed, index]).permutation(len(self.source) - 1)
        for fits in (set.isdisjoint, set.__ne__):
            for other in others:
                place = int(other) + int(other >= index)
                files = self._files(place)
                if _kinds(files) == _kinds(own) and fits(set(files), set(own)):
                    yield place

    def _files(self, index: int) -> list[tuple]:
        """The media of a sample that are concerned, kind first; nothing is opened."""
        files = self.source.sample(index).files
        return [(medium.kind, medium.path, medium.offset) for medium in files if medium.kind in self.kinds]


class EvaluationSplit:
    """The sources of one or several data sets of a split, as evaluation sees them.

    Sources without media of the kinds that are taken away or exchanged are left out: nothing would change for them.

    Args:
        sources: All sources of the split.
        mode: What becomes of their media.
        kinds: The kinds of media that are concerned.
        seed: Of the shuffling.

    Raises:
        DataError: If no source has such media.
    """

    def __init__(
        self, sources: Sequence[Source], mode: MediaMode = "normal", kinds: Sequence[Modality] = (), seed: int = 0
    ) -> None:
        concerned = [source for source in sources if mode == "normal" or set(source.kinds).intersection(kinds)]
        if sources and not concerned:
            names = ", ".join(source.name for source in sources)
            raise DataError(f"run.media is {mode}, but {names} hold no {' and no '.join(kinds)}")
        self.sources = [EvaluationSource(source, mode, kinds, seed) for source in concerned]

    def __len__(self) -> int:
        return sum(map(len, self.sources))


def _kinds(files: Sequence[tuple]) -> Counter[str]:
    return Counter(kind for kind, *_ in files)


def without(pieces: Sequence[Piece], kinds: Sequence[Modality]) -> list[Piece]:
    """A prompt without the slots of some kinds."""
    return [piece for piece in pieces if not (isinstance(piece, Slot) and piece.kind in kinds)]
