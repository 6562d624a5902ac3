"""Annotations that other programs made, as JSON: region captions (GRIT), masks with class names (Semantic-SAM,
Semantic-Segment-Anything), captions and tags.

Accepted are, keyed by the view (see `_keys_of`):

- one JSON object: key -> entries;
- a JSON list, or JSON lines, of records that name their image (``image``, ``file_name``, ``image_id`` or ``id``),
  either one record per region (COCO results) or one per image with a list under ``annotations``, ``regions`` or
  ``predictions``;
- a folder with one such JSON per image, named by the key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.files import read_lines
from lavis_chatbridge.multis.annotation import Region, Semantic, Tag
from lavis_chatbridge.multis.annotators import Findings, View
from lavis_chatbridge.schema import check_inside, media_path

FORMS = ("grit", "semantic_sam", "captions", "sound_captions", "tags")
_LONGEST_PATH = 4096
_IMAGE_KEYS = ("image", "file_name", "image_id", "id", "video_id", "audio_id")
_LIST_KEYS = ("annotations", "regions", "predictions", "instances", "captions", "tags")
_REGION_TEXT = ("description", "caption", "object_description", "object_descriptions", "text", "phrase")
_CLASS_NAME = ("class_name", "label", "category", "category_name", "name", "tag")


class Imported:
    """An annotator that looks up what another program wrote.

    Args:
        path: A JSON or JSONL file, or a folder of JSON files.
        form: One of `FORMS`.
        largest: Regions, classes or tags kept per view, those of the best score or largest share; of a sound, its first
            captions. Of a frame, the first caption is kept.
        least_score: Regions and tags below are dropped.

    Raises:
        DataError: If the file is absent or does not have the form.
    """

    def __init__(self, path: str | Path, form: str, largest: int = 12, least_score: float = 0.0) -> None:
        self._path, self._form, self._largest, self._least = Path(path), form, largest, least_score
        self.name = f"{form} import {self._path.name}"
        self.views: Literal["frame", "sound"] = "sound" if form in ("sound_captions", "tags") else "frame"
        self._entries: dict[str, Any] | None = None if self._path.is_dir() else _by_key(self._path)
        if self._path.is_dir() and not any(self._path.rglob("*.json")):
            raise DataError(f"{self._path}: no JSON file in this folder")

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """What the file says about each view; nothing for those that it does not name."""
        return [self._findings(view) for view in views]

    def _findings(self, view: View) -> Findings:
        record = self._find(view)
        try:
            return Findings() if record is None else self._read(record, view)
        except DataError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise DataError(
                f"{self._path}: the record of {view.item!r:.80} is not of the form {self._form!r}"
            ) from error

    def _read(self, record: Any, view: View) -> Findings:
        if self._form == "captions":
            return Findings(caption=next(iter(_captions(record)), ""))
        if self._form == "sound_captions":
            return Findings(sound_captions=_captions(record)[: self._largest])
        entries = _entries_of(record)
        if self._form == "grit":
            return Findings(regions=self._best(list(_regions(entries, _frame_size(record, view)))))
        if self._form == "semantic_sam":
            return Findings(semantics=_semantics(entries, _frame_size(record, view), self._largest))
        return Findings(tags=self._best([tag for entry in entries if (tag := _tag(entry))]))

    def _find(self, view: View) -> Any:
        for key in _keys_of(view):
            if self._entries is not None and key in self._entries:
                return self._entries[key]
            if self._entries is None and (file := self._file(key)) is not None:
                return _load(file)
        return None

    def _file(self, key: str) -> Path | None:
        """The file of a key, if there is one; an item's id never leads to another folder."""
        try:
            name = media_path(f"{key}.json", str(self._path), self._form)
            name.encode()
            check_inside(name, str(self._path))
        except (DataError, UnicodeEncodeError):
            return None
        return Path(name) if len(name) < _LONGEST_PATH and os.path.isfile(name) else None

    def _best(self, found: list[Any]) -> tuple[Any, ...]:
        kept = [one for one in found if one.score is None or one.score >= self._least]
        kept.sort(key=lambda one: 0.0 if one.score is None else -one.score)
        return tuple(kept[: self._largest])


def _keys_of(view: View) -> Iterator[str]:
    """The names of a view: item and frame number, then item and file name."""
    yield from (f"{view.item}/{view.number}", f"{view.item}_{view.number}", f"{view.item}_frame{view.number}")
    if view.number == 0:
        path = PurePosixPath(view.path)
        bare = str(path.with_suffix("")) if path.name else view.path
        yield from (view.item, view.path, bare, path.name, path.stem)


def _load(file: Path) -> Any:
    try:
        if file.suffix == ".jsonl":
            return [json.loads(line) for _, line in read_lines(file) if line.strip()]
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def _by_key(file: Path) -> dict[str, Any]:
    content = _load(file)
    if isinstance(content, dict) and not any(key in content for key in _LIST_KEYS):
        return content
    found: dict[str, Any] = {}
    for record in content if isinstance(content, list) else [content]:
        key = _key_in(record)
        if key is None:
            raise DataError(f"{file}: a record names no image (expected {', '.join(_IMAGE_KEYS)}): {record!r:.80}")
        if any(isinstance(record.get(name), list) for name in _LIST_KEYS):
            found[key] = record
        elif isinstance(regions := found.setdefault(key, []), list):
            regions.append(record)
        else:
            raise DataError(f"{file}: {key!r:.80} has one record with a list and others without")
    return found


def _key_in(record: Any) -> str | None:
    for name in _IMAGE_KEYS if isinstance(record, dict) else ():
        value = record.get(name)
        if isinstance(value, dict):  # SA-1B: {"image": {"file_name": ..., "width": ..., "height": ...}}
            value = value.get("file_name", value.get("image_id"))
        if value is not None:
            return str(value)
    return None


def _entries_of(record: Any) -> list[Any]:
    if isinstance(record, dict):
        record = next((record[name] for name in _LIST_KEYS if isinstance(record.get(name), list)), [record])
    return list(record) if isinstance(record, (list, tuple)) else [record]


def _frame_size(record: Any, view: View) -> tuple[float, float]:
    """Width and height of the frame that boxes in pixels refer to: the record's, else the frame's own."""
    for holder in [record, record.get("image")] if isinstance(record, dict) else _entries_of(record)[:1]:
        if isinstance(holder, dict):
            if holder.get("width") and holder.get("height"):
                return float(holder["width"]), float(holder["height"])
            mask = holder.get("segmentation")
            if isinstance(mask, dict) and mask.get("size"):
                return float(mask["size"][1]), float(mask["size"][0])  # COCO's run-length code: [height, width]
    height, width = view.content.shape[:2]
    return float(width), float(height)


def _box(entry: Mapping[str, Any], size: tuple[float, float]) -> Any:
    """``box`` is (left, top, right, bottom), as GRIT writes it; ``bbox`` is COCO's (left, top, width, height)."""
    name = "box" if entry.get("box") is not None else "bbox"
    if entry.get(name) is None:
        return None
    left, top, right, bottom = (float(value) for value in entry[name])
    if name == "bbox":
        right, bottom = left + right, top + bottom
    width, height = (1.0, 1.0) if max(left, top, right, bottom) <= 1.0 else size
    scaled = (left / width, top / height, right / width, bottom / height)
    return tuple(round(min(1.0, max(0.0, value)), 4) for value in scaled)


def _regions(entries: list[Any], size: tuple[float, float]) -> Iterator[Region]:
    for entry in entries:
        text = _first(entry, _REGION_TEXT)
        if text:
            score = entry.get("score", entry.get("logits"))
            try:
                yield Region(text=text, box=_box(entry, size), score=None if score is None else round(float(score), 4))
            except (TypeError, ValueError) as error:
                raise DataError(f"a region has no box of four numbers: {entry!r:.120}") from error


def _semantics(entries: list[Any], size: tuple[float, float], largest: int) -> tuple[Semantic, ...]:
    shares: dict[str, float] = {}
    for entry in entries:
        name = _first(entry, _CLASS_NAME)
        if name:
            area = float(entry.get("area") or 0.0)
            shares[name] = shares.get(name, 0.0) + (area if 0 < area <= 1 else area / (size[0] * size[1]))
    order = sorted(shares, key=lambda name: -shares[name])[:largest]
    # Masks may overlap (a thing and its parts), so a class may sum to more than the frame.
    return tuple(Semantic(label=name, share=round(min(1.0, shares[name]), 4) or None) for name in order)


def _captions(record: Any) -> tuple[str, ...]:
    """The texts of a record: a text, a list of texts or of objects with one each, or an object with either."""
    if isinstance(record, dict):
        record = record.get("captions") or record.get("caption") or record.get("text") or []
    texts = []
    for entry in _entries_of(record):
        text = entry if isinstance(entry, str) else _first(entry, ("caption", "text"))
        if text is None:
            raise DataError(f"a caption is a text, or an object with `caption` or `text`, found {entry!r:.120}")
        texts.append(text.strip())
    return tuple(filter(None, texts))


def _tag(entry: Any) -> Tag | None:
    if isinstance(entry, str):
        return Tag(label=entry)
    if isinstance(entry, (list, tuple)) and entry:
        return Tag(label=str(entry[0]), score=float(entry[1]) if len(entry) > 1 else None)
    name = _first(entry, _CLASS_NAME)
    return Tag(label=name, score=None if entry.get("score") is None else float(entry["score"])) if name else None


def _first(entry: Any, names: Sequence[str]) -> str | None:
    for name in names if isinstance(entry, dict) else ():
        value = entry.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None
