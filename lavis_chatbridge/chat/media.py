"""The media of a conversation: opened, encoded and perceived once, with a note on what reached the model of each.

It knows the model and its processors, no conversation format.

Shapes: ``Q`` soft tokens, ``D`` width of the language model.
"""

from __future__ import annotations

import hashlib
import io
import numbers
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lavis_chatbridge.errors import MediaError, TooShortError
from lavis_chatbridge.media import Sound, Source, has_audio_track
from lavis_chatbridge.media.audio import rated
from lavis_chatbridge.media.source import file_of, is_file, media_errors
from lavis_chatbridge.media.types import AudioClips
from lavis_chatbridge.processors.fbank import MEAN, STD
from lavis_chatbridge.prompting.pieces import MODALITIES, Modality

Images: TypeAlias = "Sequence[Source] | Source"
"""Pictures, or videos; a single one stands for a list of one."""
Sounds: TypeAlias = "Sequence[Sound] | Sound"
"""Sounds; a single one stands for a list of one."""
KindsAndSources: TypeAlias = "Sequence[tuple[Modality, Sound]] | tuple[Modality, Sound]"
"""Media of any kind; a single pair stands for a list of one."""

SILENCE = (8.0 - MEAN) / (2.0 * STD)
"""A filterbank none of whose values is above this is of silence: they stay below the rounding of 16-bit samples."""
NO_TRACK = "the video has no audio track"
SILENT = "it is silent"
SILENT_TRACK = "the video's audio track is silent"


@dataclass(frozen=True)
class MediaNote:
    """What became of one medium.

    Attributes:
        kind: ``"image"``, ``"video"`` or ``"audio"``.
        name: The file's name, or what else is known of it.
        turn: The turn that brought it, from 0.
        reached: Whether the model got it.
        tokens: Soft tokens that stand for it.
        warnings: What the user should know about it.
    """

    kind: Modality
    name: str
    turn: int
    reached: bool
    tokens: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Perceived:
    """A medium as the model sees it.

    Attributes:
        key: The same for the same content, prepared the same way.
        soft: ``[Q, D]`` soft tokens, none if it could not reach the model.
        warnings: What the user should know.
    """

    key: str
    soft: Tensor | None
    warnings: tuple[str, ...] = ()


@dataclass(eq=False)
class Medium:
    """A medium that a turn brings.

    Args:
        kind: ``"image"``, ``"video"`` or ``"audio"``.
        source: A path, the bytes of a file, an array, a Pillow image, or samples with their rate in Hz.
        track: It is the sound track of the video before it, and may be missing.
        name: What to call it; made from the source where empty.
        perceived: What the model sees, once that is known.
    """

    kind: Modality
    source: Sound
    track: bool = False
    name: str = ""
    perceived: Perceived | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.name:
            self.name = f"{_name(self.source)}'s sound track" if self.track else _name(self.source)

    @property
    def reached(self) -> bool:
        """Whether the model gets it."""
        return self.perceived is not None and self.perceived.soft is not None

    def note(self, turn: int) -> MediaNote:
        """What became of it."""
        seen = self.perceived
        tokens = 0 if seen is None or seen.soft is None else len(seen.soft)
        return MediaNote(self.kind, self.name, turn, self.reached, tokens, seen.warnings if seen else ())


def media_of_turn(
    images: Images = (),
    videos: Images = (),
    audios: Sounds = (),
    media: KindsAndSources = (),
    hear_videos: bool = True,
) -> list[Medium]:
    """The media of one turn: images, videos, sounds, then ``media`` in their own order.

    Args:
        images: Pictures, or one. An array is one picture.
        videos: Videos, or one. An array is one video.
        audios: Sounds, or one; a video among them is its sound track. An array is one sound, of 16 kHz where it is not
            given as ``(array, rate in Hz)``.
        media: Kinds and sources, in any order, or one pair of them.
        hear_videos: Each video is followed by its own sound track.

    Raises:
        MediaError: If one has a kind that does not exist, or something else stands where media are expected.
    """
    given: list[tuple[Modality, Any]] = []
    for kind, sources in zip(MODALITIES, (images, videos, audios), strict=True):
        given += [(kind, source) for source in _listed(kind, sources)]
    result: list[Medium] = []
    for kind, source in [*given, *_pairs(media)]:
        result.append(Medium(kind, source))
        if kind == "video" and hear_videos:
            result.append(Medium("audio", source, track=True))
    return result


def _listed(kind: Modality, sources: Any) -> list[Any]:
    """Media of one kind, a single one as a list of one."""
    with_rate = isinstance(sources, tuple) and any(isinstance(part, numbers.Real) for part in sources)
    if is_file(sources) or isinstance(sources, np.ndarray) or _is_pillow(sources) or with_rate:
        return [sources]
    if isinstance(sources, Mapping) or not isinstance(sources, Iterable):
        found = type(sources).__name__
        raise MediaError(
            sources, f"{kind}s are given as a list of paths, bytes, arrays or Pillow images, not a {found}"
        )
    return list(sources)


def _pairs(media: Any) -> list[tuple[Modality, Any]]:
    """Kinds and sources, checked; a single pair as a list of one."""
    single = isinstance(media, tuple) and len(media) == 2 and isinstance(media[0], str)
    pairs = [media] if single else media
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        raise MediaError(media, "media are given as a list of pairs, each a kind and a source: [('image', 'a.png')]")
    for kind, source in pairs:
        if not isinstance(kind, str) or kind not in MODALITIES:
            raise MediaError(source, f"a medium of kind {kind!r:.80}; the kinds are {', '.join(MODALITIES)}")
    return [(kind, source) for kind, source in pairs]


class MediaReader:
    """Opens and perceives media, and remembers the last ones by their content.

    Several conversations, and several threads, may share one.

    Args:
        model: The ChatBridge.
        processors: As `processors.load_processors` gives them.
        capacity: How many media are remembered.
    """

    def __init__(self, model: Any, processors: Mapping[str, Mapping[str, Any]], capacity: int = 64) -> None:
        self._model = model
        self.processors = processors
        self._processors = {kind: processors[kind]["eval"] for kind in MODALITIES}
        self._capacity = capacity
        self._known: OrderedDict[str, Perceived] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, media: Sequence[Medium]) -> None:
        """See to it that every medium is perceived, those of a kind in one batch.

        Raises:
            MediaError: If one cannot be opened; a video's own sound track is then only noted.
        """
        todo: dict[Modality, list[tuple[Medium, str, Any, tuple[str, ...]]]] = {}
        for medium in media:
            if medium.perceived is not None:
                continue
            # What a Pillow image shows (palette, transparency, EXIF, frames) is known by what comes of it.
            early = self._prepare(medium) if _is_pillow(medium.source) and not medium.track else None
            key = self._key(medium, None if early is None else early[0])
            medium.perceived = self._remembered(key)
            if medium.perceived is None:
                try:
                    prepared, warnings = early or self._prepare(medium)
                except TooShortError as error:
                    medium.perceived = self._remember(Perceived(key, None, (error.cause,)))
                except _NothingToHear as error:
                    medium.perceived = self._remember(Perceived(key, None, (str(error),)))
                else:
                    todo.setdefault(medium.kind, []).append((medium, key, prepared, warnings))
        for kind, entries in todo.items():
            for (medium, key, _, warnings), soft in zip(entries, self._perceive(kind, entries), strict=True):
                medium.perceived = self._remember(Perceived(key, soft, warnings))

    @torch.no_grad()
    def _perceive(self, kind: Modality, entries: Sequence[tuple[Medium, str, Any, tuple[str, ...]]]) -> list[Tensor]:
        """Soft tokens in the precision of the language model."""
        encoded = self._model.encode_media(kind, [prepared for _, _, prepared, _ in entries])
        dtype = self._model.llama_model.get_input_embeddings().weight.dtype
        return [soft.to(dtype) for soft in self._model.perceive_media(kind, encoded)]

    def _prepare(self, medium: Medium) -> tuple[Any, tuple[str, ...]]:
        processor = self._processors[medium.kind]
        if not medium.track:
            prepared = processor(medium.source)
            silent = isinstance(prepared, AudioClips) and _is_silent(prepared)
            return prepared, (SILENT,) if silent else ()
        if not processor.opener(has_audio_track, medium.source, limits=processor.limits):
            raise _NothingToHear(NO_TRACK)
        try:
            prepared = processor(medium.source)
        except TooShortError:
            raise
        except MediaError as error:
            raise _NothingToHear(f"the video's audio track cannot be read: {error.cause}") from error
        if _is_silent(prepared):
            raise _NothingToHear(SILENT_TRACK)
        return prepared, ()

    def _key(self, medium: Medium, prepared: Tensor | None) -> str:
        version = getattr(self._processors[medium.kind], "version", "")
        if prepared is not None:
            content = f"prepared {_digest(prepared.numpy())}"
        else:  # a Pillow image has no sound track, whatever it shows
            content = "picture" if _is_pillow(medium.source) else _digest(medium.source)
        return f"{medium.kind}/{medium.track}/{version}/{content}"

    def _remembered(self, key: str) -> Perceived | None:
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def _remember(self, perceived: Perceived) -> Perceived:
        with self._lock:
            self._known[perceived.key] = perceived
            while len(self._known) > self._capacity:
                self._known.popitem(last=False)
        return perceived


class _NothingToHear(Exception):
    """A video's own sound track has nothing for the model."""


def _is_silent(clips: AudioClips) -> bool:
    return all(bool((bank[: int(n)] <= SILENCE).all()) for bank, n in zip(clips.fbank, clips.frames, strict=True))


def _digest(source: Any) -> str:
    """What tells contents apart: those of files, and of arrays with or without a sampling rate.

    Raises:
        MediaError: If there is no such file.
    """
    digest = hashlib.sha256()
    source, rate = rated(source)
    if isinstance(source, np.ndarray):
        digest.update(f"array {source.dtype} {source.shape} {rate} ".encode())
        digest.update(np.ascontiguousarray(source).tobytes())
    else:
        file = file_of(source)
        with media_errors(source), open(file, "rb") if isinstance(file, str) else io.BytesIO(source) as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _is_pillow(source: Any) -> bool:
    return hasattr(source, "tobytes") and hasattr(source, "mode")


def _name(source: Any) -> str:
    if isinstance(source, tuple) and len(source) == 2:
        return f"{_name(source[0])} at {source[1]} Hz"
    if isinstance(source, (str, os.PathLike)):
        return os.path.basename(os.fspath(source)) or str(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    shape = getattr(source, "shape", None)
    return "picture" if shape is None else f"array {'x'.join(map(str, shape))}"
