"""The media of a conversation: collected from a caller's arguments, opened, encoded and perceived once.

It knows the model and its processors, no messages.

Shapes: ``Q`` soft tokens, ``D`` width of the language model.
"""

from __future__ import annotations

import hashlib
import io
import numbers
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from lavis_chatbridge.chat.conversation import Medium
from lavis_chatbridge.chat.sources import Access, open_url
from lavis_chatbridge.errors import MediaError, TooShortError
from lavis_chatbridge.media import Sound, Source, has_audio_track
from lavis_chatbridge.media.audio import rated
from lavis_chatbridge.media.source import file_of, is_file, media_errors
from lavis_chatbridge.media.types import AudioClips
from lavis_chatbridge.processors.fbank import MEAN, STD
from lavis_chatbridge.prompting.pieces import MODALITIES, Modality

if TYPE_CHECKING:
    from lavis_chatbridge.models.chatbridge import ChatBridge

Images: TypeAlias = "Sequence[Source] | Source"
"""Images or videos; a single one stands for a list of one."""
Sounds: TypeAlias = "Sequence[Sound] | Sound"
"""Sounds; a single one stands for a list of one."""
Pairs: TypeAlias = "Sequence[tuple[Modality, Sound]] | tuple[Modality, Sound]"
"""Media of any modality; a single pair stands for a list of one."""

SILENCE = (8.0 - MEAN) / (2.0 * STD)
"""The filterbank of a silent sound has no value above this: its samples stay below the rounding of 16 bits."""
_REMEMBERED = 64  # media
NO_TRACK = "the video has no audio track"
SILENT = "it is silent"
SILENT_TRACK = "the video's audio track is silent"


@dataclass(frozen=True)
class MediaNote:
    """What became of one medium.

    Attributes:
        modality: ``"image"``, ``"video"`` or ``"audio"``.
        name: The file's name, or another description.
        turn: The number of its message, from 0.
        reached: Whether the model got it.
        tokens: Its number of soft tokens.
        warnings: What the user should know about it.
    """

    modality: Modality
    name: str
    turn: int
    reached: bool
    tokens: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Perceived:
    """A medium as the model sees it.

    Attributes:
        key: Hash of its content and of how it was prepared.
        soft: ``[Q, D]`` soft tokens; None if it could not reach the model.
        warnings: What the user should know.
    """

    key: str
    soft: Tensor | None = field(repr=False)
    warnings: tuple[str, ...] = ()


def note_of(medium: Medium, turn: int) -> MediaNote:
    """What became of a medium of message ``turn``."""
    seen = medium.perceived
    tokens = 0 if seen is None or seen.soft is None else len(seen.soft)
    return MediaNote(medium.modality, medium.name, turn, medium.reached, tokens, seen.warnings if seen else ())


def media_of(
    images: Images = (),
    videos: Images = (),
    audios: Sounds = (),
    media: Pairs = (),
    hear_videos: bool = True,
    access: Access | None = None,
) -> list[Medium]:
    """The media of one message: images, videos, sounds, then ``media`` in their own order.

    Args:
        images: Images, or one. An array or a tensor is one image.
        videos: Videos, or one. An array or a tensor, and a list of still Pillow images, is one video.
        audios: Sounds, or one; a video's file stands for its sound track. An array is one sound at 16 kHz, or
            ``(array, rate in Hz)``.
        media: Pairs of modality and source in any order, or one pair.
        hear_videos: Each video is followed by its own sound track.
        access: Which ``http(s)`` URLs may be fetched; by default none.

    Raises:
        MediaError: If a modality or a source has no known form.
    """
    given: list[tuple[Modality, Any]] = []
    for modality, sources in zip(MODALITIES, (images, videos, audios), strict=True):
        given += [(modality, source) for source in _listed(modality, sources)]
    result: list[Medium] = []
    for modality, source in [*given, *_pairs(media)]:
        plain = _plain(source, access or Access())
        result.append(Medium(modality, plain))
        if modality == "video" and hear_videos and not isinstance(plain, list):
            result.append(Medium("audio", plain, track=True))
    return result


def _listed(modality: Modality, sources: Any) -> list[Any]:
    """Media of one modality, a single one as a list of one."""
    with_rate = isinstance(sources, tuple) and any(isinstance(part, numbers.Real) for part in sources)
    single = isinstance(sources, (np.ndarray, Tensor, Image)) or is_file(sources) or hasattr(sources, "read")
    if single or with_rate:
        return [sources]
    if isinstance(sources, Mapping) or not isinstance(sources, Iterable):
        found = type(sources).__name__
        raise MediaError(
            sources,
            f"{modality}s are given as paths, bytes, file objects, URLs, arrays, tensors or Pillow images, "
            f"one or a list of them, not a {found}",
        )
    listed = list(sources)
    still = [isinstance(one, Image) and getattr(one, "n_frames", 1) == 1 for one in listed]
    return [listed] if modality == "video" and listed and all(still) else listed


def _pairs(media: Any) -> list[tuple[Modality, Any]]:
    """Modalities and sources, checked; a single pair as a list of one."""
    single = isinstance(media, tuple) and len(media) == 2 and isinstance(media[0], str)
    pairs = [media] if single else media
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        raise MediaError(media, "media are given as a list of pairs, each (modality, source): [('image', 'a.png')]")
    for modality, source in pairs:
        if not isinstance(modality, str) or modality not in MODALITIES:
            raise MediaError(source, f"unknown modality {modality!r:.80}; known are {', '.join(MODALITIES)}")
    return [(modality, source) for modality, source in pairs]


def _plain(source: Any, access: Access) -> Any:
    """A source in a form that `media` opens: file objects and URLs as bytes, tensors as arrays."""
    if isinstance(source, str) and source.partition(":")[0].lower() in ("http", "https", "data"):
        return open_url(source, source[:60], access)
    if hasattr(source, "read"):
        content = source.read()
        if not isinstance(content, bytes):
            raise MediaError(source, "the file object gives text: open the file in binary mode ('rb')")
        return content
    if isinstance(source, Tensor):
        return _array(source)
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Tensor):
        return source[0].detach().cpu().numpy(), source[1]
    return source


def _array(tensor: Tensor) -> np.ndarray:
    """A tensor as an array, with torch's channels-first images and videos turned to channels-last."""
    tensor = tensor.detach().cpu()
    array = (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()
    if array.ndim in (3, 4) and array.shape[-3] in (1, 3) and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, -3, -1)
        array = array[..., 0] if array.shape[-1] == 1 else array
    return array


class MediaReader:
    """Opens and perceives media, and remembers the last ones by their content. Several threads may share one.

    Args:
        model: The ChatBridge.
        processors: As `processors.load_processors` gives them.
    """

    def __init__(self, model: ChatBridge, processors: Mapping[str, Mapping[str, Any]]) -> None:
        self._model = model
        self.processors = {modality: processors[modality]["eval"] for modality in MODALITIES}
        self._known: dict[str, Perceived] = {}
        self._lock = threading.Lock()

    def read(self, media: Sequence[Medium]) -> None:
        """Perceive every medium that is not perceived yet, those of a modality in one batch.

        Raises:
            MediaError: If one cannot be opened; a video's own sound track then only gets a warning.
        """
        todo: dict[Modality, list[tuple[Medium, str, Any, tuple[str, ...]]]] = {}
        for medium in media:
            if medium.perceived is not None:
                continue
            version = getattr(self.processors[medium.modality], "version", "")
            key = f"{medium.modality}/{medium.track}/{version}/{_hash(medium.source)}"
            medium.perceived = self._known.get(key)
            if medium.perceived is None:
                prepared, warnings = self._prepare(medium)
                if prepared is None:
                    medium.perceived = self._remember(Perceived(key, None, warnings))
                else:
                    todo.setdefault(medium.modality, []).append((medium, key, prepared, warnings))
        for modality, entries in todo.items():
            soft = self._perceive(modality, [prepared for _, _, prepared, _ in entries])
            for (medium, key, _, warnings), tokens in zip(entries, soft, strict=True):
                medium.perceived = self._remember(Perceived(key, tokens, warnings))

    @torch.no_grad()
    def _perceive(self, modality: Modality, prepared: Sequence[Any]) -> list[Tensor]:
        """Soft tokens in the precision of the language model."""
        encoded = self._model.encode_media(modality, prepared)
        dtype = self._model.llama_model.get_input_embeddings().weight.dtype
        return [soft.to(dtype) for soft in self._model.perceive_media(modality, encoded)]

    def _prepare(self, medium: Medium) -> tuple[Any, tuple[str, ...]]:
        """What the encoder takes (None if there is nothing that it could take), and warnings."""
        processor = self.processors[medium.modality]
        try:
            prepared = processor(medium.source)
        except TooShortError as error:
            return None, (error.cause,)
        except MediaError as error:
            if not medium.track:
                raise MediaError(medium.name, error.cause.replace(error.source, medium.name)) from error
            heard = processor.opener(has_audio_track, medium.source, limits=processor.limits)
            return None, (f"the video's audio track cannot be read: {error.cause}" if heard else NO_TRACK,)
        if not isinstance(prepared, AudioClips) or not _is_silent(prepared):
            return prepared, ()
        return (None, (SILENT_TRACK,)) if medium.track else (prepared, (SILENT,))

    def _remember(self, perceived: Perceived) -> Perceived:
        with self._lock:
            self._known[perceived.key] = perceived
            while len(self._known) > _REMEMBERED:
                del self._known[next(iter(self._known))]
        return perceived


def _is_silent(clips: AudioClips) -> bool:
    return all(bool((bank[: int(n)] <= SILENCE).all()) for bank, n in zip(clips.fbank, clips.frames, strict=True))


def _hash(source: Any) -> str:
    """The SHA-256 of a file's bytes, or of an array with its type, shape and sampling rate.

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
