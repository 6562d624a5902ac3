"""First stage: runs the annotators on each item's frames and sounds, and merges the results with human captions.

Items are sharded over processes by rank. Finished items are not annotated again, even with another number of processes.
A folder has the items of one set of annotators; another set is refused.
This module uses only the annotators' protocol.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lavis_chatbridge import media
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.files import append_lines, hash_of, read_objects, write_text
from lavis_chatbridge.multis.annotation import Annotation, Frame, from_json
from lavis_chatbridge.multis.annotators import RATE, Annotator, Findings, Imported, View
from lavis_chatbridge.schema import check_inside

_SAMPLE_FIELDS = ("turns", "answers", "style", "task", "facts", "held_out", "meta")
"""Fields of the sample schema to ignore, so that a JSONL of samples can be annotated."""
_log = logging.getLogger(__name__)


class AnnotateReport(NamedTuple):
    """Numbers of items: annotated by this run, finished before, with unreadable media."""

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
    """Annotate the items of process ``rank`` of ``world`` processes.

    Args:
        items: JSONL with ``id``, ``media`` and existing annotations (``captions``, ``sound_captions``, ``tags``,
            ``frames``). The captions of an item with only a sound count as ``sound_captions``.
        folder: Output folder, for ``annotations-RANK-of-WORLD.jsonl`` and ``failures-RANK-of-WORLD.jsonl``.
        annotators: Run in order; a later one adds to an earlier one's findings and replaces its captions.
        media_root: Folder that media paths are relative to; by default that of ``items``.

    Raises:
        DataError: If ``folder`` has one of these items from other annotators or with another line in ``items``.
    """
    folder, root = Path(folder), Path(media_root) if media_root is not None else Path(items).parent
    folder.mkdir(parents=True, exist_ok=True)
    everything = list(_read_items(items, annotators))
    if rank == 0:
        _warn_of_unused(annotators, everything)
    own = [item for item in everything if zlib.crc32(item.id.encode()) % world == rank]
    left = _unfinished(own, folder)
    name = f"{rank:05d}-of-{world:05d}.jsonl"
    annotated = 0
    failures = []
    for item in left:
        try:
            finished = _annotate_item(item, annotators, root)
        except MediaError as error:
            _log.warning("item %s is left out: %s", item.id, error)
            failures.append(json.dumps({"id": item.id, "reason": str(error)}) + "\n")
            continue
        append_lines(folder / f"annotations-{name}", [finished.model_dump_json(exclude_defaults=True)])
        annotated += 1
    (folder / f"failures-{name}").unlink(missing_ok=True)
    if failures:
        write_text(folder / f"failures-{name}", "".join(failures))
    return AnnotateReport(annotated, len(own) - len(left), len(failures))


def _unfinished(items: Sequence[Annotation], folder: Path) -> list[Annotation]:
    """The items that the folder does not have; a `DataError` if it has one that was made from something else."""
    wanted = {item.id: item for item in items}
    for file in sorted(folder.glob("annotations-*.jsonl")):
        for where, record in read_objects(file, skip_cut=True):
            item, found = wanted.pop(record["id"], None), record.get("made_from", [])
            if item is not None and found != list(item.made_from):
                raise DataError(
                    f"{where}: {item.id!r} was made from {', '.join(found) or 'unknown annotators'}; now it would be "
                    f"made from {', '.join(item.made_from)}: choose another --out, or delete this line or the folder"
                )
    return list(wanted.values())


def _warn_of_unused(annotators: Sequence[Annotator], items: Sequence[Annotation]) -> None:
    for annotator in annotators:
        if isinstance(annotator, Imported) and (unused := annotator.unused(items)):
            _log.warning(
                "%s: views that belong to no item: %d, the first is %r", annotator.name, len(unused), unused[0]
            )


def _annotate_item(item: Annotation, annotators: Sequence[Annotator], root: Path) -> Annotation:
    """Add the annotators' findings to one item; raises a `MediaError` if a medium cannot be opened."""
    views = list(_views(item, root, {annotator.modality for annotator in annotators}))
    frames = [view for view in views if view.modality == "image"]
    if frames and not item.frames:
        middles = [round((2 * number + 1) / (2 * len(frames)), 4) for number in range(len(frames))]
        positions = [0.0] if len(frames) == 1 else middles
        item = item.model_copy(update={"frames": tuple(Frame(position=position) for position in positions)})
    if frames and len(item.frames) != len(frames):
        raise DataError(f"item {item.id!r} already has {len(item.frames)} frames, expected {len(frames)}")
    for annotator in annotators:
        for view in views:
            if view.modality == annotator.modality:
                item = _with_findings(item, annotator.name, view, annotator.annotate(view))
    return item


def _views(item: Annotation, root: Path, modalities: Container[str]) -> Iterator[View]:
    """The views of an item: the image, or the middle frame of each third of the video; and the sound.

    Only ``modalities`` are opened."""
    for medium in item.media:
        path = os.path.join(root, medium.path)
        try:
            check_inside(path, str(root))
        except DataError as error:
            raise MediaError(medium.path, error) from error
        if ("audio" if medium.type == "audio" else "image") not in modalities:
            continue
        if medium.type == "audio":
            yield View(item.id, "audio", medium.path, media.open_audio(path, rate=RATE))
        elif medium.type == "image":
            yield View(item.id, "image", medium.path, media.open_image(path))
        else:
            frames = media.open_video(path, lambda count: [sixth * count // 6 for sixth in (1, 3, 5)])
            for number, frame in enumerate(frames):
                yield View(item.id, "image", medium.path, frame, number)


def _with_findings(item: Annotation, author: str, view: View, found: Findings) -> Annotation:
    """The item with an annotator's findings about one view; records the author of each changed part."""
    changes: dict[str, object] = {"tags": item.tags + found.tags}
    changes["sound_captions"] = item.sound_captions + found.sound_captions
    written = [part for part in ("tags", "sound_captions") if getattr(found, part)]
    if view.modality == "image":
        frame = item.frames[view.number]
        added = {"regions": frame.regions + found.regions, "semantics": {**frame.semantics, **found.semantics}}
        frame = frame.model_copy(update={"caption": found.caption or frame.caption, **added})
        changes["frames"] = (*item.frames[: view.number], frame, *item.frames[view.number + 1 :])
        written += [f"frames.{part}" for part in ("caption", "regions", "semantics") if getattr(found, part)]
    signed = dict(item.written_by)
    for part in written:
        if author not in signed.get(part, "").split(", "):
            signed[part] = f"{signed[part]}, {author}" if part in signed else author
    return item.model_copy(update={**changes, "written_by": signed})


def _read_items(path: str | Path, annotators: Sequence[Annotator]) -> Iterator[Annotation]:
    seen: set[str] = set()
    for where, record in read_objects(path):
        item = from_json({key: value for key, value in record.items() if key not in _SAMPLE_FIELDS}, where)
        if item.id in seen:
            raise DataError(f"{where}: the id {item.id!r} occurs twice")
        seen.add(item.id)
        line = hash_of(item.model_dump(exclude_defaults=True))
        if {medium.type for medium in item.media} == {"audio"}:
            item = item.model_copy(update={"captions": (), "sound_captions": item.captions + item.sound_captions})
        written = {part: "human" for part in ("captions", "sound_captions", "tags") if getattr(item, part)}
        written |= {"frames": "the item's own"} if item.frames else {}
        made_from = (f"item hash {line[:8]}", *(annotator.name for annotator in annotators))
        yield item.model_copy(update={"written_by": {**written, **item.written_by}, "made_from": made_from})
