"""The first stage: annotators describe every item's frames and sounds, beside what people wrote.

Several processes may share the work: each takes the items of its rank. A finished item is never annotated again, also
if the number of processes changes. This module knows annotators by their protocol only.
"""

from __future__ import annotations

import functools
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lavis_chatbridge import media
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.files import append_lines, write_text
from lavis_chatbridge.multis.annotation import Annotation, Frame, from_json, json_lines, whole_records
from lavis_chatbridge.multis.annotators import RATE, Annotator, Findings, View
from lavis_chatbridge.schema import check_inside, media_path

FRAMES_PER_VIDEO = 3
_OF_SAMPLES_ONLY = ("turns", "answers", "style", "task", "held_out", "meta")
"""Fields of the sample schema that an annotation does not have: a file of samples may serve as items."""
_log = logging.getLogger(__name__)


class AnnotateReport(NamedTuple):
    """Items annotated now, items that were finished already, items with unreadable media."""

    annotated: int
    known: int
    failed: int


def annotate(
    items: str | Path,
    folder: str | Path,
    annotators: Sequence[Annotator],
    media_root: str | Path | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> AnnotateReport:
    """Annotate the items of one rank.

    Args:
        items: JSON lines: ``id``, ``media``, and what is known already (``captions``, ``sound_captions``, ``tags``,
            ``frames``, ``facts`` ...). Captions of an item that is only a sound count as ``sound_captions``.
        folder: Gets ``annotations-RANK-of-WORLD.jsonl`` and ``failures-RANK-of-WORLD.jsonl``.
        annotators: Run in order; a later one adds to what an earlier one wrote and replaces captions.
        media_root: The folder that media paths are relative to; by default the folder of ``items``.
        rank: Of this process.
        world_size: Number of processes.

    Raises:
        DataError: If ``items`` does not have this form, or contains an id twice.
    """
    folder, root = Path(folder), Path(media_root) if media_root is not None else Path(items).parent
    folder.mkdir(parents=True, exist_ok=True)
    done = {str(r.get("id")) for file in folder.glob("annotations-*.jsonl") for r in whole_records(file)}
    name = f"{rank:05d}-of-{world_size:05d}.jsonl"
    failures: list[str] = []
    annotated = known = 0
    for item in _read_items(items):
        if zlib.crc32(item.id.encode("utf-8", "replace")) % world_size != rank:
            continue
        if item.id in done:
            known += 1
            continue
        try:
            append_lines(folder / f"annotations-{name}", [annotate_item(item, annotators, root).line()])
            annotated += 1
        except MediaError as error:
            _log.warning("item %s is left out: %s", item.id, error)
            failures.append(json.dumps({"id": item.id, "reason": str(error)}) + "\n")
    write_text(folder / f"failures-{name}", "".join(failures))
    return AnnotateReport(annotated, known, len(failures))


def annotate_item(item: Annotation, annotators: Sequence[Annotator], root: Path) -> Annotation:
    """One item with the annotators' findings.

    Raises:
        MediaError: If a medium cannot be opened, or is outside the media root.
    """
    for medium in item.media:
        try:
            check_inside(media_path(medium.path, str(root), item.id), str(root))
        except DataError as error:
            raise MediaError(medium.path, error) from error
    needed = {annotator.views for annotator in annotators}
    frames = _frame_views(item, root) if "frame" in needed else []
    sounds = _sound_views(item, root) if "sound" in needed else []
    merged = item.frames or tuple(Frame(position=view.position) for view in frames)
    if frames and len(merged) != len(frames):
        raise DataError(f"item {item.id!r} has {len(merged)} frames of its own, expected {len(frames)}")
    item = item.model_copy(update={"frames": merged})
    for annotator in annotators:
        views = frames if annotator.views == "frame" else sounds
        if views:
            merge = _with_frames if annotator.views == "frame" else _with_sounds
            item = merge(item, annotator.name, annotator.annotate(views))
    return item


def _frame_views(item: Annotation, root: Path) -> list[View]:
    """The image, or three frames of the video: the middles of its thirds."""
    views: list[View] = []
    for medium in item.media:
        if medium.type == "image":
            views.append(View(item.id, medium.path, functools.partial(media.open_image, root / medium.path)))
        elif medium.type == "video":
            decoded = functools.cache(functools.partial(media.open_video, root / medium.path, _middles))
            for number in range(FRAMES_PER_VIDEO):
                position = round((2 * number + 1) / (2 * FRAMES_PER_VIDEO), 4)
                load = functools.partial(_nth, decoded, number)
                views.append(View(item.id, medium.path, load, number, position))
    return views


def _nth(decoded: functools._lru_cache_wrapper[np.ndarray], number: int) -> np.ndarray:
    return decoded()[number]


def _middles(count: int) -> list[int]:
    return [(2 * number + 1) * count // (2 * FRAMES_PER_VIDEO) for number in range(FRAMES_PER_VIDEO)]


def _sound_views(item: Annotation, root: Path) -> list[View]:
    paths = [medium.path for medium in item.media if medium.type == "audio"]
    loads = [functools.partial(media.open_audio, root / path, rate=RATE) for path in paths]
    return [View(item.id, path, load, number) for number, (path, load) in enumerate(zip(paths, loads, strict=True))]


def _signed(item: Annotation, part: str, author: str) -> dict[str, str]:
    earlier = item.written_by.get(part, "")
    return {part: f"{earlier}, {author}" if earlier and author not in earlier else author}


def _with_sounds(item: Annotation, author: str, findings: list[Findings]) -> Annotation:
    written = dict(item.written_by)
    update: dict[str, tuple] = {}
    for part in ("tags", "sound_captions"):
        found = [entry for finding in findings for entry in getattr(finding, part)]
        if found:
            written |= _signed(item, part, author)
            update[part] = (*getattr(item, part), *found)
    return item.model_copy(update={**update, "written_by": written})


def _with_frames(item: Annotation, author: str, findings: list[Findings]) -> Annotation:
    written, frames = dict(item.written_by), []
    for frame, found in zip(item.frames, findings, strict=True):
        for part in ("caption", "regions", "semantics"):
            if getattr(found, part):
                written |= _signed(item, f"frames.{part}", author)
        frames.append(
            frame.model_copy(
                update={
                    "caption": found.caption or frame.caption,
                    "regions": (*frame.regions, *found.regions),
                    "semantics": (*frame.semantics, *found.semantics),
                }
            )
        )
    return item.model_copy(update={"frames": tuple(frames), "written_by": written})


def _read_items(path: str | Path) -> Iterator[Annotation]:
    seen: set[str] = set()
    for number, values in json_lines(Path(path)):
        known = {key: value for key, value in values.items() if key not in _OF_SAMPLES_ONLY}
        item = _with_authors(from_json(known, f"{path}:{number}"))
        if item.id in seen:
            raise DataError(f"{path}:{number}: the id {item.id!r} is in the file twice")
        seen.add(item.id)
        yield item


def _with_authors(item: Annotation) -> Annotation:
    """Captions of a sound become sound captions; people sign what the item has already."""
    if {medium.type for medium in item.media} == {"audio"} and item.captions:
        item = item.model_copy(update={"captions": (), "sound_captions": (*item.captions, *item.sound_captions)})
    written = {part: "human" for part in ("captions", "sound_captions", "tags") if getattr(item, part)}
    written |= {"frames": "the item's own"} if item.frames else {}
    return item.model_copy(update={"written_by": {**written, **item.written_by}})
