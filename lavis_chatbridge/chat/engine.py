"""The one engine: answers conversations, several at once, with the language model here or on a vLLM server.

Threads open and encode a conversation's media and word its prompt. One thread then runs a local language model, where
every reply joins the others at the next token; a remote one gets each prompt's embeddings in a request. The engine
knows templates and decoding, no user interface and no HTTP.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from lavis_chatbridge.chat.conversation import ChatMessage, Conversation, Medium
from lavis_chatbridge.chat.reader import MediaReader
from lavis_chatbridge.errors import ChatBridgeError, PromptError
from lavis_chatbridge.models import families
from lavis_chatbridge.models.decoding import Decoder
from lavis_chatbridge.models.generation import Finish, Generation, Prefix, TokenLogprob
from lavis_chatbridge.models.layout import Element, elements_of
from lavis_chatbridge.models.remote import RemoteLanguageModel
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.models.templates import Template, load_template
from lavis_chatbridge.prompting.conversation import Modality, check_order, slots_of

if TYPE_CHECKING:
    from torch import Tensor

    from lavis_chatbridge.models.chatbridge import ChatBridge

log = logging.getLogger(__name__)

_USUAL_CONTEXT = 2048
_LEAST_SHARE = 0.5
"""Keys and values of an earlier conversation are used if at least this share of it begins the new one."""
_PREPARERS = 2  # conversations whose media are opened at once


Event: TypeAlias = "str | Answer | Exception"
"""A reply's events: pieces of text, then the whole answer; or an exception, and nothing more."""
Asked: TypeAlias = "Conversation | str | Sequence[int]"
"""A conversation whose last message is the user's; or a text, or token ids, to be continued as they are."""


class QueueFullError(ChatBridgeError):
    """Too many conversations wait for their reply."""


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


class Engine:
    """Answers conversations with one model; several threads may use it.

    Args:
        model: A ChatBridge; it is switched to evaluation.
        reader: Opens and perceives media.
        template: ``"human_assistant"`` (the paper's), ``"vicuna_v1"``, or ``"tokenizer"`` (the language model's own);
            by default the model's.
        max_context: Positions that the model reads at most; by default its own limit. The oldest messages that do not
            fit are left out, in pairs.
        batch: Replies that are generated at once.
        waiting: Further replies that may wait.
        keep: Conversations whose keys and values stay in memory for their next message.

    Raises:
        ConfigError: If the template does not fit the tokenizer.
    """

    def __init__(
        self,
        model: ChatBridge,
        reader: MediaReader,
        template: str | None = None,
        *,
        max_context: int | None = None,
        batch: int = 16,
        waiting: int = 64,
        keep: int = 8,
    ) -> None:
        self.model, self.reader, self.template = model.eval(), reader, template or model.settings.template
        self.codec = model.llama_tokenizer
        self.max_context = max_context or _context_of(model)
        self.load_template("")  # raises now, not at the first message
        self.steps, self.rows = 0, 0
        """Steps of the local decoder, and replies in all of them together."""
        self._batch, self._keep, self._places = batch, keep, batch + waiting
        self._remote = isinstance(model.llama_model, RemoteLanguageModel)
        self._lock = threading.Lock()
        self._present: set[Reply] = set()
        self._ready: list[Reply] = []
        self._prefixes: list[Prefix] = []
        self._thread: threading.Thread | None = None
        self._workers = ThreadPoolExecutor(batch if self._remote else _PREPARERS, "chatbridge-engine")

    def load_template(self, system: str) -> Template:
        """The conversation's format with a system prompt."""
        return load_template(self.template, self.codec, system, self.model.settings.reply_end)

    def reply(
        self, asked: Asked, sampling: Sampling | None = None, deliver: Callable[[Event], None] | None = None
    ) -> Reply:
        """Begin a reply, greedy by default; ``deliver`` gets its events, see `Reply`.

        Raises:
            QueueFullError: If too many replies wait already.
        """
        reply = Reply(asked, sampling or Sampling(), deliver)
        with self._lock:
            self._present = {other for other in self._present if not other.done}
            if len(self._present) >= self._places:
                raise QueueFullError(f"{len(self._present)} replies wait already; try again later")
            self._present.add(reply)
        self._workers.submit(self._begin, reply)
        return reply

    @property
    def present(self) -> int:
        """Replies that wait or are being generated."""
        return sum(not reply.done for reply in list(self._present))

    @property
    def running(self) -> int:
        """Replies that are being generated."""
        return sum(reply.generation is not None and not reply.done for reply in list(self._present))

    def close(self) -> None:
        """End all replies."""
        for reply in list(self._present):
            reply.cancel()
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _begin(self, reply: Reply) -> None:
        """Prepare a reply and queue it for the local language model, or let a remote one complete it."""
        try:
            if reply.cancelled:
                raise PromptError("the reply was cancelled before it began")
            generation = self._prepare(reply)
            if self._remote:
                for text in self.model.llama_model.run(generation):
                    reply.send(text)
                return
            with self._lock:
                self._ready.append(reply)
                if self._thread is None:
                    # Not a daemon: Python aborts if such a thread frees tensors while the interpreter ends.
                    self._thread = threading.Thread(target=self._generate, name="chatbridge-generate")
                    self._thread.start()
        except Exception as error:  # one reply's fault leaves the others alone
            reply.fail(error)

    def _prepare(self, reply: Reply) -> Generation:
        sampling = reply.sampling
        prompt = reply.prompt = self._word(reply.asked, sampling.max_new_tokens)
        room = self.max_context - len(prompt.elements)
        if room <= 0:
            raise PromptError(
                f"this message alone has {len(prompt.elements)} tokens, but the context holds {self.max_context} with "
                "the answer: shorten the text or give fewer media"
            )
        sampling = sampling.model_copy(update={"max_new_tokens": min(sampling.max_new_tokens, room)})
        ends = prompt.stops, prompt.end_ids
        generation = Generation(prompt.elements, prompt.soft, self.codec, sampling, *ends, Prefix())
        generation.started = reply.started
        reply.generation = generation
        if reply.cancelled:  # before it had a generation to cancel
            generation.cancel()
        return generation

    def _word(self, asked: Asked, room: int) -> Prompt:
        """The positions of as many of the last messages as fit beside ``room`` new tokens."""
        if not isinstance(asked, Conversation):
            front = [self.codec.bos_id] if isinstance(asked, str) and self.codec.bos_id is not None else []
            ids: list[Element] = [*front, *(self.codec.encode(asked) if isinstance(asked, str) else asked)]
            return Prompt(ids, end_ids=self.load_template("").end_ids)
        template, messages = self.load_template(asked.system), asked.messages
        check_order([message.worded for message in messages], generate=True)
        self.reader.read([medium for message in messages for medium in message.media])
        for start in range(0, len(messages), 2):
            elements, soft = self._elements(template, messages[start:])
            last = start == len(messages) - 1
            if len(elements) + (1 if last else room) <= self.max_context:
                break
        notes = tuple(MediaNote.of(m, i) for i in range(start, len(messages)) for m in messages[i].media)
        return Prompt(elements, soft, notes, len(messages) - 1, start, template.stops, template.end_ids)

    def _elements(self, template: Template, window: Sequence[ChatMessage]) -> tuple[list[Element], dict[str, Tensor]]:
        """The positions of messages, and the soft tokens in them by their key."""
        pieces = template.prompt([message.worded for message in window], generate=True)
        seen: dict[Modality, list[tuple[str, Tensor]]] = {}
        for medium in (medium for message in window for medium in message.media):
            if medium.perceived is not None and medium.perceived.soft is not None:
                seen.setdefault(medium.modality, []).append((medium.perceived.key, medium.perceived.soft))
        found = {slot: seen[slot.modality][slot.index] for slot in slots_of(pieces)}
        return elements_of(pieces, found, self.codec), dict(found.values())

    def _generate(self) -> None:
        """Generate all ready replies, one token of each per step; the thread ends with the last of them."""
        decoder, active = Decoder(self.model.llama_model), list[Reply]()
        while True:
            with self._lock:
                room = self._batch - len(active)
                arrivals, self._ready = self._ready[:room], self._ready[room:]
                if not arrivals and not active:
                    self._thread = None
                    return
            active += [reply for reply in arrivals if self._admit(decoder, reply)]
            self.steps, self.rows = self.steps + bool(active), self.rows + len(active)
            try:
                texts = {id(generation): text for generation, text in decoder.step()}
                for reply in active:
                    self._send(reply, texts.get(id(reply.generation), ""))
            except Exception as error:
                log.exception("generation failed; %d replies are lost", len(active))
                decoder = Decoder(self.model.llama_model)
                for reply in active:
                    reply.fail(error)
            active = [reply for reply in active if not reply.done]

    def _admit(self, decoder: Decoder, reply: Reply) -> bool:
        """Read a prompt; whether its reply goes on."""
        assert reply.generation is not None
        try:
            self._lend(reply.generation)
            self._send(reply, decoder.add(reply.generation))
        except Exception as error:
            if not isinstance(error, ChatBridgeError):
                log.exception("a prompt could not be read")
            reply.fail(error)
        return not reply.done

    def _send(self, reply: Reply, text: str) -> None:
        """Deliver text; of a complete reply, keep the keys and values."""
        generation = reply.generation
        assert generation is not None
        if generation.done and self._keep and generation.prefix is not None and generation.prefix.elements:
            self._prefixes = [*self._prefixes, generation.prefix][-self._keep :]
        reply.send(text)

    def _lend(self, generation: Generation) -> None:
        """Give a reply the keys and values of its conversation, if they are kept."""
        shared = [prefix.common(generation.elements) for prefix in self._prefixes]
        best = max(range(len(shared)), key=shared.__getitem__, default=None)
        if best is not None and shared[best] >= max(1, _LEAST_SHARE * len(self._prefixes[best].elements)):
            generation.prefix = self._prefixes.pop(best)


def _context_of(model: ChatBridge) -> int:
    if isinstance(model.llama_model, RemoteLanguageModel) and (most := model.llama_model.max_context):
        return most
    positions = families.positions_of(model.llama_model.config)
    return int(positions) if math.isfinite(positions) else _USUAL_CONTEXT
