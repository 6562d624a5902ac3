"""Annotators by name: ``NAME=PATH[,option=value...]`` on the command line, or classes that somebody else registers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import yaml

from lavis_chatbridge.config import unknown_key
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.multis.annotators.base import Annotator
from lavis_chatbridge.multis.annotators.imported import Imported
from lavis_chatbridge.multis.annotators.models import (
    AudioTagger,
    Blip2Captioner,
    Florence2Regions,
    LavisCaptioner,
    Segmenter,
)

ANNOTATORS: dict[str, Callable[..., Annotator]] = {
    "blip2": Blip2Captioner,
    "lavis": LavisCaptioner,
    "florence2": Florence2Regions,
    "segmenter": Segmenter,
    "audio_tagger": AudioTagger,
    "grit": functools.partial(Imported, form="grit"),
    "semantic_sam": functools.partial(Imported, form="semantic_sam"),
    "captions": functools.partial(Imported, form="captions"),
    "sound_captions": functools.partial(Imported, form="sound_captions"),
    "tags": functools.partial(Imported, form="tags"),
}
"""Name -> what builds the annotator from a path and options. Add to it to plug in one of your own."""


def build(text: str) -> Annotator:
    """The annotator that ``NAME=PATH[,option=value...]`` stands for.

    Raises:
        ConfigError: If the name or an option is unknown, or the path is missing.
    """
    name, equals, rest = text.partition("=")
    if name not in ANNOTATORS:
        raise ConfigError(unknown_key(name, ANNOTATORS, "annotators"))
    path, *pairs = rest.split(",")
    if not equals or not path:
        raise ConfigError(f"annotator {name!r} needs a path: {name}=PATH[,option=value...]")
    known = [key for key in inspect.signature(ANNOTATORS[name]).parameters if key not in ("path", "form")]
    options: dict[str, Any] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in known:
            raise ConfigError(unknown_key(key, known, f"annotators.{name}"))
        options[key] = yaml.safe_load(value)
    return ANNOTATORS[name](path, **options)
