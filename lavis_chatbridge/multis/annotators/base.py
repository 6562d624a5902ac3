"""The protocol of annotators: what they are given and what they return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from lavis_chatbridge.errors import ChatBridgeError
from lavis_chatbridge.multis.annotation import Region, Semantic, Tag

ViewKind = Literal["frame", "sound"]


@dataclass
class View:
    """One thing to look at or to listen to.

    Args:
        item: The item's id.
        kind: ``"frame"`` or ``"sound"``.
        path: The medium's path as the item names it.
        number: The how-many-th frame of the item, from 0.
        position: Where in the clip, from 0 to 1.
        load: Opens the medium.
    """

    item: str
    kind: ViewKind
    path: str
    load: Callable[[], np.ndarray]
    number: int = 0
    position: float = 0.0

    @cached_property
    def content(self) -> np.ndarray:
        """A frame as uint8 ``[H, W, 3]``, or a sound as float32 ``[S]``, mono at 16 kHz; opened on first use.

        Raises:
            MediaError: If it cannot be opened.
        """
        return self.load()


@dataclass(frozen=True)
class Findings:
    """What an annotator says about a view; parts that it does not write stay empty."""

    caption: str = ""
    regions: tuple[Region, ...] = ()
    semantics: tuple[Semantic, ...] = ()
    sound_captions: tuple[str, ...] = ()
    tags: tuple[Tag, ...] = ()


class Annotator(Protocol):
    """An annotator.

    Attributes:
        name: Recorded as the author: what it is and whose weights it runs.
        kind: Which views it takes.
    """

    name: str
    kind: ViewKind

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """One finding per view, in order. The views of a call belong to one item."""
        ...


class WeightsError(ChatBridgeError):
    """An annotator's weights are absent or are not what it needs."""
