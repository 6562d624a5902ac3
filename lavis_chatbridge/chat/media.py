"""The media of a conversation: opened, encoded and perceived once, with a note on what reached the model of each.

It knows the model and its processors, no conversation format.

Shapes: ``Q`` soft tokens, ``D`` width of the language model.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavis_chatbridge.errors import MediaError, TooShortError
from lavis_chatbridge.media import Source
from lavis_chatbridge.media.source import file_of, media_errors
from lavis_chatbridge.media.types import AudioClips
from lavis_chatbridge.processors.fbank import MEAN, STD
from lavis_chatbridge.prompting.pieces import KINDS, Kind

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

    kind: Kind
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
        source: A path, the bytes of a file, an array, or a Pillow image.
        track: It is the sound track of the video before it, and may be missing.
        name: What to call it; made from the source where empty.
        perceived: What the model sees, once that is known.
    """

    kind: Kind
    source: Source
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
    images: Sequence[Source] = (),
    videos: Sequence[Source] = (),
    audios: Sequence[Source] = (),
    media: Sequence[tuple[Kind, Source]] = (),
    hear_videos: bool = True,
) -> list[Medium]:
    """The media of one turn: images, videos, sounds, then ``media`` in their own order.

    Args:
        images: Pictures.
        videos: Videos.
        audios: Sounds; a video among them is its sound track.
        media: Kinds and sources, in any order.
        hear_videos: Each video is followed by its own sound track.

    Raises:
        MediaError: If one has a kind that does not exist, or a single path stands where a list is expected.
    """
    listed: list[tuple[Kind, Source]] = []
    for kind, sources in zip(KINDS, (images, videos, audios), strict=True):
        if isinstance(sources, (str, bytes, bytearray, os.PathLike)):
            raise MediaError(sources, f"{kind}s are given as a list")
        listed += [(kind, source) for source in sources]
    result: list[Medium] = []
    for kind, source in [*listed, *media]:
        if kind not in KINDS:
            raise MediaError(source, f"a medium of kind {kind!r}; the kinds are {', '.join(KINDS)}")
        result.append(Medium(kind, source))
        if kind == "video" and hear_videos:
            result.append(Medium("audio", source, track=True))
    return result


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
        self._processors = {kind: processors[kind]["eval"] for kind in KINDS}
        self._capacity = capacity
        self._known: OrderedDict[str, Perceived] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, media: Sequence[Medium]) -> None:
        """See to it that every medium is perceived, those of a kind in one batch.

        Raises:
            MediaError: If one cannot be opened; a video's own sound track is then only noted.
        """
        todo: dict[Kind, list[tuple[Medium, str, Any, tuple[str, ...]]]] = {}
        for medium in media:
            if medium.perceived is not None:
                continue
            key = self._key(medium)
            medium.perceived = self._remembered(key)
            if medium.perceived is None:
                try:
                    prepared, warnings = self._prepare(medium)
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
    def _perceive(self, kind: Kind, entries: Sequence[tuple[Medium, str, Any, tuple[str, ...]]]) -> list[Tensor]:
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
        if not processor.opener.has_audio_track(medium.source, limits=processor.limits):
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

    def _key(self, medium: Medium) -> str:
        version = getattr(self._processors[medium.kind], "version", "")
        return f"{medium.kind}/{medium.track}/{version}/{_digest(medium.source)}"

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
    """What tells contents apart.

    Raises:
        MediaError: If there is no such file.
    """
    digest = hashlib.sha256()
    if isinstance(source, np.ndarray):
        digest.update(f"array {source.dtype} {source.shape} ".encode())
        digest.update(np.ascontiguousarray(source).tobytes())
    elif hasattr(source, "tobytes") and hasattr(source, "mode"):
        with media_errors(source):
            digest.update(f"picture {source.mode} {source.size} ".encode() + source.tobytes())
    else:
        file = file_of(source)
        with media_errors(source), open(file, "rb") if isinstance(file, str) else io.BytesIO(source) as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _name(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.path.basename(os.fspath(source)) or str(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    shape = getattr(source, "shape", None)
    return "picture" if shape is None else f"array {'x'.join(map(str, shape))}"
