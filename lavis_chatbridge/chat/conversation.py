"""A conversation as plain data. It knows no model, no template and no file format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from lavis_chatbridge.errors import PromptError
from lavis_chatbridge.media.source import Sound
from lavis_chatbridge.prompting.conversation import Message, Modality

if TYPE_CHECKING:
    from lavis_chatbridge.chat.reader import Perceived


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

    @property
    def reached(self) -> bool:
        """Whether the model gets it."""
        return self.perceived is not None and self.perceived.soft is not None

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
        return Message(self.role, self.text, tuple(m.modality for m in self.media if m.reached))


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
