"""A reply in the making, and the finished answer. It knows no model."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from lavis_chatbridge.chat.conversation import Conversation, Medium
from lavis_chatbridge.models.decoding import Finish, Generation, TokenLogprob
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.prompting import Modality

if TYPE_CHECKING:
    from torch import Tensor

    from lavis_chatbridge.models.kept import Element

Event: TypeAlias = "str | Answer | Exception"
"""A reply's events: pieces of text, then the whole answer; or an exception, and nothing more."""
Asked: TypeAlias = "Conversation | str | Sequence[int]"
"""A conversation whose last message is the user's; or a text, or token ids, to be continued as they are."""


@dataclass(frozen=True)
class MediaNote:
    """A medium of message ``turn``: whether it reached the model, in how many soft tokens, and warnings."""

    modality: Modality
    name: str
    turn: int
    reached: bool
    tokens: int
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, medium: Medium, turn: int) -> MediaNote:
        """The note on a medium that has been read."""
        seen = medium.perceived
        tokens = 0 if seen is None or seen.soft is None else len(seen.soft)
        return cls(medium.modality, medium.name, turn, medium.reached, tokens, seen.warnings if seen else ())


@dataclass(frozen=True)
class Answer:
    """A reply, and how it came about. ``str(answer)`` is its text.

    Attributes:
        text: The reply.
        finish: ``"stop"`` if the model ended it, ``"length"`` at its limit, ``"cancelled"`` if a caller ended it.
        reused_tokens: Positions of the prompt whose keys and values were kept from an earlier reply.
        media: Notes on the media of all messages that the model got.
        turn: The number of the user's message that it answers.
        dropped: Messages at the start of the conversation that did not fit into the context.
        first_token_seconds: From the request to the first token, the opening of media included.
        ids: The reply's token ids; None if they are not exactly its text and end.
        logprobs: For each token its id, its log-probability, and those of the likeliest tokens, if requested.
    """

    text: str
    finish: Finish
    tokens: int
    prompt_tokens: int
    reused_tokens: int
    media: tuple[MediaNote, ...]
    turn: int
    dropped: int
    first_token_seconds: float
    ids: tuple[int, ...] | None = field(default=None, repr=False)
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return self.text

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know about this message's media and about messages that the model did not get."""
        about = [f"{note.name}: {w}" for note in self.media if note.turn == self.turn for w in note.warnings]
        if self.dropped:
            about.append(
                f"the conversation is longer than the context: its first {self.dropped} messages were left out"
            )
        return tuple(about)


@dataclass
class Prompt:
    """A conversation in positions; ``soft`` tokens by the keys in ``elements``. See `Answer` for the other fields."""

    elements: list[Element]
    soft: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[MediaNote, ...] = ()
    turn: int = 0
    dropped: int = 0
    stops: tuple[str, ...] = ()
    end_ids: frozenset[int] = frozenset()


class Reply(Iterator[str]):
    """One reply in the making: iterate over it for pieces of text as they become certain.

    Args:
        asked: The prompt.
        sampling: How tokens are chosen.
        deliver: Called from the engine's threads with each `Event`; without it the reply itself keeps them.
    """

    def __init__(self, asked: Asked, sampling: Sampling, deliver: Callable[[Event], None] | None) -> None:
        self.asked, self.sampling = asked, sampling
        self.started = time.monotonic()
        self.generation: Generation | None = None
        self.prompt: Prompt | None = None
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._deliver = deliver or self._events.put
        self._result: Future[Answer] = Future()
        self.cancelled = False
        """Whether a caller has ended it."""

    def __next__(self) -> str:
        event = self._events.get()
        if isinstance(event, str):
            return event
        self._events.put(event)  # whoever iterates again gets the end again
        if isinstance(event, Exception):
            raise event
        raise StopIteration

    @property
    def answer(self) -> Answer:
        """The whole answer, once it is complete.

        Raises:
            ChatBridgeError: If it could not be given.
        """
        return self._result.result()

    @property
    def done(self) -> bool:
        """Whether the reply is complete, or has failed."""
        return self._result.done()

    def cancel(self) -> None:
        """End the reply at its next token; may be called from any thread."""
        self.cancelled = True
        if self.generation is not None:
            self.generation.cancel()

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *fault: object) -> None:
        self.cancel()

    def send(self, text: str) -> None:
        """Deliver text (by the engine), and the answer if the generation is complete."""
        if text:
            self._deliver(text)
        if self.generation is not None and self.generation.done:
            assert self.prompt is not None
            answer = _answer(self.generation, self.prompt)
            self._result.set_result(answer)
            self._deliver(answer)

    def fail(self, error: Exception) -> None:
        """Deliver the fault that ends it (by the engine)."""
        if not self._result.done():
            self._result.set_exception(error)
            self._deliver(error)


def _answer(generation: Generation, prompt: Prompt) -> Answer:
    assert generation.finish is not None
    return Answer(
        text=generation.stream.text,
        finish=generation.finish,
        tokens=len(generation.ids),
        prompt_tokens=len(generation.elements),
        reused_tokens=generation.reused,
        media=prompt.notes,
        turn=prompt.turn,
        dropped=prompt.dropped,
        first_token_seconds=generation.first_token or 0.0,
        ids=_kept_ids(generation, prompt.stops),
        logprobs=tuple(generation.logprobs),
    )


def _kept_ids(generation: Generation, stops: Sequence[str]) -> tuple[int, ...] | None:
    """The reply's tokens, unless they hold more than its text and the end that the template knows."""
    stopped = generation.stream.stopped
    if stopped is None:
        return tuple(generation.ids)
    decoded = generation.stream.codec.decode(generation.ids)
    return tuple(generation.ids) if stopped in stops and decoded.endswith(stopped) else None
