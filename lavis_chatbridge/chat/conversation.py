"""A conversation and its prompt: each medium is encoded to soft tokens once, and the messages become the model's input.

Shapes: ``Q`` soft tokens, ``D`` width of the language model.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lavis_chatbridge.errors import MediaError, PromptError, TooShortError
from lavis_chatbridge.files import hash_of_file
from lavis_chatbridge.media import has_audio_track
from lavis_chatbridge.media.source import AudioClips, Sound, file_of, media_errors, rated
from lavis_chatbridge.models.layout import Element, elements_of
from lavis_chatbridge.models.templates import Template
from lavis_chatbridge.prompting.conversation import MODALITIES, Message, Modality, slots_of

if TYPE_CHECKING:
    from lavis_chatbridge.models.chatbridge import ChatBridge
    from lavis_chatbridge.processors.base import Processor

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


@dataclass(eq=False)
class Medium:
    """A medium of a message.

    Attributes:
        content: A path, the bytes of a file, an array, or samples with their rate in Hz.
        name: Shown to users.
        track: Whether it is the sound track of the video before it, which may be missing.
        perceived: Its soft tokens, once the model has seen it.
    """

    modality: Modality
    content: Sound
    name: str = ""
    track: bool = False
    perceived: Perceived | None = field(default=None, repr=False)

    def with_track(self, heard: bool) -> list[Medium]:
        """The medium and, if it is a video that is ``heard``, its sound track; arrays have none."""
        if self.modality != "video" or not heard or isinstance(self.content, np.ndarray):
            return [self]
        return [self, Medium("audio", self.content, f"{self.name}'s sound track", track=True)]


@dataclass(frozen=True)
class ChatMessage:
    """A message of ``"user"`` or ``"assistant"``."""

    role: str
    text: str
    media: tuple[Medium, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise PromptError(
                f"a message is a text, found {self.text!r:.80}; media are given as images=, videos=, audios="
            )

    @property
    def worded(self) -> Message:
        """The message for a template, with the media that reach the model."""
        reached = [m.modality for m in self.media if m.perceived is not None and m.perceived.soft is not None]
        return Message(self.role, self.text, tuple(reached))


@dataclass
class Conversation:
    """Messages, and the system prompt before them."""

    messages: list[ChatMessage] = field(default_factory=list)
    system: str = ""

    def asking(self, text: str, media: Sequence[Medium] = ()) -> Conversation:
        """A copy with one more message of the user.

        Raises:
            PromptError: If the text is not a string, or there are neither words nor media.
        """
        message = ChatMessage("user", text, tuple(media))
        if not text.strip() and not media:
            raise PromptError("the question is empty, and there is no medium to speak about")
        return replace(self, messages=[*self.messages, message])

    def add(self, message: ChatMessage) -> None:
        """Append a message. Roles alternate: neighbours of one role are joined, and the user begins."""
        last = self.messages[-1] if self.messages else ChatMessage("assistant", "")
        if last.role != message.role:
            self.messages.append(message)
        elif not self.messages:
            self.messages += [ChatMessage("user", ""), message]
        else:
            text = "\n".join(filter(None, (last.text, message.text)))
            self.messages[-1] = ChatMessage(message.role, text, (*last.media, *message.media))


class MediaReader:
    """Opens and perceives media, and remembers the last ones by their content. Several threads may share one.

    Args:
        model: The ChatBridge.
        processors: As `processors.load_processors` returns them.
    """

    def __init__(self, model: ChatBridge, processors: Mapping[str, Mapping[str, Processor]]) -> None:
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
            except MediaError as error:  # users know its name; a server's paths stay private
                raise MediaError(medium.name, error.cause.replace(error.source, medium.name)) from error

    def _read(self, medium: Medium) -> Perceived:
        key = f"{medium.modality}/{medium.track}/{_hash(medium.content)}"
        if (known := self._known.get(key)) is not None:
            return known
        prepared, *warnings = self._prepare(medium)
        soft = None
        if prepared is not None:
            with torch.no_grad():
                encoded = self._model.encode_media(medium.modality, [prepared])
                [soft] = self._model.perceive_media(medium.modality, encoded)
            soft = soft.to(self._model.llama_model.get_input_embeddings().weight.dtype)
        with self._lock:
            self._known[key] = perceived = Perceived(key, soft, tuple(warnings))
            if len(self._known) > _REMEMBERED:
                del self._known[next(iter(self._known))]
        return perceived

    def _prepare(self, medium: Medium) -> tuple[Any, ...]:
        """The encoder's input (None if the medium has nothing for it), then warnings."""
        from lavis_chatbridge.processors.audio import is_silent  # LAVIS takes seconds to import

        processor = self.processors[medium.modality]
        try:
            prepared = processor(medium.content)
        except TooShortError as error:
            return None, error.cause
        except MediaError as error:
            if not medium.track:
                raise
            heard = processor.opener(has_audio_track, medium.content, limits=processor.limits)
            return None, f"the video's audio track cannot be read: {error.cause}" if heard else NO_TRACK
        if not isinstance(prepared, AudioClips) or not is_silent(prepared):
            return (prepared,)
        return (None, SILENT_TRACK) if medium.track else (prepared, SILENT)


def _hash(content: Sound) -> str:
    """The SHA-256 of a file's bytes, or of an array with its type, shape and sampling rate."""
    array, rate = rated(content)
    if isinstance(array, np.ndarray):
        head = f"array {array.dtype} {array.shape} {rate} ".encode()
        return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()
    file = file_of(array)
    with media_errors(array):
        return hash_of_file(file) if isinstance(file, str) else hashlib.sha256(file.getbuffer()).hexdigest()


@dataclass(frozen=True)
class MediaNote:
    """A medium of an answered conversation: its number of soft tokens, and warnings.

    ``new`` media belong to the message that is answered.
    """

    modality: Modality
    name: str
    new: bool
    tokens: int
    warnings: tuple[str, ...] = ()

    @property
    def reached(self) -> bool:
        """Whether the model got it."""
        return self.tokens > 0


@dataclass
class Prompt:
    """A conversation in positions, as the model reads it.

    Attributes:
        soft: ``[Q, D]`` soft tokens by the keys in ``elements``.
        dropped: Number of messages at the start of the conversation that did not fit into the context.
    """

    elements: list[Element]
    template: Template
    soft: dict[str, Tensor] = field(default_factory=dict)
    media: tuple[MediaNote, ...] = ()
    dropped: int = 0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know about new media, and about messages that the model does not get."""
        about = [f"{note.name}: {warning}" for note in self.media if note.new for warning in note.warnings]
        if self.dropped:
            words = f"its first {self.dropped} messages were left out"
            about.append(f"the conversation is longer than the context: {words}")
        return tuple(about)


def word(conversation: Conversation, template: Template, room: int, max_context: int) -> Prompt:
    """The prompt of as many of the last messages as fit beside ``room`` new tokens; all media have been read."""
    messages = conversation.messages
    for start in range(0, len(messages), 2):
        prompt = _prompt(messages[start:], template)
        last = start == len(messages) - 1
        if len(prompt.elements) + (1 if last else room) <= max_context:
            break
    prompt.dropped = start
    return prompt


def _prompt(messages: Sequence[ChatMessage], template: Template) -> Prompt:
    pieces = template.prompt([message.worded for message in messages], generate=True)
    seen: dict[Modality, list[tuple[str, Tensor]]] = {modality: [] for modality in MODALITIES}
    notes = []
    for message in messages:
        for medium in message.media:
            own = medium.perceived
            assert own is not None
            if own.soft is not None:
                seen[medium.modality].append((own.key, own.soft))
            tokens = 0 if own.soft is None else len(own.soft)
            notes.append(MediaNote(medium.modality, medium.name, message is messages[-1], tokens, own.warnings))
    found = {slot: seen[slot.modality][slot.index] for slot in slots_of(pieces)}
    return Prompt(elements_of(pieces, found, template.tokenizer), template, dict(found.values()), tuple(notes))
