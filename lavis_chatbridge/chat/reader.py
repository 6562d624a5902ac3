"""Opens, encodes and perceives media, each once. It knows the model and its processors, no messages.

Shapes: ``Q`` soft tokens, ``D`` width of the language model.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lavis_chatbridge.chat.conversation import Content, Medium
from lavis_chatbridge.errors import MediaError, TooShortError
from lavis_chatbridge.files import hash_of_file
from lavis_chatbridge.media import has_audio_track
from lavis_chatbridge.media.audio import rated
from lavis_chatbridge.media.source import file_of, media_errors
from lavis_chatbridge.media.types import AudioClips
from lavis_chatbridge.processors.fbank import is_silent
from lavis_chatbridge.prompting.conversation import MODALITIES

if TYPE_CHECKING:
    from lavis_chatbridge.models.chatbridge import ChatBridge

_REMEMBERED = 64  # media
NO_TRACK = "the video has no audio track"
SILENT = "it is silent"
SILENT_TRACK = "the video's audio track is silent"


@dataclass(frozen=True)
class Perceived:
    """A medium as the model sees it: ``[Q, D]`` soft tokens under a hash, or None if it could not reach the model."""

    key: str
    soft: Tensor | None = field(repr=False)
    warnings: tuple[str, ...] = ()


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
        """Perceive every medium that is not perceived yet.

        Raises:
            MediaError: If one cannot be opened; a video's own sound track then only gets a warning.
        """
        for medium in media:
            if medium.perceived is not None:
                continue
            try:
                medium.perceived = self._read(medium)
            except MediaError as error:  # users know its name, and no path of a server
                raise MediaError(medium.name, error.cause.replace(error.source, medium.name)) from error

    def _read(self, medium: Medium) -> Perceived:
        key = f"{medium.modality}/{medium.track}/{_hash(medium.content)}"
        if (known := self._known.get(key)) is not None:
            return known
        prepared, warnings = self._prepare(medium)
        perceived = Perceived(key, None if prepared is None else self._perceive(medium, prepared), warnings)
        with self._lock:
            self._known[key] = perceived
            if len(self._known) > _REMEMBERED:
                del self._known[next(iter(self._known))]
        return perceived

    @torch.no_grad()
    def _perceive(self, medium: Medium, prepared: Any) -> Tensor:
        """Soft tokens in the precision of the language model."""
        encoded = self._model.encode_media(medium.modality, [prepared])
        [soft] = self._model.perceive_media(medium.modality, encoded)
        return soft.to(self._model.llama_model.get_input_embeddings().weight.dtype)

    def _prepare(self, medium: Medium) -> tuple[Any, tuple[str, ...]]:
        """The encoder's input (None if the medium has nothing for it), and warnings."""
        processor = self.processors[medium.modality]
        try:
            prepared = processor(medium.content)
        except TooShortError as error:
            return None, (error.cause,)
        except MediaError as error:
            if not medium.track:
                raise
            heard = processor.opener(has_audio_track, medium.content, limits=processor.limits)
            return None, (f"the video's audio track cannot be read: {error.cause}" if heard else NO_TRACK,)
        if not isinstance(prepared, AudioClips) or not is_silent(prepared):
            return prepared, ()
        return (None, (SILENT_TRACK,)) if medium.track else (prepared, (SILENT,))


def _hash(content: Content) -> str:
    """The SHA-256 of a file's bytes, or of an array with its type, shape and sampling rate.

    Raises:
        MediaError: If there is no such file.
    """
    array, rate = rated(content)
    if isinstance(array, np.ndarray):
        head = f"array {array.dtype} {array.shape} {rate} ".encode()
        return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()
    file = file_of(array)
    with media_errors(array):
        return hash_of_file(file) if isinstance(file, str) else hashlib.sha256(file.getbuffer()).hexdigest()
