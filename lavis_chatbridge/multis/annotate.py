"""The first stage: every item's frames and sounds shown to the annotators, their findings merged with what people
wrote.

Runs may be spread over processes and machines: each takes the items of its rank. Finished items are never done again,
also not by a run with another number of processes. This module knows annotators by their protocol only.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lavis_chatbridge import media
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.files import write_text
from lavis_chatbridge.multis.annotation import Annotation, Frame, from_json, json_lines
from lavis_chatbridge.multis.annotators.base import Annotator, Findings, View
from lavis_chatbridge.multis.annotators.models import RATE
from lavis_chatbridge.multis.journal import Journal, read_journal
from lavis_chatbridge.schema import check_inside, media_path

FRAMES_PER_VIDEO = 3
_OF_SAMPLES_ONLY = ("turns", "answers", "style", "task", "held_out", "meta")
"""Fields of the sample schema that an annotation has no use for: a file of samples serves as items, too."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnnotateReport:
    """What a run did: items annotated now, items found finished, items whose media cannot be read."""

    annotated: int
    known: int
    failed: int


def annotate(
    items: str | Path,
    folder: str | Path,
    annotators: Sequence[Annotator],
    media_root: str | Path | None = None,
    rank: int = 0,
    world: int = 1,
) -> AnnotateReport:
    """Annotate the items of one rank.

    Args:
        items: JSON lines: ``id``, ``media``, and whatever is known already (``captions``, ``sound_captions``, ``tags``,
            ``frames``, ``facts`` ...); the captions of an item with sound only are taken as ``sound_captions``.
        folder: Gets ``annotations-RANK-of-WORLD.jsonl`` and ``failures-RANK-of-WORLD.jsonl``.
        annotators: Run in order; a later one adds to what an earlier one wrote and replaces captions.
        media_root: What the media's paths are relative to; by default the folder of ``items``.
        rank: This process.
        world: Number of processes.

    Raises:
        DataError: If ``items`` is not of that form, or holds an id twice.
    """
    folder, root = Path(folder), Path(media_root) if media_root is not None else Path(items).parent
    done = finished(folder)
    annotated = known = failed = 0
    name = f"{rank:05d}-of-{world:05d}.jsonl"
    with Journal(folder / f"annotations-{name}") as journal:
        failures = []
        for item in _read_items(items):
            if zlib.crc32(item.id.encode()) % world != rank:
                continue
            if item.id in done:
                known += 1
                continue
            try:
                journal.append(annotate_item(item, annotators, root).to_json())
                annotated += 1
            except MediaError as error:
                _logger.warning("item %s is left out: %s", item.id, error)
                failures.append({"id": item.id, "reason": str(error)})
                failed += 1
    _write_failures(folder / f"failures-{name}", failures)
    return AnnotateReport(annotated, known, failed)


def annotate_item(item: Annotation, annotators: Sequence[Annotator], root: Path) -> Annotation:
    """One item, with what the annotators find.

    Raises:
        MediaError: If a medium cannot be opened, or lies outside the media root.
    """
    for medium in item.media:
        try:
            check_inside(media_path(medium.path, str(root), item.id), str(root))
        except DataError as error:
            raise MediaError(medium.path, error) from error
    frames = frame_views(item, root) if any(annotator.kind == "frame" for annotator in annotators) else []
    sounds = sound_views(item, root) if any(annotator.kind == "sound" for annotator in annotators) else []
    merged = item.frames or tuple(Frame(view.position) for view in frames)
    if frames and len(merged) != len(frames):
        raise DataError(f"item {item.id!r} brings {len(merged)} frames of its own, expected {len(frames)}")
    item = dataclasses.replace(item, frames=merged)
    for annotator in annotators:
        views = frames if annotator.kind == "frame" else sounds
        if views:
            item = _merge(item, annotator.name, annotator.kind, annotator.annotate(views))
    return item


def frame_views(item: Annotation, root: Path) -> list[View]:
    """The image, or three frames of the video: the middles of its thirds."""
    views: list[View] = []
    for medium in item.media:
        if medium.type == "image":
            load = functools.partial(media.open_image, root / medium.path)
            views.append(View(item.id, "frame", medium.path, load, len(views)))
        elif medium.type == "video":
            clip = _Clip(root / medium.path)
            for number in range(FRAMES_PER_VIDEO):
                position = (2 * number + 1) / (2 * FRAMES_PER_VIDEO)
                load = functools.partial(clip.frame, number)
                views.append(View(item.id, "frame", medium.path, load, len(views), round(position, 4)))
    return views


def sound_views(item: Annotation, root: Path) -> list[View]:
    """The item's sounds."""
    paths = [medium.path for medium in item.media if medium.type == "audio"]
    loads = [functools.partial(media.open_audio, root / path, rate=RATE) for path in paths]
    return [
        View(item.id, "sound", path, load, number) for number, (path, load) in enumerate(zip(paths, loads, strict=True))
    ]


def finished(folder: str | Path) -> set[str]:
    """The ids that any run into this folder has annotated."""
    return {
        str(record["id"])
        for file in sorted(Path(folder).glob("annotations-*.jsonl"))
        for record in read_journal(file)
        if "id" in record
    }


class _Clip:
    """The frames of a video, decoded together when the first is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._frames: np.ndarray | None = None

    def frame(self, number: int) -> np.ndarray:
        if self._frames is None:
            self._frames = media.open_video(self._path, _middles)
        return self._frames[number]


def _middles(count: int) -> list[int]:
    return [(2 * number + 1) * count // (2 * FRAMES_PER_VIDEO) for number in range(FRAMES_PER_VIDEO)]


def _merge(item: Annotation, author: str, kind: str, findings: list[Findings]) -> Annotation:
    written = dict(item.written_by)

    def sign(part: str) -> None:
        written[part] = f"{written[part]}, {author}" if part in written and author not in written[part] else author

    if kind == "sound":
        for found in findings:
            if found.tags:
                sign("tags")
            if found.sound_captions:
                sign("sound_captions")
        tags = (*item.tags, *(tag for found in findings for tag in found.tags))
        captions = (*item.sound_captions, *(text for found in findings for text in found.sound_captions))
        return dataclasses.replace(item, tags=tags, sound_captions=captions, written_by=written)
    frames = []
    for frame, found in zip(item.frames, findings, strict=True):
        for part in ("caption", "regions", "semantics"):
            if getattr(found, part):
                sign(f"frames.{part}")
        frames.append(
            dataclasses.replace(
                frame,
                caption=found.caption or frame.caption,
                regions=(*frame.regions, *found.regions),
                semantics=(*frame.semantics, *found.semantics),
            )
        )
    return dataclasses.replace(item, frames=tuple(frames), written_by=written)


def _read_items(path: str | Path) -> Iterator[Annotation]:
    seen: set[str] = set()
    for number, values in json_lines(Path(path)):
        known = {key: value for key, value in values.items() if key not in _OF_SAMPLES_ONLY}
        item = _with_authors(from_json(known, f"{path}:{number}"))
        if item.id in seen:
            raise DataError(f"{path}:{number}: the id {item.id!r} stands in the file twice")
        seen.add(item.id)
        yield item


def _with_authors(item: Annotation) -> Annotation:
    """Captions of a sound go where sounds are described; what the item brings is signed."""
    if {medium.type for medium in item.media} == {"audio"} and item.captions:
        item = dataclasses.replace(item, captions=(), sound_captions=(*item.captions, *item.sound_captions))
    written = {part: "human" for part in ("captions", "sound_captions", "tags") if getattr(item, part)}
    written |= {"frames": "the item's own"} if item.frames else {}
    return dataclasses.replace(item, written_by={**written, **item.written_by})


def _write_failures(path: Path, failures: list[dict[str, str]]) -> None:
    if failures:
        write_text(path, "".join(json.dumps(failure) + "\n" for failure in failures))
    else:
        path.unlink(missing_ok=True)
