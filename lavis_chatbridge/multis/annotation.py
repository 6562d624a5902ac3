"""What is known about one medium or one group of media, in words: the only thing that the language model gets to see.

This module knows how annotations are stored and worded, not who writes them nor what is asked about them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lavis_chatbridge import config as settings
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.multis.journal import read_journal
from lavis_chatbridge.prompting.pieces import Modality
from lavis_chatbridge.schema import media_path

MediaKind = Literal["image", "video", "audio", "video+audio"]
MEDIA_KINDS: tuple[MediaKind, ...] = ("image", "video", "audio", "video+audio")
Box = tuple[float, ...]
"""``(left, top, right, bottom)`` as shares of the frame's width and height, each in [0, 1]."""


@dataclass(frozen=True)
class MediumRef:
    """A medium's kind and its path, relative to the media root."""

    type: Modality
    path: str


@dataclass(frozen=True)
class Region:
    """A part of a frame in words (dense captioning)."""

    text: str
    box: Box | None = None
    score: float | None = None


@dataclass(frozen=True)
class Semantic:
    """A class that a segmentation found, and the share of the frame that it covers."""

    label: str
    share: float | None = None


@dataclass(frozen=True)
class Tag:
    """A sound event."""

    label: str
    score: float | None = None


@dataclass(frozen=True)
class Frame:
    """What is seen at one moment.

    Args:
        position: Where in the clip, from 0 (start) to 1 (end); 0 for an image.
        time: The same in seconds, where it is known.
        caption: The whole frame in a sentence.
        regions: Its parts in words.
        semantics: The classes that a segmentation found.
    """

    position: float = 0.0
    time: float | None = None
    caption: str = ""
    regions: tuple[Region, ...] = ()
    semantics: tuple[Semantic, ...] = ()


@dataclass(frozen=True)
class Annotation:
    """Everything known about one item.

    Args:
        id: The item's name, unique in a collection.
        media: The media that belong together: an image, a video, a sound, or a video with its sound.
        captions: What people wrote about the picture or the clip.
        sound_captions: What people wrote about the sound.
        tags: Sound events.
        frames: One for an image, three for a video, none for a sound.
        written_by: Which part was written by whom, e.g. ``{"captions": "human", "regions": "florence2 ..."}``.
        source: The collection.
        licence: The licence of the media, for the manifest.
        facts: Attribute to value, where the truth is known (embedded world).
    """

    id: str
    media: tuple[MediumRef, ...]
    captions: tuple[str, ...] = ()
    sound_captions: tuple[str, ...] = ()
    tags: tuple[Tag, ...] = ()
    frames: tuple[Frame, ...] = ()
    written_by: dict[str, str] = field(default_factory=dict)
    source: str = ""
    licence: str = ""
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def modality(self) -> MediaKind:
        """The set of media kinds, by which prompts are chosen.

        Raises:
            DataError: If the item holds another set than the four that the pipeline makes data for.
        """
        kinds = {medium.type for medium in self.media}
        if kinds == {"video", "audio"}:
            return "video+audio"
        if len(kinds) == 1:
            return next(iter(kinds))
        found = " and ".join(sorted(kinds)) or "no medium"
        raise DataError(f"item {self.id!r} holds {found}; expected one of {', '.join(MEDIA_KINDS)}")

    def to_json(self) -> dict[str, Any]:
        """A mapping without empty fields, ready for ``json.dumps``."""
        return _without_empty(dataclasses.asdict(self))


def from_json(values: Mapping[str, Any], where: str = "annotation") -> Annotation:
    """An annotation from its JSON form; tags and semantics may also be plain strings.

    Raises:
        DataError: With every fault of the record.
    """
    values = dict(values)
    values["tags"] = _all_named(values.get("tags"))
    frames = values.get("frames") or ()
    if not isinstance(frames, (list, tuple)) or not all(isinstance(frame, Mapping) for frame in frames):
        raise DataError(f"{where}.frames: expected a list of objects, found {settings.shown(frames)}")
    values["frames"] = [{**frame, "semantics": _all_named(frame.get("semantics"))} for frame in frames]
    try:
        annotation = settings.parse(Annotation, values, where)
    except ConfigError as error:
        raise DataError(str(error)) from error
    if not annotation.id or not annotation.media:
        raise DataError(f"{where}: an item needs an id and at least one medium")
    for number, medium in enumerate(annotation.media):
        media_path(medium.path, "of the items", f"{where}.media[{number}]")
    return annotation


def annotation_files(path: str | Path) -> list[Path]:
    """The JSONL files of an annotation: ``path`` itself, or all ``annotations*.jsonl`` of a folder.

    Raises:
        DataError: If there is none.
    """
    path = Path(path)
    files = sorted(path.glob("annotations*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise DataError(f"no annotations at {path}: expected a JSONL file, or a folder with annotations*.jsonl")
    return files


def read_annotations(path: str | Path) -> Iterator[Annotation]:
    """The annotations of a file or folder, one at a time.

    A folder is what `annotate` writes: lines that a kill left unfinished are passed over there, their items done anew.

    Raises:
        DataError: If a line is not an annotation, with its file and number.
    """
    written = Path(path).is_dir()
    for file in annotation_files(path):
        lines = enumerate(read_journal(file), start=1) if written else json_lines(file)
        for number, values in lines:
            yield from_json(values, f"{file.name}:{number}")


class AnnotationIndex:
    """Annotations by id without holding them in memory: only their places in the files are kept.

    Args:
        path: A JSONL file or a folder of them.
    """

    def __init__(self, path: str | Path) -> None:
        self._files = annotation_files(path)
        self._places: dict[str, tuple[int, int]] = {}
        for number, file in enumerate(self._files):
            offset = 0
            with file.open("rb") as lines:
                for line in lines:
                    item = _id_of(line)
                    if item is not None:
                        self._places[item] = (number, offset)
                    offset += len(line)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, item: str) -> bool:
        return item in self._places

    def get(self, item: str) -> Annotation | None:
        """The annotation of an item, None if there is none."""
        return self[item] if item in self._places else None

    def __getitem__(self, item: str) -> Annotation:
        number, offset = self._places[item]
        with self._files[number].open("rb") as lines:
            lines.seek(offset)
            return from_json(json.loads(lines.readline()), f"{self._files[number].name} at byte {offset}")


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


def spoken_words(annotation: Annotation) -> str:
    """All words of an annotation, the support against which an answer is checked."""
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
    lines = [f"{name}: {frame.caption.strip()}" if frame.caption else f"{name}:"]
    for region in frame.regions:
        box = "" if region.box is None else " at [" + ", ".join(f"{value:.2f}" for value in region.box) + "]"
        lines.append(f"  - {region.text.strip()}{box}")
    if frame.semantics:
        shares = (
            semantic.label if semantic.share is None else f"{semantic.label} {round(100 * semantic.share)} %"
            for semantic in frame.semantics
        )
        lines.append("  Areas: " + ", ".join(shares))
    return lines


def _all_named(values: Any) -> Any:
    if not isinstance(values, (list, tuple)):
        return values or []
    return [{"label": value} if isinstance(value, str) else value for value in values]


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        kept = ((key, _without_empty(inner)) for key, inner in value.items())
        return {key: inner for key, inner in kept if inner is not None and inner != [] and inner != {} and inner != ""}
    if isinstance(value, (list, tuple)):
        return [_without_empty(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value


def json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file, each with its line number.

    Raises:
        DataError: If the file cannot be read, or a line is not an object.
    """
    number = 0
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                values = json.loads(line) if line.strip() else {}
                if not isinstance(values, dict):
                    raise ValueError(f"expected an object, found {line[:60]!r}")
                if values:
                    yield number, values
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, too deep, or not an object
        raise DataError(f"{file}:{number}: {error}") from error


def _id_of(line: bytes) -> str | None:
    """The id of an annotation's line; None for an unfinished one, and for what is no annotation."""
    try:
        return str(json.loads(line)["id"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
