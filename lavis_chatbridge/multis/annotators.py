"""Annotators: models of transformers, and files of other tools. Each maps views to findings.

``chatbridge multis annotate --with NAME=PATH[,option=value...]`` builds one by its name in :data:`ANNOTATORS`. A
model's path is a folder or a hub id, as in transformers' pipelines.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

import numpy as np
import yaml

from lavis_chatbridge.config import unknown_key
from lavis_chatbridge.errors import CheckpointError, ConfigError, DataError
from lavis_chatbridge.multis.annotation import Box, Region, Semantic, Tag, json_objects

RATE = 16_000
"""Sampling rate of sound views in Hz."""
ViewKind = Literal["frame", "sound"]
_DENSE_CAPTIONS = "<DENSE_REGION_CAPTION>"
_RECORD_KEYS = ("image", "file_name", "image_id", "id", "video_id", "audio_id")
_LIST_KEYS = ("annotations", "regions", "predictions", "captions", "tags")
_TEXT_KEYS = ("description", "caption", "object_description", "object_descriptions", "text", "phrase")
_LABEL_KEYS = ("class_name", "label", "category", "category_name", "name", "tag")


@dataclass
class View:
    """One frame or sound of an item."""

    item: str
    kind: ViewKind
    path: str
    """The medium's path in the item."""
    load: Callable[[], np.ndarray]
    number: int = 0
    """Index among the item's views of this kind."""
    position: float = 0.0
    """Position in the clip, from 0 to 1."""

    @cached_property
    def content(self) -> np.ndarray:
        """A frame as uint8 ``[H, W, 3]``, or a sound as float32 ``[S]``, mono at 16 kHz.

        Raises:
            MediaError: If the medium cannot be opened.
        """
        return self.load()


@dataclass(frozen=True)
class Findings:
    """An annotator's output for one view; fields that it does not write are empty."""

    caption: str = ""
    regions: tuple[Region, ...] = ()
    semantics: tuple[Semantic, ...] = ()
    sound_captions: tuple[str, ...] = ()
    tags: tuple[Tag, ...] = ()


class Annotator(Protocol):
    """``name`` is recorded as the author; ``kind`` is the type of views that it accepts."""

    name: str
    kind: ViewKind

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """Return one finding for each view. The views of a call belong to one item."""
        ...


def _pipeline(task: str, path: str, device: str, dtype: str) -> Any:
    from transformers import pipeline

    build: Any = pipeline
    try:
        return build(task, model=str(path), device=device, dtype=dtype)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} cannot be loaded for {task}: {reason}") from error


def _pictures(views: Sequence[View]) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(view.content) for view in views]


class Captioner:
    """Captions of frames by a model such as ``Salesforce/blip2-opt-2.7b-coco``.

    Raises:
        CheckpointError: If the model cannot be loaded.
    """

    kind: ViewKind = "frame"

    def __init__(self, path: str, device: str = "cpu", dtype: str = "float32", prompt: str = "", max_tokens: int = 40):
        self.name, self._prompt, self._max_tokens = f"captioner {Path(path).name}", prompt, max_tokens
        self._run = _pipeline("image-text-to-text", path, device, dtype)

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """Caption each frame."""
        found = []
        for picture in _pictures(views):
            said = self._run(picture, text=self._prompt, max_new_tokens=self._max_tokens)
            found.append(Findings(caption=said[0]["generated_text"].removeprefix(self._prompt).strip()))
        return found


class Florence2Regions:
    """Captions of regions by Florence-2 (``florence-community/Florence-2-base``).

    Raises:
        CheckpointError: If the model cannot be loaded.
    """

    kind: ViewKind = "frame"

    def __init__(
        self, path: str, device: str = "cpu", dtype: str = "float32", largest: int = 12, max_tokens: int = 512
    ):
        self.name, self._largest, self._max_tokens = f"florence2 {Path(path).name}", largest, max_tokens
        self._run = _pipeline("image-text-to-text", path, device, dtype)

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """Caption the regions of each frame."""
        processor, model = self._run.processor, self._run.model
        found = []
        for picture in _pictures(views):
            batch = processor(text=_DENSE_CAPTIONS, images=picture, return_tensors="pt").to(model.device, model.dtype)
            tokens = model.generate(**batch, max_new_tokens=self._max_tokens)
            text = processor.batch_decode(tokens, skip_special_tokens=False)[0]
            parsed = processor.post_process_generation(text, task=_DENSE_CAPTIONS, image_size=picture.size)
            parsed = parsed[_DENSE_CAPTIONS]
            entries = [
                {"box": box, "text": label}
                for box, label in zip(parsed["bboxes"], parsed["labels"], strict=True)
                if label.strip()
            ]
            found.append(Findings(regions=tuple(_regions(entries, picture.size))[: self._largest]))
        return found


class Segmenter:
    """Classes of a frame and the share that each covers (``nvidia/segformer-b0-finetuned-ade-512-512``).

    Raises:
        CheckpointError: If the model cannot be loaded.
    """

    kind: ViewKind = "frame"

    def __init__(
        self, path: str, device: str = "cpu", dtype: str = "float32", largest: int = 12, least_share: float = 0.01
    ) -> None:
        self.name, self._largest, self._least = f"segmenter {Path(path).name}", largest, least_share
        self._run = _pipeline("image-segmentation", path, device, dtype)

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """Return the classes of each frame, the largest first."""
        found = []
        for picture in _pictures(views):
            masks = self._run(picture, subtask="semantic")
            areas = [(one["label"].split(",")[0], float(np.asarray(one["mask"]).mean() / 255)) for one in masks]
            kept = sorted((a for a in areas if a[1] >= self._least), key=lambda area: -area[1])[: self._largest]
            found.append(Findings(semantics=tuple(Semantic(label=n, share=round(s, 4)) for n, s in kept)))
        return found


class AudioTagger:
    """Sound events by a classifier such as ``MIT/ast-finetuned-audioset-10-10-0.4593``.

    Raises:
        CheckpointError: If the model cannot be loaded.
    """

    kind: ViewKind = "sound"

    def __init__(
        self, path: str, device: str = "cpu", dtype: str = "float32", largest: int = 5, least_score: float = 0.1
    ) -> None:
        self.name, self._largest, self._least = f"audio_tagger {Path(path).name}", largest, least_score
        self._run = _pipeline("audio-classification", path, device, dtype)

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """Return the tags of each sound, the surest first."""
        found = []
        for view in views:
            sound = {"raw": view.content, "sampling_rate": RATE}
            scores = self._run(sound, top_k=self._largest, function_to_apply="sigmoid")
            kept = [Tag(label=s["label"], score=round(s["score"], 4)) for s in scores if s["score"] >= self._least]
            found.append(Findings(tags=tuple(kept)))
        return found


class Imported:
    """Findings of another tool, in a JSON or JSONL file.

    The file is an object ``view -> entries``, or a list of records that name their view under ``image``, ``file_name``,
    ``image_id`` or ``id``, with their entries inside or one record for each entry (COCO results). A view is named
    ``ITEM/NUMBER``, ``ITEM_NUMBER``, by its item or by its file.

    Args:
        path: The file.
        form: The type of its entries.
        largest: Number of entries kept per view (best score or largest share; first captions).
        least_score: Regions and tags with a lower score are dropped.

    Raises:
        DataError: If the file cannot be read or has another form.
    """

    def __init__(
        self,
        path: str,
        form: Literal["grit", "semantic_sam", "captions", "sound_captions", "tags"],
        largest: int = 12,
        least_score: float = 0.0,
    ) -> None:
        self._path, self._form, self._largest, self._least = Path(path), form, largest, least_score
        self.name = f"{form} import {self._path.name}"
        self.kind: ViewKind = "sound" if form in ("sound_captions", "tags") else "frame"
        self._entries = _by_view(self._path)

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """Look up each view; a view that is not in the file has no findings."""
        return [self._findings(view) for view in views]

    def _findings(self, view: View) -> Findings:
        record = next((self._entries[key] for key in _view_names(view) if key in self._entries), None)
        if record is None:
            return Findings()
        try:
            return self._read(_listed(record), view)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise DataError(f"{self._path}: the entry of {view.item!r} is not of the form {self._form!r}") from error

    def _read(self, entries: list[Any], view: View) -> Findings:
        if self._form in ("captions", "sound_captions"):
            texts = [entry if isinstance(entry, str) else _first(entry, _TEXT_KEYS) for entry in entries]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("a caption is a text, or an object with `caption` or `text`")
            kept = tuple(str(text).strip() for text in texts if str(text).strip())
            return Findings(caption=kept[0] if kept else "") if self._form == "captions" else Findings(
                sound_captions=kept[: self._largest]
            )  # fmt: skip
        if self._form == "grit":
            return Findings(regions=self._best(_regions(entries, _frame_size(entries, view))))
        if self._form == "semantic_sam":
            return Findings(semantics=_semantics(entries, _frame_size(entries, view))[: self._largest])
        return Findings(tags=self._best(_tags(entries)))

    def _best(self, found: Iterable[Any]) -> tuple[Any, ...]:
        kept = [one for one in found if one.score is None or one.score >= self._least]
        return tuple(sorted(kept, key=lambda one: -(one.score or 0.0))[: self._largest])


ANNOTATORS: dict[str, Callable[..., Annotator]] = {
    "captioner": Captioner,
    "florence2": Florence2Regions,
    "segmenter": Segmenter,
    "audio_tagger": AudioTagger,
    "grit": functools.partial(Imported, form="grit"),
    "semantic_sam": functools.partial(Imported, form="semantic_sam"),
    "captions": functools.partial(Imported, form="captions"),
    "sound_captions": functools.partial(Imported, form="sound_captions"),
    "tags": functools.partial(Imported, form="tags"),
}
"""Name -> builder of an annotator from a path and options. Add an entry to register another one."""


def build_annotator(text: str) -> Annotator:
    """Build the annotator of ``NAME=PATH[,option=value...]``.

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
    for key, _, value in (pair.partition("=") for pair in pairs):
        if key not in known:
            raise ConfigError(unknown_key(key, known, f"annotators.{name}"))
        options[key] = yaml.safe_load(value)
    return ANNOTATORS[name](path, **options)


def _view_names(view: View) -> list[str]:
    names = [f"{view.item}/{view.number}", f"{view.item}_{view.number}"]
    path = PurePosixPath(view.path)
    return names + ([view.item, view.path, path.name, path.stem] if view.number == 0 else [])


def _by_view(file: Path) -> dict[str, Any]:
    """The entries of a file by the name of their view."""
    if file.suffix == ".jsonl":
        content: Any = [values for _, values in json_objects(file)]
    else:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"cannot read {file}: {error}") from error
    if isinstance(content, dict) and not any(key in content for key in _LIST_KEYS):
        return content
    found: dict[str, Any] = {}
    for record in content if isinstance(content, list) else [content]:
        key = next((record[k] for k in _RECORD_KEYS if record.get(k) is not None), None) if isinstance(
            record, dict
        ) else None  # fmt: skip
        key = key.get("file_name", key.get("image_id")) if isinstance(key, dict) else key  # SA-1B nests the image
        if key is None:
            raise DataError(f"{file}: a record has no view name (one of {', '.join(_RECORD_KEYS)}): {record!r:.80}")
        if any(isinstance(record.get(name), list) for name in _LIST_KEYS):
            found[str(key)] = record
        else:
            found.setdefault(str(key), []).append(record)
    return found


def _listed(record: Any) -> list[Any]:
    if isinstance(record, dict):
        inner = next((record[name] for name in _LIST_KEYS if isinstance(record.get(name), list)), [record])
        size = {k: record[k] for k in ("width", "height") if k in record} or record.get("image") or {}
        return [{**size, **entry} if isinstance(entry, dict) and isinstance(size, dict) else entry for entry in inner]
    return list(record) if isinstance(record, (list, tuple)) else [record]


def _frame_size(entries: Sequence[Any], view: View) -> tuple[float, float]:
    """Width and height in pixels that boxes refer to: from the first entry that has them, else of the frame."""
    for entry in entries:
        if isinstance(entry, dict) and entry.get("width") and entry.get("height"):
            return float(entry["width"]), float(entry["height"])
        if (
            isinstance(entry, dict)
            and isinstance(entry.get("segmentation"), dict)
            and entry["segmentation"].get("size")
        ):
            height, width = entry["segmentation"]["size"]  # COCO's run-length code
            return float(width), float(height)
    return float(view.content.shape[1]), float(view.content.shape[0])


def _box(entry: Mapping[str, Any], size: tuple[float, float]) -> Box | None:
    """``box`` is (left, top, right, bottom) as GRIT gives it; ``bbox`` is COCO's (left, top, width, height)."""
    if entry.get("box") is None and entry.get("bbox") is None:
        return None
    left, top, right, bottom = (float(value) for value in entry.get("box") or entry["bbox"])
    if entry.get("box") is None:
        right, bottom = left + right, top + bottom
    width, height = (1.0, 1.0) if max(left, top, right, bottom) <= 1.0 else size
    shares = (left / width, top / height, right / width, bottom / height)
    left, top, right, bottom = (round(min(1.0, max(0.0, share)), 4) for share in shares)
    return left, top, right, bottom


def _regions(entries: Iterable[Any], size: tuple[float, float]) -> Iterable[Region]:
    for entry in entries:
        if text := _first(entry, _TEXT_KEYS):
            score = entry.get("score", entry.get("logits"))
            yield Region(text=text, box=_box(entry, size), score=None if score is None else round(float(score), 4))


def _semantics(entries: Iterable[Any], size: tuple[float, float]) -> tuple[Semantic, ...]:
    shares: dict[str, float] = {}
    for entry in entries:
        if name := _first(entry, _LABEL_KEYS):
            area = float(entry.get("area") or 0.0)
            shares[name] = shares.get(name, 0.0) + (area if 0 < area <= 1 else area / (size[0] * size[1]))
    # Masks may overlap, so that a class may sum to more than the frame.
    ordered = sorted(shares, key=lambda name: -shares[name])
    return tuple(Semantic(label=name, share=round(min(1.0, shares[name]), 4) or None) for name in ordered)


def _tags(entries: Iterable[Any]) -> Iterable[Tag]:
    for entry in entries:
        if isinstance(entry, str):
            yield Tag(label=entry)
        elif isinstance(entry, (list, tuple)) and entry:
            yield Tag(label=str(entry[0]), score=float(entry[1]) if len(entry) > 1 else None)
        elif name := _first(entry, _LABEL_KEYS):
            yield Tag(label=name, score=None if entry.get("score") is None else float(entry["score"]))


def _first(entry: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first non-empty text under one of some keys; of a list its first element."""
    for name in names:
        value = entry.get(name)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None
