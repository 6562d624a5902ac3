"""Annotations that were made elsewhere: JSON of GRIT (region captions), Semantic-SAM / Semantic-Segment-Anything
(masks with class names), and of anything that writes captions or tags.

Accepted forms, all of them keyed by the view (see `_keys_of`):

- one JSON object: key -> entries;
- a JSON list, or JSON lines, of records that name their image (``image``, ``file_name``, ``image_id`` or ``id``),
  either one record per region (COCO results) or one per image with a list under ``annotations``, ``regions`` or
  ``predictions``;
- a folder with one such JSON per image, named by the key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.multis.annotation import Box, Region, Semantic, Tag
from lavis_chatbridge.multis.annotators.base import Findings, View, ViewKind
from lavis_chatbridge.schema import check_inside, media_path

Form = Literal["grit", "semantic_sam", "captions", "sound_captions", "tags"]
_SOUND_FORMS = ("sound_captions", "tags")
_LONGEST_PATH = 4096
_IMAGE_KEYS = ("image", "file_name", "image_id", "id", "video_id", "audio_id")
_LIST_KEYS = ("annotations", "regions", "predictions", "instances", "captions", "tags")
_REGION_TEXT = ("description", "caption", "object_description", "object_descriptions", "text", "phrase")
_CLASS_NAME = ("class_name", "label", "category", "category_name", "name", "tag")


class Imported:
    """An annotator that looks up what somebody else's model wrote.

    Args:
        path: A JSON or JSONL file, or a folder of JSON files.
        form: Whose form it has.
        largest: Regions, classes or tags kept per view: those of the best score or largest share. Of the captions of a
            sound the first ones are kept, of those of a frame the first.
        least_score: Regions and tags below are dropped.

    Raises:
        DataError: If the file is absent or of another form.
    """

    kind: ViewKind

    def __init__(self, path: str | Path, form: Form, largest: int = 12, least_score: float = 0.0) -> None:
        self._path, self._form, self._largest, self._least = Path(path), form, largest, least_score
        self.name = f"{form} import {self._path.name}"
        self.kind = "sound" if form in _SOUND_FORMS else "frame"
        self._entries: dict[str, Any] | None = None if self._path.is_dir() else _by_key(self._path)
        if self._path.is_dir() and not any(self._path.rglob("*.json")):
            raise DataError(f"{self._path}: holds no JSON file")

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """What the file says about each view; nothing where it does not know it."""
        return [self._findings(view) for view in views]

    def _findings(self, view: View) -> Findings:
        record = self._find(view)
        if record is None:
            return Findings()
        try:
            return self._read(record, view)
        except DataError:
            raise  # it says more than what follows
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise DataError(
                f"{self._path}: what it says of {view.item!r:.80} has not the form {self._form!r}"
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
        """The file of a key, if there is one: what an item is called leads to no other folder."""
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


def _keys_of(view: View) -> Iterable[str]:
    """The names under which a view may be found: item and frame number, then the medium's own file name."""
    yield from (f"{view.item}/{view.number}", f"{view.item}_{view.number}", f"{view.item}_frame{view.number}")
    if view.number == 0:
        path = PurePosixPath(view.path)
        bare = str(path.with_suffix("")) if path.name else view.path
        yield from dict.fromkeys((view.item, view.path, bare, path.name, path.stem))


def _load(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
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
            raise DataError(
                f"{file}: a record names no image (expected one of {', '.join(_IMAGE_KEYS)}): {record!r:.80}"
            )
        if any(isinstance(record.get(name), list) for name in _LIST_KEYS):
            found[key] = record
        else:
            regions = found.setdefault(key, [])
            if not isinstance(regions, list):
                raise DataError(f"{file}: {key!r:.80} has one record with a list and others without")
            regions.append(record)
    return found


def _key_in(record: Any) -> str | None:
    if not isinstance(record, dict):
        return None
    for name in _IMAGE_KEYS:
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
    """Width and height of the frame on which pixel boxes are based: as the record states them, else of the frame."""
    holders = [record, record.get("image")] if isinstance(record, dict) else _entries_of(record)[:1]
    for holder in holders:
        if isinstance(holder, dict):
            if holder.get("width") and holder.get("height"):
                return float(holder["width"]), float(holder["height"])
            size = (
                (holder.get("segmentation") or {}).get("size") if isinstance(holder.get("segmentation"), dict) else None
            )
            if size:
                return float(size[1]), float(size[0])  # COCO's run-length code: [height, width]
    height, width = view.content.shape[:2]
    return float(width), float(height)


def _box(entry: Mapping[str, Any], size: tuple[float, float]) -> Box | None:
    """``box`` is (left, top, right, bottom), as GRIT gives it; ``bbox`` is COCO's (left, top, width, height)."""
    if entry.get("box") is not None:
        left, top, right, bottom = (float(value) for value in entry["box"])
    elif entry.get("bbox") is not None:
        left, top, right, bottom = (float(value) for value in entry["bbox"])
        right, bottom = left + right, top + bottom
    else:
        return None
    width, height = (1.0, 1.0) if max(left, top, right, bottom) <= 1.0 else size
    scaled = (left / width, top / height, right / width, bottom / height)
    return tuple(round(min(1.0, max(0.0, value)), 4) for value in scaled)


def _regions(entries: Iterable[Any], size: tuple[float, float]) -> Iterable[Region]:
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        text = _first(entry, _REGION_TEXT)
        if text:
            score = entry.get("score", entry.get("logits"))
            try:
                yield Region(text, _box(entry, size), None if score is None else round(float(score), 4))
            except (TypeError, ValueError) as error:
                raise DataError(f"a region has no box of four numbers: {entry!r:.120}") from error


def _semantics(entries: Iterable[Any], size: tuple[float, float], largest: int) -> tuple[Semantic, ...]:
    shares: dict[str, float] = {}
    for entry in entries:
        name = _first(entry, _CLASS_NAME) if isinstance(entry, dict) else None
        if not name:
            continue
        area = float(entry.get("area") or 0.0)
        shares[name] = shares.get(name, 0.0) + (area if 0 < area <= 1 else area / (size[0] * size[1]))
    order = sorted(shares, key=lambda name: -shares[name])[:largest]
    # Masks may overlap (parts of a thing and the thing), so a class may sum to more than the frame.
    return tuple(Semantic(name, round(min(1.0, shares[name]), 4) or None) for name in order)


def _captions(record: Any) -> tuple[str, ...]:
    """The texts of a record: a text, or a list of texts or of objects that hold one each, or an object with either."""
    if isinstance(record, dict):
        record = record.get("captions") or record.get("caption") or record.get("text") or []
    texts = (entry if isinstance(entry, str) else _caption_of(entry) for entry in _entries_of(record))
    return tuple(text.strip() for text in texts if text.strip())


def _caption_of(entry: Any) -> str:
    text = _first(entry, ("caption", "text")) if isinstance(entry, dict) else None
    if text is None:
        raise DataError(f"a caption is a text, or an object with `caption` or `text`, found {entry!r:.120}")
    return text


def _tag(entry: Any) -> Tag | None:
    if isinstance(entry, str):
        return Tag(entry)
    if isinstance(entry, (list, tuple)) and entry:
        return Tag(str(entry[0]), float(entry[1]) if len(entry) > 1 else None)
    name = _first(entry, _CLASS_NAME) if isinstance(entry, dict) else None
    return Tag(name, None if entry.get("score") is None else float(entry["score"])) if name else None


def _first(entry: Mapping[str, Any], names: Sequence[str]) -> str | None:
    for name in names:
        value = entry.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None
