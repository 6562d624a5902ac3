"""An annotation: a text description of one item's media. The language model reads this instead of the media.

This module reads annotations and turns them into text. It imports neither annotators nor requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from lavis_chatbridge.config import Settings, parse
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.files import read_objects
from lavis_chatbridge.prompting.conversation import MODALITIES, Modality
from lavis_chatbridge.schema import media_path

ItemModality = Literal["image", "video", "audio", "video+audio"]
ITEM_MODALITIES: tuple[ItemModality, ...] = get_args(ItemModality)


class MediumRef(Settings):
    """A medium's modality and its path relative to the media root."""

    type: Modality
    path: str


class Region(Settings):
    """A caption of a region of a frame (dense captioning)."""

    text: str
    box: tuple[float, float, float, float] | None = None
    """``(left, top, right, bottom)`` as shares of the frame's width and height, each in [0, 1]."""


class Frame(Settings):
    """The annotation of one frame of a clip, or of an image."""

    position: float = 0.0
    """From 0 (start of the clip) to 1 (end); 0 for an image."""
    time: float | None = None
    """Time in seconds, if known."""
    caption: str = ""
    regions: tuple[Region, ...] = ()
    semantics: dict[str, float] = {}
    """Class from segmentation -> share of the frame's area, in descending order."""


class Annotation(Settings):
    """All annotations of one item."""

    id: str
    """Unique id within the file."""
    media: tuple[MediumRef, ...]
    """An image, a video, a sound, or a video and its sound."""
    captions: tuple[str, ...] = ()
    """Human captions of the image or clip."""
    sound_captions: tuple[str, ...] = ()
    """Human captions of the sound."""
    tags: tuple[str, ...] = ()
    """Sound events."""
    frames: tuple[Frame, ...] = ()
    """One frame for an image, three for a video, none for a sound."""
    written_by: dict[str, str] = {}
    """Part -> author, for example ``{"captions": "human", "frames.regions": "florence2 base"}``."""
    made_from: tuple[str, ...] = ()
    """A hash of the item's line, and the names of all annotators that ran. `annotate` writes it."""
    source: str = ""
    licence: str = ""

    def check(self) -> Iterator[str]:
        if not self.id or self.modality not in ITEM_MODALITIES:
            found = self.modality or "no media"
            yield f"an item needs an id, and {', '.join(ITEM_MODALITIES[:-1])} or {ITEM_MODALITIES[-1]}; found {found}"

    @property
    def modality(self) -> ItemModality:
        """The modalities of its media; they select the prompts."""
        found = {medium.type for medium in self.media}
        return cast(ItemModality, "+".join(modality for modality in MODALITIES if modality in found))


def from_json(values: Mapping[str, Any], where: str) -> Annotation:
    """Read an annotation from its JSON form; a `DataError` has every fault of the record."""
    try:
        annotation = parse(Annotation, values, where)
    except ConfigError as error:
        raise DataError(str(error)) from error
    for number, medium in enumerate(annotation.media):
        media_path(medium.path, "of the items", f"{where}.media[{number}]")
    return annotation


def read_annotations(path: str | Path) -> Iterator[Annotation]:
    """Yield the annotations of a JSONL file, or of all ``annotations*.jsonl`` in a folder.

    In a folder, lines that an interruption of `annotate` cut off are skipped.

    Raises:
        DataError: If there is no such file, or a line is not an annotation.
    """
    path = Path(path)
    files = sorted(path.glob("annotations*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise DataError(f"no annotations at {path}: expected a JSONL file, or a folder with annotations*.jsonl")
    for file in files:
        for where, record in read_objects(file, skip_cut=path.is_dir()):
            yield from_json(record, where)


def describe(annotation: Annotation) -> str:
    """Describe an item in text: human captions, then its frames in time order, then its sound."""
    lines: list[str] = []
    if annotation.captions:
        what = "image" if annotation.modality == "image" else "clip"
        lines += [f"What people say about the {what}:", *(f"- {text.strip()}" for text in annotation.captions)]
    for frame in sorted(annotation.frames, key=lambda frame: frame.position):
        moment = f"{round(100 * frame.position)} % of the clip" if frame.time is None else f"{frame.time:.1f} s"
        name = "Image" if annotation.modality == "image" else f"Frame at {moment}"
        lines.append(f"{name}: {frame.caption.strip()}".rstrip())
        for region in frame.regions:
            box = "" if region.box is None else " at [" + ", ".join(f"{value:.2f}" for value in region.box) + "]"
            lines.append(f"  - {region.text.strip()}{box}")
        if frame.semantics:
            areas = (f"{name} {round(100 * share)} %" for name, share in frame.semantics.items())
            lines.append("  Areas: " + ", ".join(areas))
    if annotation.sound_captions:
        lines += ["What people say about the sound:", *(f"- {text.strip()}" for text in annotation.sound_captions)]
    if annotation.tags:
        lines.append("Sounds recognised: " + ", ".join(annotation.tags))
    return "\n".join(lines)
