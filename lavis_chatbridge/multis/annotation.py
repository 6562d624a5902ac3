"""What is known about one item in words: the only thing that the language model gets to see.

This module knows how annotations are stored and worded, not who writes them nor what is asked about them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from lavis_chatbridge import config
from lavis_chatbridge.config import Settings
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.files import read_lines
from lavis_chatbridge.prompting.pieces import Modality
from lavis_chatbridge.schema import media_path

Modalities = Literal["image", "video", "audio", "video+audio"]
MODALITIES: tuple[Modalities, ...] = ("image", "video", "audio", "video+audio")


def _labelled(values: Any) -> Any:
    """Plain strings as objects with a label."""
    return [{"label": v} if isinstance(v, str) else v for v in values] if isinstance(values, (list, tuple)) else values


class MediumRef(Settings):
    """A medium's modality and its path, relative to the media root."""

    type: Modality
    path: str


class Region(Settings):
    """A part of a frame in words (dense captioning)."""

    text: str
    box: tuple[float, float, float, float] | None = None
    """Left, top, right, bottom as shares of the frame's width and height."""
    score: float | None = None


class Semantic(Settings):
    """A class that a segmentation found, and the share of the frame that it covers."""

    label: str
    share: float | None = None


class Tag(Settings):
    """A sound event."""

    label: str
    score: float | None = None


class Frame(Settings):
    """What is seen at one moment."""

    position: float = 0.0
    """Where in the clip, from 0 (start) to 1 (end)."""
    time: float | None = None
    """The same in seconds, if it is known."""
    caption: str = ""
    regions: tuple[Region, ...] = ()
    semantics: tuple[Semantic, ...] = ()

    _labels = field_validator("semantics", mode="before")(_labelled)


class Annotation(Settings):
    """Everything known about one item."""

    id: str
    """Unique in a collection."""
    media: tuple[MediumRef, ...]
    """The media that belong together: an image, a video, a sound, or a video with its sound."""
    captions: tuple[str, ...] = ()
    """What people wrote about the image or the clip."""
    sound_captions: tuple[str, ...] = ()
    """What people wrote about the sound."""
    tags: tuple[Tag, ...] = ()
    """Sound events."""
    frames: tuple[Frame, ...] = ()
    """One for an image, three for a video, none for a sound."""
    written_by: dict[str, str] = {}
    """Part to author: ``{"captions": "human", "frames.regions": "florence2 ..."}``."""
    source: str = ""
    """The collection."""
    licence: str = ""
    """The licence of the media, for the manifest."""
    facts: dict[str, str] = {}
    """Attribute to value, if the truth is known (embedded world)."""

    _labels = field_validator("tags", mode="before")(_labelled)

    def check(self) -> Iterator[str]:
        if not self.id or not self.media:
            yield "an item needs an id and at least one medium"

    @property
    def modality(self) -> Modalities:
        """The set of modalities, which selects the prompt.

        Raises:
            DataError: If the item has another set than the four of the pipeline.
        """
        found = {medium.type for medium in self.media}
        if found == {"video", "audio"}:
            return "video+audio"
        if len(found) == 1:
            return next(iter(found))
        raise DataError(f"item {self.id!r} has {' and '.join(sorted(found))}; expected one of {', '.join(MODALITIES)}")

    def line(self) -> str:
        """One line of JSON, without empty fields."""
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True), ensure_ascii=False)


def from_json(values: Mapping[str, Any], where: str = "annotation") -> Annotation:
    """An annotation from its JSON form; tags and semantics may be plain strings.

    Raises:
        DataError: With every fault of the record.
    """
    try:
        annotation = config.parse(Annotation, values, where)
    except ConfigError as error:
        raise DataError(str(error)) from error
    for number, medium in enumerate(annotation.media):
        media_path(medium.path, "of the items", f"{where}.media[{number}]")
    return annotation


def read_annotations(path: str | Path) -> Iterator[Annotation]:
    """The annotations of a JSONL file, or of all ``annotations*.jsonl`` in a folder, one at a time.

    A folder is the output of `annotate`: it may have half a line at the end of a killed run, which is skipped.

    Raises:
        DataError: If there is no such file, or a record is not an annotation.
    """
    path = Path(path)
    files = sorted(path.glob("annotations*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise DataError(f"no annotations at {path}: expected a JSONL file, or a folder with annotations*.jsonl")
    for file in files:
        for number, values in enumerate(whole_records(file), start=1) if path.is_dir() else json_lines(file):
            yield from_json(values, f"{file.name}:{number}")


def json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with their line numbers.

    Raises:
        DataError: If the file cannot be read, or a line is not an object.
    """
    for number, line in read_lines(file):
        if line.strip():
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}:{number}: not JSON: {error}") from error
            if not isinstance(values, dict):
                raise DataError(f"{file}:{number}: expected an object, found {config.shown(values)}")
            yield number, values


def whole_records(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that runs append to; half a line of a killed run is skipped. No file has no records."""
    if file.is_file():
        with file.open("rb") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    yield record


def describe(annotation: Annotation) -> str:
    """The textual description of an item: people's captions, then its frames in time order, then its sound."""
    lines: list[str] = []
    what = "image" if annotation.modality == "image" else "clip"
    if annotation.captions:
        lines += [f"What people say about the {what}:", *(f"- {text.strip()}" for text in annotation.captions)]
    for frame in sorted(annotation.frames, key=lambda frame: frame.position):
        lines += _describe_frame(frame, annotation.modality)
    if annotation.sound_captions:
        lines += ["What people say about the sound:", *(f"- {text.strip()}" for text in annotation.sound_captions)]
    if annotation.tags:
        lines.append("Sounds recognised: " + ", ".join(tag.label for tag in annotation.tags))
    return "\n".join(lines)


def all_words(annotation: Annotation) -> str:
    """All words of an annotation, against which an answer is checked."""
    parts: list[str] = [*annotation.captions, *annotation.sound_captions, *(tag.label for tag in annotation.tags)]
    for frame in annotation.frames:
        parts += [frame.caption, *(region.text for region in frame.regions), *(s.label for s in frame.semantics)]
    return "\n".join([*parts, *annotation.facts.values()])


def _describe_frame(frame: Frame, modality: Modalities) -> Iterable[str]:
    if modality == "image":
        name = "Image"
    elif frame.time is not None:
        name = f"Frame at {frame.time:.1f} s"
    else:
        name = f"Frame at {round(100 * frame.position)} % of the clip"
    yield f"{name}: {frame.caption.strip()}" if frame.caption else f"{name}:"
    for region in frame.regions:
        box = "" if region.box is None else " at [" + ", ".join(f"{value:.2f}" for value in region.box) + "]"
        yield f"  - {region.text.strip()}{box}"
    if frame.semantics:
        shares = (s.label if s.share is None else f"{s.label} {round(100 * s.share)} %" for s in frame.semantics)
        yield "  Areas: " + ", ".join(shares)
