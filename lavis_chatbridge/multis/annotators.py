"""Annotators: transformers models, and files of other tools. Each describes one frame or sound in text.

``chatbridge multis annotate --with NAME=PATH[,option=value...]`` builds one; :data:`ANNOTATORS` has the names. The path
of a model is a folder or a hub id, as in transformers' pipelines.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal, Protocol, get_args

import numpy as np
from PIL import Image
from pydantic import PositiveInt

from lavis_chatbridge.config import Settings, parse, unknown_key
from lavis_chatbridge.datasets.readers.common import is_list, object_rows, read_object
from lavis_chatbridge.errors import CheckpointError, ConfigError, DataError, one_line
from lavis_chatbridge.files import hash_of_file
from lavis_chatbridge.multis.annotation import Annotation, Region
from lavis_chatbridge.prompting.conversation import Modality

RATE = 16_000  # of sounds, in Hz
_LEAST_SHARE = 0.01  # of a frame: smaller classes are dropped
_LEAST_SCORE = 0.1  # of a sound tag
_DENSE_CAPTIONS = "<DENSE_REGION_CAPTION>"
_TEXT_KEYS = ("description", "caption", "object_descriptions", "text")
Form = Literal["grit", "semantic_sam", "captions"]


@dataclass
class View:
    """One frame (``"image"``) or sound (``"audio"``) of an item."""

    item: str
    modality: Modality
    path: str
    """The medium's path in the item."""
    content: np.ndarray
    """A frame as uint8 ``[H, W, 3]``, or a sound as float32 ``[S]``, mono at 16 kHz."""
    number: int = 0
    """Index of the view within its modality."""


@dataclass(frozen=True)
class Findings:
    """An annotator's output for one view; fields that it does not write are empty."""

    caption: str = ""
    regions: tuple[Region, ...] = ()
    semantics: Mapping[str, float] = field(default_factory=dict)
    sound_captions: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


class Annotator(Protocol):
    """``name`` is recorded as the author; ``modality`` is ``"image"`` for frames, ``"audio"`` for sounds."""

    name: str
    modality: Modality

    def annotate(self, view: View) -> Findings:
        """Describe a view."""
        ...


class Options(Settings):
    """The options after an annotator's path."""

    device: str = "cpu"
    """Device of a model."""
    dtype: str = "float32"
    """Precision of a model."""
    largest: PositiveInt | None = None
    """Maximum number of regions, classes or tags per view; null: 5 tags of a model, else 12."""

    @property
    def in_name(self) -> str:
        """The part of the annotator's name that tells other findings apart."""
        return f" largest={self.largest}" if self.largest else ""


class ModelAnnotator:
    """A transformers pipeline; a `CheckpointError` if the model cannot be loaded."""

    task: ClassVar[str] = "image-text-to-text"
    most: ClassVar[int] = 12
    modality: Modality = "image"

    def __init__(self, path: str, options: Options) -> None:
        from transformers import pipeline

        build: Any = pipeline
        self.name = f"{type(self).__name__.lower()} {Path(path).name}{options.in_name}"
        self.largest = options.largest or self.most
        try:
            self.run = build(self.task, model=path, device=options.device, dtype=options.dtype)
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, ImportError) as error:
            raise CheckpointError(f"{path} cannot be loaded for {self.task}: {one_line(error)}") from error


class Captioner(ModelAnnotator):
    """Captions of frames from a model such as ``Salesforce/blip2-opt-2.7b-coco``."""

    max_tokens = 40

    def annotate(self, view: View) -> Findings:
        written = self.run(Image.fromarray(view.content), text="", max_new_tokens=self.max_tokens)
        return Findings(caption=written[0]["generated_text"].strip())


class Florence2(ModelAnnotator):
    """Captions of regions from Florence-2 (``florence-community/Florence-2-base``)."""

    max_tokens = 512

    def annotate(self, view: View) -> Findings:
        picture, processor, model = Image.fromarray(view.content), self.run.processor, self.run.model
        batch = processor(text=_DENSE_CAPTIONS, images=picture, return_tensors="pt").to(model.device, model.dtype)
        tokens = model.generate(**batch, max_new_tokens=self.max_tokens)
        text = processor.batch_decode(tokens, skip_special_tokens=False)[0]
        parsed = processor.post_process_generation(text, task=_DENSE_CAPTIONS, image_size=picture.size)
        found = zip(parsed[_DENSE_CAPTIONS]["bboxes"], parsed[_DENSE_CAPTIONS]["labels"], strict=True)
        regions = [_region({"box": box, "text": label}, picture.size) for box, label in found if label.strip()]
        return Findings(regions=tuple(regions[: self.largest]))


class Segmenter(ModelAnnotator):
    """Classes of a frame and each one's share of its area (``nvidia/segformer-b0-finetuned-ade-512-512``)."""

    task = "image-segmentation"

    def annotate(self, view: View) -> Findings:
        masks = self.run(Image.fromarray(view.content), subtask="semantic")
        shares = {mask["label"].split(",")[0]: float(np.asarray(mask["mask"]).mean() / 255) for mask in masks}
        kept = {name: share for name, share in shares.items() if share >= _LEAST_SHARE}
        return Findings(semantics=_largest(kept, self.largest))


class AudioTagger(ModelAnnotator):
    """Sound events from a classifier such as ``MIT/ast-finetuned-audioset-10-10-0.4593``."""

    task, most = "audio-classification", 5
    modality: Modality = "audio"

    def annotate(self, view: View) -> Findings:
        sound = {"raw": view.content, "sampling_rate": RATE}
        scores = self.run(sound, top_k=self.largest, function_to_apply="sigmoid")
        return Findings(tags=tuple(found["label"] for found in scores if found["score"] >= _LEAST_SCORE))


class Imported:
    """Findings of another tool, from a JSON or JSONL file.

    The file is an object ``view -> entries``, or a list of entries, each with its view's name under ``image_id``,
    ``file_name`` or ``id`` (COCO results). A view's name is ``ITEM/NUMBER``; the first frame of an item may also be
    named by the item's id or file. Regions with the best scores and classes with the largest shares are kept.
    """

    modality: Modality = "image"

    def __init__(self, path: str, options: Options, form: Form) -> None:
        self._path, self._form, self._largest = path, form, options.largest or 12
        self._entries: dict[str, Any] = {}
        if not path.endswith(".jsonl") and not is_list(path):
            self._entries = dict(read_object(path).values)
        else:
            for row in object_rows(path):
                self._entries.setdefault(row.name("image_id", "file_name", "id"), []).append(row.values)
        # an edited file is another author
        self.name = f"{form} import {Path(path).name} {hash_of_file(path)[:8]}{options.in_name}"

    def unused(self, items: Iterable[Annotation]) -> list[str]:
        """The views of the file that belong to no item."""
        used = {
            name
            for item in items
            for medium in item.media
            for number in range({"image": 1, "video": 3, "audio": 0}[medium.type])
            for name in _view_names(item.id, medium.path, number)
        }
        return [name for name in self._entries if name not in used]

    def annotate(self, view: View) -> Findings:
        """The view's findings in the file; empty if the file does not contain the view."""
        names = _view_names(view.item, view.path, view.number)
        found: Any = next((self._entries[name] for name in names if name in self._entries), [])
        entries = found if isinstance(found, list) else [found]
        height, width = view.content.shape[:2]
        try:
            if self._form == "captions":
                return Findings(caption=next(map(_text, entries), ""))
            if self._form == "semantic_sam":
                shares: dict[str, float] = {}
                for entry in entries:
                    label = str(entry["class_name"])
                    shares[label] = shares.get(label, 0.0) + float(entry["area"]) / (width * height)
                return Findings(semantics=_largest(shares, self._largest))
            best = sorted(entries, key=lambda entry: -float(entry.get("score") or 0.0))[: self._largest]
            return Findings(regions=tuple(_region(entry, (width, height)) for entry in best))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise DataError(f"{self._path}: the entry of {view.item!r} is not of the form {self._form!r}") from error


ANNOTATORS: dict[str, Callable[[str, Options], Annotator]] = {
    "captioner": Captioner,
    "florence2": Florence2,
    "segmenter": Segmenter,
    "audio_tagger": AudioTagger,
    **{form: functools.partial(Imported, form=form) for form in get_args(Form)},
}
"""Name -> function that builds an annotator from a path and options. Add an entry to register another annotator."""


def build_annotator(text: str) -> Annotator:
    """Build the annotator of ``NAME=PATH[,option=value...]``; a `ConfigError` if a name or an option is unknown."""
    name, _, rest = text.partition("=")
    if name not in ANNOTATORS:
        raise ConfigError(unknown_key(name, ANNOTATORS, "annotators"))
    path, *pairs = rest.split(",")
    if not path:
        raise ConfigError(f"annotator {name!r} needs a path: {name}=PATH[,option=value...]")
    options = dict(pair.partition("=")[::2] for pair in pairs)
    return ANNOTATORS[name](path, parse(Options, options, f"annotators.{name}"))


def _view_names(item: str, path: str, number: int) -> list[str]:
    """The names that an imported file may have for a frame, the most specific first."""
    file = PurePosixPath(path)
    return [f"{item}/{number}", *([] if number else [item, str(file), file.name, file.stem])]


def _region(entry: Mapping[str, Any], size: tuple[int, int]) -> Region:
    """A region from an entry's ``box`` (left, top, right, bottom; GRIT) or ``bbox`` (left, top, width, height; COCO).

    Both are in pixels of a frame of ``size`` (width, height).
    """
    if "box" in entry:
        left, top, right, bottom = map(float, entry["box"])
    else:
        left, top, width, height = map(float, entry["bbox"])
        right, bottom = left + width, top + height
    shares = (left / size[0], top / size[1], right / size[0], bottom / size[1])
    left, top, right, bottom = (round(min(1.0, max(0.0, share)), 4) for share in shares)
    return Region(text=_text(entry), box=(left, top, right, bottom))


def _largest(shares: Mapping[str, float], count: int) -> dict[str, float]:
    """The ``count`` largest shares, at most 1: overlapping masks may sum to more than the frame."""
    names = sorted(shares, key=lambda name: -shares[name])[:count]
    return {name: round(min(1.0, shares[name]), 4) for name in names}


def _text(entry: str | Mapping[str, Any]) -> str:
    """``entry`` itself if it is a text; else the value of its first text key (of a list the first element)."""
    if isinstance(entry, str):
        return entry.strip()
    for key in _TEXT_KEYS:
        if value := entry.get(key):
            return str(value[0] if isinstance(value, list) else value).strip()
    raise LookupError(f"none of {', '.join(_TEXT_KEYS)}")
