"""An annotation: a description of one medium or group of media. It is the language model's only information.

This module stores and words annotations. It knows neither annotators nor requests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from lavis_chatbridge.config import Settings, parse
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.files import read_lines
from lavis_chatbridge.prompting.pieces import Modality
from lavis_chatbridge.schema import media_path

MediaKind = Literal["image", "video", "audio", "video+audio"]
MEDIA_KINDS: tuple[MediaKind, ...] = ("image", "video", "audio", "video+audio")
Box = tuple[float, float, float, float]
"""``(left, top, right, bottom)`` as shares of the frame's width and height, each in [0, 1]."""


class MediumRef(Settings):
    """A medium's modality and its path relative to the media root."""

    type: Modality
    path: str


class Region(Settings):
    """A part of a frame in words (dense captioning)."""

    text: str
    box: Box | None = None
    score: float | None = None


class Semantic(Settings):
    """A class found by segmentation, and the share of the frame that it covers."""

    label: str
    share: float | None = None


class Tag(Settings):
    """A sound event."""

    label: str
    score: float | None = None


def _named(values: Any) -> Any:
    """Plain strings in a list of labels as ``{"label": ...}``."""
    return [{"label": v} if isinstance(v, str) else v for v in values] if isinstance(values, (list, tuple)) else values


class Frame(Settings):
    """The annotation of one frame of a clip, or of an image."""

    position: float = 0.0
    """From 0 (start of the clip) to 1 (end); 0 for an image."""
    time: float | None = None
    """The same in seconds, if known."""
    caption: str = ""
    regions: tuple[Region, ...] = ()
    semantics: Annotated[tuple[Semantic, ...], BeforeValidator(_named)] = ()


class Annotation(Settings):
    """All annotations of one item."""

    id: str
    """Unique in a collection."""
    media: tuple[MediumRef, ...]
    """An image, a video, a sound, or a video and its sound."""
    captions: tuple[str, ...] = ()
    """Human captions of the image or clip."""
    sound_captions: tuple[str, ...] = ()
    """Human captions of the sound."""
    tags: Annotated[tuple[Tag, ...], BeforeValidator(_named)] = ()
    frames: tuple[Frame, ...] = ()
    """One for an image, three for a video, none for a sound."""
    written_by: dict[str, str] = {}
    """Part -> author, for example ``{"captions": "human", "frames.regions": "florence2 base"}``."""
    source: str = ""
    licence: str = ""
    facts: dict[str, str] = {}
    """Attribute -> value: ground truth, if known (embedded world)."""

    def check(self) -> Iterator[str]:
        """Yield faults that the field types do not show."""
        if not self.id or not self.media:
            yield "an item needs an id and at least one medium"

    @property
    def modality(self) -> MediaKind:
        """The set of modalities, which selects the prompts.

        Raises:
            DataError: If the item combines other media than a video and its sound.
        """
        kinds = {medium.type for medium in self.media}
        if kinds == {"video", "audio"}:
            return "video+audio"
        if len(kinds) == 1:
            return next(iter(kinds))
        raise DataError(f"item {self.id!r} has {' and '.join(sorted(kinds))}; expected one of {MEDIA_KINDS}")

    def to_json(self) -> dict[str, Any]:
        """The annotation as JSON values, without fields at their defaults."""
        return self.model_dump(mode="json", exclude_defaults=True)


def from_json(values: Mapping[str, Any], where: str = "annotation") -> Annotation:
    """Read an annotation from its JSON form.

    Raises:
        DataError: With every fault of the record.
    """
    try:
        annotation = parse(Annotation, values, where)
    except ConfigError as error:
        raise DataError(str(error)) from error
    for number, medium in enumerate(annotation.media):
        media_path(medium.path, "of the items", f"{where}.media[{number}]")
    return annotation


def json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSONL file with their line numbers.

    Raises:
        DataError: If the file cannot be read or a line is not a JSON object.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(values, dict):
            raise DataError(f"{path}:{number}: expected an object, found {line[:60]!r}")
        yield number, values


def read_annotations(path: str | Path) -> Iterator[Annotation]:
    """Yield the annotations of a JSONL file, or of all ``annotations*.jsonl`` in a folder.

    Raises:
        DataError: If there is no such file, or a line is not an annotation.
    """
    path = Path(path)
    files = sorted(path.glob("annotations*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise DataError(f"no annotations at {path}: expected a JSONL file, or a folder with annotations*.jsonl")
    for file in files:
        for number, values in json_objects(file):
            yield from_json(values, f"{file.name}:{number}")


def describe(annotation: Annotation) -> str:
    """Describe an item in text: human captions, then its frames in time order, then its sound."""
    lines: list[str] = []
    if annotation.captions:
        what = "image" if annotation.modality == "image" else "clip"
        lines += [f"What people say about the {what}:", *(f"- {text.strip()}" for text in annotation.captions)]
    for frame in sorted(annotation.frames, key=lambda frame: frame.position):
        lines += _describe_frame(frame, annotation.modality)
    if annotation.sound_captions:
        lines += ["What people say about the sound:", *(f"- {text.strip()}" for text in annotation.sound_captions)]
    if annotation.tags:
        lines.append("Sounds recognised: " + ", ".join(tag.label for tag in annotation.tags))
    return "\n".join(lines)


def all_words(annotation: Annotation) -> str:
    """All words of an annotation, which support an answer."""
    parts = [*annotation.captions, *annotation.sound_captions, *(tag.label for tag in annotation.tags)]
    for frame in annotation.frames:
        parts += [frame.caption, *(region.text for region in frame.regions), *(s.label for s in frame.semantics)]
    return "\n".join([*parts, *annotation.facts.values()])


def _describe_frame(frame: Frame, modality: MediaKind) -> list[str]:
    if modality == "image":
        name = "Image"
    elif frame.time is not None:
        name = f"Frame at {frame.time:.1f} s"
    else:
        name = f"Frame at {round(100 * frame.position)} % of the clip"
    lines = [f"{name}: {frame.caption.strip()}".rstrip()]
    for region in frame.regions:
        box = "" if region.box is None else " at [" + ", ".join(f"{value:.2f}" for value in region.box) + "]"
        lines.append(f"  - {region.text.strip()}{box}")
    if frame.semantics:
        shares = (s.label if s.share is None else f"{s.label} {round(100 * s.share)} %" for s in frame.semantics)
        lines.append("  Areas: " + ", ".join(shares))
    return lines
