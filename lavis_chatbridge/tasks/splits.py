"""A split as evaluation sees it: every item with its place, and, to learn whether the model really uses its media, with
another sample's media or none.

This module opens nothing itself; it rearranges what a data set's sources return.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.prompting.pieces import Kind, Piece, Slot
from lavis_chatbridge.tasks.settings import MediaMode

_TRIES = 16


class Source(Protocol):
    """What this module needs of a data set's source."""

    name: str

    def __len__(self) -> int:
        """How many samples it has."""

    def item(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """The ``index``-th sample, ready for the model."""


class EvaluationSource:
    """A source whose items say where they stand (``index``), and may have lost their own media.

    Args:
        source: The source as it is.
        mode: ``normal``; ``shuffled``: every sample has another sample's media, the same ones in every run;
            ``withheld``: none, and the prompt has no slot for them.
        kinds: The kinds of media that are concerned.
        seed: Of the shuffling.

    Raises:
        DataError: If there is no other sample to take media from.
    """

    def __init__(self, source: Source, mode: MediaMode, kinds: Sequence[Kind], seed: int = 0) -> None:
        if mode == "shuffled" and len(source) < 2:
            raise DataError(f"run.media is shuffled, but {source.name!r} has a single sample")
        self.source, self.mode, self.kinds, self.seed = source, mode, tuple(kinds), seed
        self.name = source.name

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "source" not in self.__dict__:  # asked while a data worker rebuilds this object
            raise AttributeError(name)
        return getattr(self.source, name)

    def item(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """The sample with its media replaced.

        Raises:
            MediaError: If a medium cannot be read.
            DataError: If no other sample has as many media of these kinds.
        """
        item = self.source.item(index, epoch) | {"index": index}
        if self.mode == "withheld":
            return item | {"pieces": without(item["pieces"], self.kinds)} | {kind: [] for kind in self.kinds}
        if self.mode == "shuffled":
            return item | self._media_of_another(index, epoch, item)
        return item

    def _media_of_another(self, index: int, epoch: int, item: dict[str, Any]) -> dict[str, list]:
        wanted = {kind: len(item[kind]) for kind in self.kinds}
        if not any(wanted.values()):
            return {}
        others = np.random.default_rng([self.seed, index]).permutation(len(self.source) - 1)[:_TRIES]
        for other in others:
            found = self.source.item(int(other) + (int(other) >= index), epoch)
            if all(len(found[kind]) == count for kind, count in wanted.items()):
                return {kind: found[kind] for kind in self.kinds}
        raise DataError(
            f"{self.name}: no other sample has the media that {item['sample_id']!r} needs for run.media shuffled"
        )


class EvaluationSplit:
    """The sources of one or several data sets of a split, as evaluation sees them.

    Args:
        sources: All sources of the split.
        mode: What becomes of their media.
        kinds: The kinds of media that are concerned.
        seed: Of the shuffling.
    """

    def __init__(
        self, sources: Sequence[Source], mode: MediaMode = "normal", kinds: Sequence[Kind] = (), seed: int = 0
    ) -> None:
        self.sources = [EvaluationSource(source, mode, kinds, seed) for source in sources]

    def __len__(self) -> int:
        return sum(map(len, self.sources))


def without(pieces: Sequence[Piece], kinds: Sequence[Kind]) -> list[Piece]:
    """A prompt without the slots of some kinds."""
    return [piece for piece in pieces if not (isinstance(piece, Slot) and piece.kind in kinds)]
