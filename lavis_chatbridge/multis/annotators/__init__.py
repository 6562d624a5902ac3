"""Annotators describe a frame or a sound in words: their protocol, and how a command line names them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import yaml

from lavis_chatbridge.config import unknown_key
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.multis.annotation import Region, Semantic, Tag

RATE = 16_000
"""Samples per second of the sounds that annotators get."""


@dataclass
class View:
    """One frame or sound of an item.

    Args:
        item: The item's id.
        path: The medium's path, as the item names it.
        load: Opens the medium.
        number: Which frame or sound of the item, from 0.
        position: Where in the clip, from 0 to 1.
    """

    item: str
    path: str
    load: Callable[[], np.ndarray]
    number: int = 0
    position: float = 0.0

    @cached_property
    def content(self) -> np.ndarray:
        """A frame as uint8 ``[H,W,3]``, or a sound as float32 ``[S]``, mono at 16 kHz; opened on first use.

        Raises:
            MediaError: If it cannot be opened.
        """
        return self.load()


class Findings(NamedTuple):
    """What an annotator says about a view; parts that it does not write stay empty."""

    caption: str = ""
    regions: tuple[Region, ...] = ()
    semantics: tuple[Semantic, ...] = ()
    sound_captions: tuple[str, ...] = ()
    tags: tuple[Tag, ...] = ()


class Annotator(Protocol):
    """An annotator.

    Attributes:
        name: Recorded as the author: the kind of model, and its weights.
        views: Which views it takes.
    """

    name: str
    views: Literal["frame", "sound"]

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """One finding per view, in order. The views of a call belong to one item."""
        ...


ANNOTATORS: dict[str, Callable[..., Annotator]] = {}
"""Annotators of your own: name -> a function from a path and options to the annotator."""


def _every() -> dict[str, Callable[..., Annotator]]:
    from lavis_chatbridge.multis.annotators import models
    from lavis_chatbridge.multis.annotators.imported import FORMS, Imported

    return {
        "blip2": models.Blip2Captioner,
        "lavis": models.LavisCaptioner,
        "florence2": models.Florence2Regions,
        "segmenter": models.Segmenter,
        "audio_tagger": models.AudioTagger,
        **{form: functools.partial(Imported, form=form) for form in FORMS},
        **ANNOTATORS,
    }


def build(text: str) -> Annotator:
    """The annotator that ``NAME=PATH[,option=value...]`` names.

    Raises:
        ConfigError: If the name or an option is unknown, or the path is missing.
    """
    every = _every()
    name, _, rest = text.partition("=")
    if name not in every:
        raise ConfigError(unknown_key(name, every, "annotators"))
    path, *pairs = rest.split(",")
    if not path:
        raise ConfigError(f"annotator {name!r} needs a path: {name}=PATH[,option=value...]")
    known = [key for key in inspect.signature(every[name]).parameters if key not in ("path", "form")]
    options: dict[str, Any] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in known:
            raise ConfigError(unknown_key(key, known, f"annotators.{name}"))
        options[key] = yaml.safe_load(value)
    return every[name](path, **options)
