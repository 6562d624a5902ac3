"""First stage: run the annotators on each item's frames and sounds, and merge their findings with human captions.

Several processes share the items by rank. Finished items are never annotated again, even with another number of
processes. This module knows only the annotators' protocol.
"""

from __future__ import annotations

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
from lavis_chatbridge.files import append_lines, write_text
from lavis_chatbridge.multis.annotation import Annotation, Frame, from_json, json_objects
from lavis_chatbridge.multis.annotators import RATE, Annotator, Findings, View
from lavis_chatbridge.schema import check_inside, media_path

FRAMES_PER_VIDEO = 3
_SAMPLE_FIELDS = ("turns", "answers", "style", "task", "held_out", "meta")
"""Fields of the sample schema that are ignored, so that a file of samples can be annotated."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnnotateReport:
    """Counts of items: annotated by this run, finished before, with unreadable media."""

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
        items: JSONL with ``id``, ``media`` and existing annotations (``captions``, ``sound_captions``, ``tags``,
            ``frames``, ``facts``). The captions of an item with only a sound count as ``sound_captions``.
        folder: Gets ``annotations-RANK-of-WORLD.jsonl`` and ``failures-RANK-of-WORLD.jsonl``.
        annotators: Run in order; a later one adds to an earlier one's findings and replaces its captions.
        media_root: Folder that media paths are relative to; by default that of ``items``.
        rank: This process.
        world: Number of processes.

    Raises:
        DataError: If ``items`` is malformed or contains an id twice.
    """
    folder, root = Path(folder), Path(media_root) if media_root is not None else Path(items).parent
    folder.mkdir(parents=True, exist_ok=True)
    done = finished(folder)
    name = f"{rank:05d}-of-{world:05d}.jsonl"
    annotated = known = 0
    failures = []
    for item in _read_items(items):
        if zlib.crc32(item.id.encode()) % world != rank:
            continue
        if item.id in done:
            known += 1
            continue
        try:
            record = annotate_item(item, annotators, root).to_json()
        except MediaError as error:
            _log.warning("item %s is left out: %s", item.id, error)
            failures.append(json.dumps({"id": item.id, "reason": str(error)}) + "\n")
            continue
        append_lines(folder / f"annotations-{name}", [json.dumps(record, ensure_ascii=False)])
        annotated += 1
    (folder / f"failures-{name}").unlink(missing_ok=True)
    if failures:
        write_text(folder / f"failures-{name}", "".join(failures))
    return AnnotateReport(annotated, known, len(failures))


def annotate_item(item: Annotation, annotators: Sequence[Annotator], root: Path) -> Annotation:
    """Add the annotators' findings to one item.

    Raises:
        MediaError: If a medium cannot be opened or lies outside the media root.
    """
    for medium in item.media:
        try:
            check_inside(media_path(medium.path, str(root), item.id), str(root))
        except DataError as error:
            raise MediaError(medium.path, error) from error
    frames = _frame_views(item, root) if any(annotator.kind == "frame" for annotator in annotators) else []
    sounds = _sound_views(item, root) if any(annotator.kind == "sound" for annotator in annotators) else []
    own = item.frames or tuple(Frame(position=view.position) for view in frames)
    if frames and len(own) != len(frames):
        raise DataError(f"item {item.id!r} already has {len(own)} frames, expected {len(frames)}")
    item = item.model_copy(update={"frames": own})
    for annotator in annotators:
        if views := frames if annotator.kind == "frame" else sounds:
            merge = _with_frames if annotator.kind == "frame" else _with_sounds
            item = merge(item, annotator.name, annotator.annotate(views))
    return item


def finished(folder: Path) -> set[str]:
    """Ids of the items that any run has annotated into this folder."""
    files = sorted(folder.glob("annotations-*.jsonl"))
    return {str(values["id"]) for file in files for _, values in json_objects(file)}


def _frame_views(item: Annotation, root: Path) -> list[View]:
    """The image, or three frames of the video: the middles of its thirds."""
    views: list[View] = []
    for medium in item.media:
        if medium.type == "image":
            views.append(View(item.id, "frame", medium.path, functools.partial(media.open_image, root / medium.path)))
        elif medium.type == "video":
            clip = functools.lru_cache(maxsize=1)(functools.partial(media.open_video, root / medium.path, _middles))
            for number in range(FRAMES_PER_VIDEO):
                position = round((2 * number + 1) / (2 * FRAMES_PER_VIDEO), 4)
                load = functools.partial(_frame, clip, number)
                views.append(View(item.id, "frame", medium.path, load, len(views), position))
    return views


def _frame(clip: functools._lru_cache_wrapper, number: int) -> np.ndarray:
    return clip()[number]


def _sound_views(item: Annotation, root: Path) -> list[View]:
    paths = [medium.path for medium in item.media if medium.type == "audio"]
    return [
        View(item.id, "sound", path, functools.partial(media.open_audio, root / path, rate=RATE), number)
        for number, path in enumerate(paths)
    ]


def _middles(count: int) -> list[int]:
    return [(2 * number + 1) * count // (2 * FRAMES_PER_VIDEO) for number in range(FRAMES_PER_VIDEO)]


def _with_sounds(item: Annotation, author: str, findings: Sequence[Findings]) -> Annotation:
    tags = tuple(tag for found in findings for tag in found.tags)
    captions = tuple(text for found in findings for text in found.sound_captions)
    parts = [part for part, new in (("tags", tags), ("sound_captions", captions)) if new]
    added = {"tags": item.tags + tags, "sound_captions": item.sound_captions + captions}
    return item.model_copy(update={**added, "written_by": _signed(item, author, parts)})


def _with_frames(item: Annotation, author: str, findings: Sequence[Findings]) -> Annotation:
    frames = [
        frame.model_copy(
            update={
                "caption": found.caption or frame.caption,
                "regions": frame.regions + found.regions,
                "semantics": frame.semantics + found.semantics,
            }
        )
        for frame, found in zip(item.frames, findings, strict=True)
    ]
    written = [p for p in ("caption", "regions", "semantics") if any(getattr(found, p) for found in findings)]
    signed = _signed(item, author, [f"frames.{part}" for part in written])
    return item.model_copy(update={"frames": tuple(frames), "written_by": signed})


def _signed(item: Annotation, author: str, parts: Sequence[str]) -> dict[str, str]:
    """The authors of an item's parts, with ``author`` added to some."""
    before = item.written_by
    return {**before, **{p: f"{before[p]}, {author}" if before.get(p, author) != author else author for p in parts}}


def _read_items(path: str | Path) -> Iterator[Annotation]:
    seen: set[str] = set()
    for number, values in json_objects(Path(path)):
        known = {key: value for key, value in values.items() if key not in _SAMPLE_FIELDS}
        item = from_json(known, f"{path}:{number}")
        if item.id in seen:
            raise DataError(f"{path}:{number}: the id {item.id!r} occurs twice")
        seen.add(item.id)
        if {medium.type for medium in item.media} == {"audio"}:
            item = item.model_copy(update={"captions": (), "sound_captions": item.captions + item.sound_captions})
        written = {part: "human" for part in ("captions", "sound_captions", "tags") if getattr(item, part)}
        written |= {"frames": "the item's own"} if item.frames else {}
        yield item.model_copy(update={"written_by": {**written, **item.written_by}})
