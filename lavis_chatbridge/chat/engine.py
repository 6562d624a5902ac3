"""The one engine: answers conversations, several at once, with the language model here or on a vLLM server.

Threads prepare a conversation (open and encode its media, word its prompt). One thread then runs a local language
model, where every reply joins those under way at the next token; a remote one gets each prompt's embeddings in a
request. The engine knows templates and decoding, no user interface and no HTTP.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from lavis_chatbridge.chat.conversation import ChatMessage, Conversation
from lavis_chatbridge.chat.media import MediaNote, MediaReader, note_of
from lavis_chatbridge.errors import ChatBridgeError, PromptError
from lavis_chatbridge.models import families
from lavis_chatbridge.models.decoding import Decoder, Finish, Generation, TokenLogprob
from lavis_chatbridge.models.kept import Element, Prefix
from lavis_chatbridge.models.layout import elements_of
from lavis_chatbridge.models.remote import RemoteLanguageModel
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.models.templates import Template, load_template
from lavis_chatbridge.models.text import TextStream
from lavis_chatbridge.prompting import Modality, slots_of

if TYPE_CHECKING:
    from torch import Tensor

    from lavis_chatbridge.models.chatbridge import ChatBridge

log = logging.getLogger(__name__)

_IDLE_SECONDS = 5.0
"""The generating thread ends after this time without work, so that an engine that nobody uses can be collected."""
_USUAL_CONTEXT = 2048
_LEAST_SHARE = 0.5
"""Keys and values of an earlier conversation are used if at least this share of it begins the new one."""

Event: TypeAlias = "str | Answer | Exception"
"""A reply's events: pieces of text, then the whole answer; or an exception, and nothing more."""


class QueueFullError(ChatBridgeError):
    """Too many conversations wait for their reply."""


@dataclass(frozen=True)
class Answer:
    """A reply, and how it came about. ``str(answer)`` is its text.

    Attributes:
        text: The reply.
        finish: ``"stop"`` if the model ended it, ``"length"`` at its limit, ``"cancelled"`` if a caller ended it.
        tokens: Tokens of the reply.
        prompt_tokens: Positions of the prompt.
        reused_tokens: Positions of the prompt whose keys and values were kept from an earlier reply.
        media: What became of the media of all messages that the model got.
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

    def to_record(self) -> dict[str, Any]:
        """The answer as plain data for JSON."""
        record = {**dataclasses.asdict(self), "warnings": list(self.warnings)}
        return {key: value for key, value in record.items() if key not in ("ids", "logprobs")}


@dataclass
class _Prompt:
    """A conversation in positions: the messages that fit, and what each position holds."""

    elements: list[Element]
    soft: dict[str, Tensor]
    notes: tuple[MediaNote, ...]
    turn: int
    dropped: int
    stops: tuple[str, ...]
    end_ids: frozenset[int]


class Reply(Iterator[str]):
    """One reply under way: iterate over it for pieces of text as they become certain.

    Args:
        asked: The conversation, or a plain text that is to be continued.
        sampling: How tokens are chosen.
        deliver: Called from the engine's threads with each `Event`; without it the reply itself keeps them.
    """

    def __init__(
        self, asked: Conversation | str | Sequence[int], sampling: Sampling, deliver: Callable[[Event], None] | None
    ) -> None:
        self.asked, self.sampling = asked, sampling
        self.started = time.monotonic()
        self.prepared: Future[None] = Future()
        """Done when the media have been read; raises if they cannot be."""
        self.generation: Generation | None = None
        self.prompt: _Prompt | None = None
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._deliver = deliver or self._events.put
        self._result: Future[Answer] = Future()
        self._cancelled = threading.Event()

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

    @property
    def cancelled(self) -> bool:
        """Whether a caller has ended it."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """End the reply at its next token; may be called from any thread."""
        self._cancelled.set()
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
        if not self.prepared.done():
            self.prepared.set_exception(error)
        if not self._result.done():
            self._result.set_exception(error)
            self._deliver(error)


class Engine:
    """Answers conversations with one model; several threads may use it.

    Args:
        model: A ChatBridge; it is switched to evaluation.
        reader: Opens and perceives media.
        template: ``"human_assistant"`` (the paper's), ``"vicuna_v1"``, or ``"tokenizer"`` (the language model's own);
            by default the model's.
        max_context: Positions that the model reads at most; by default its own limit. The oldest messages that do not
            fit are left out, in pairs.
        batch: Replies under way at once.
        waiting: Replies that may wait for one of those places.
        preparers: Conversations whose media are opened at once.
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
        preparers: int = 2,
        keep: int = 8,
    ) -> None:
        self.model, self.reader, self.template = model.eval(), reader, template or model.settings.template
        self.codec = model.llama_tokenizer
        self.max_context = max_context or _context_of(model)
        self.load_template("")  # raises now, not at the first message
        self.steps, self.rows = 0, 0
        """Steps of the local decoder, and replies in all of them together."""
        self._batch, self._keep, self._places = batch, keep, batch + waiting
        self._lock = threading.Lock()
        self._present: set[Reply] = set()
        self._active: list[Reply] = []
        self._prefixes: list[Prefix] = []
        self._ready: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._preparers = ThreadPoolExecutor(preparers, "chatbridge-prepare")
        self._senders = ThreadPoolExecutor(batch, "chatbridge-engine")

    def load_template(self, system: str) -> Template:
        """The conversation's format with a system prompt."""
        return load_template(self.template, self.codec, system, self.model.settings.reply_end)

    def reply(
        self,
        asked: Conversation | str | Sequence[int],
        sampling: Sampling | None = None,
        deliver: Callable[[Event], None] | None = None,
    ) -> Reply:
        """Begin a reply.

        Args:
            asked: A conversation whose last message is the user's; or a text, or token ids, to be continued as they
                are.
            sampling: How tokens are chosen; greedy by default.
            deliver: See `Reply`.

        Raises:
            QueueFullError: If too many replies wait already.
        """
        reply = Reply(asked, sampling or Sampling(), deliver)
        with self._lock:
            self._present = {other for other in self._present if not other.done}
            if len(self._present) >= self._places:
                raise QueueFullError(f"{len(self._present)} replies wait already; try again later")
            self._present.add(reply)
        self._preparers.submit(self._prepare, reply)
        return reply

    @property
    def present(self) -> int:
        """Replies that wait or are under way."""
        return sum(not reply.done for reply in list(self._present))

    @property
    def running(self) -> int:
        """Replies whose tokens are being generated."""
        return sum(r.generation is not None and not r.done for r in list(self._present))

    def close(self) -> None:
        """End all replies."""
        for reply in list(self._present):
            reply.cancel()
        self._preparers.shutdown(wait=False, cancel_futures=True)
        self._senders.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, reply: Reply) -> None:
        try:
            if reply.cancelled:
                raise PromptError("the reply was cancelled before it began")
            prompt = reply.prompt = self._worded(reply.asked, reply.sampling.max_new_tokens)
            room = self.max_context - len(prompt.elements)
            sampling = reply.sampling.model_copy(update={"max_new_tokens": min(reply.sampling.max_new_tokens, room)})
            stops = (*(() if sampling.ignore_eos else prompt.stops), *sampling.stop)
            stream = TextStream(self.codec, stops, sampling.min_new_tokens)
            generation = Generation(prompt.elements, prompt.soft, Prefix(), stream, prompt.end_ids, sampling)
            generation.started = reply.started
            reply.generation = generation
            reply.prepared.set_result(None)
            if reply.cancelled:  # between the two lines above
                generation.cancel()
            if isinstance(self.model.llama_model, RemoteLanguageModel):
                self._senders.submit(self._send, reply)
            else:
                self._ready.put(reply)
                self._wake()
        except Exception as error:  # one reply's fault leaves the others alone
            reply.fail(error)

    def _worded(self, asked: Conversation | str | Sequence[int], room: int) -> _Prompt:
        """The positions of as many of the last messages as fit beside ``room`` new tokens."""
        template = self.load_template(asked.system if isinstance(asked, Conversation) else "")
        if not isinstance(asked, Conversation):
            front = [self.codec.bos_id] if isinstance(asked, str) and self.codec.bos_id is not None else []
            ids: list[Element] = [*front, *(self.codec.encode(asked) if isinstance(asked, str) else asked)]
            self._check_length(ids)
            return _Prompt(ids, {}, (), 0, 0, (), template.end_ids)
        messages = asked.messages
        _check_order(messages)
        self.reader.read([medium for message in messages for medium in message.media])
        for start in range(0, len(messages), 2):
            elements, soft = self._elements(template, messages[start:])
            last = start == len(messages) - 1
            if len(elements) + (1 if last else room) <= self.max_context:
                break
        self._check_length(elements)
        notes = tuple(note_of(m, i) for i in range(start, len(messages)) for m in messages[i].media)
        return _Prompt(elements, soft, notes, len(messages) - 1, start, template.stops, template.end_ids)

    def _check_length(self, elements: Sequence[Element]) -> None:
        if len(elements) >= self.max_context:
            raise PromptError(
                f"this message alone has {len(elements)} tokens, but the context holds {self.max_context} with the "
                "answer: shorten the text or give fewer media"
            )

    def _elements(self, template: Template, window: Sequence[ChatMessage]) -> tuple[list[Element], dict[str, Tensor]]:
        """The positions of messages, and the soft tokens in them by their key."""
        pieces = template.prompt([message.worded for message in window], generate=True)
        seen: dict[Modality, list[tuple[str, Tensor]]] = {}
        for medium in (medium for message in window for medium in message.media):
            if medium.perceived is not None and medium.perceived.soft is not None:
                seen.setdefault(medium.modality, []).append((medium.perceived.key, medium.perceived.soft))
        found = {slot: seen[slot.modality][slot.index] for slot in slots_of(pieces)}
        lengths = {slot: (key, len(soft)) for slot, (key, soft) in found.items()}
        return elements_of(pieces, lengths, self.codec), dict(found.values())

    def _wake(self) -> None:
        """Start the generating thread unless it runs."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._generate, name="chatbridge-generate", daemon=True)
                self._thread.start()

    def _generate(self) -> None:
        decoder = Decoder(self.model.llama_model)
        while True:
            for reply in self._arrivals():
                self._admit(decoder, reply)
            if not self._active:
                with self._lock:
                    if self._ready.empty():
                        self._thread = None
                        return
                continue
            self.steps, self.rows = self.steps + 1, self.rows + len(self._active)
            try:
                texts = {id(generation): text for generation, text in decoder.step()}
                for reply in self._active:
                    self._send_text(reply, texts.get(id(reply.generation), ""))
            except Exception as error:
                log.exception("generation failed; %d replies are lost", len(self._active))
                decoder = Decoder(self.model.llama_model)
                for reply in self._active:
                    reply.fail(error)
            self._active = [reply for reply in self._active if not reply.done]

    def _arrivals(self) -> list[Reply]:
        """Prepared replies for which there is room; waits for one if no reply is under way."""
        arrivals: list[Reply] = []
        with suppress(queue.Empty):
            while len(self._active) + len(arrivals) < self._batch:
                busy = bool(self._active or arrivals)
                arrivals.append(self._ready.get_nowait() if busy else self._ready.get(timeout=_IDLE_SECONDS))
        return arrivals

    def _admit(self, decoder: Decoder, reply: Reply) -> None:
        assert reply.generation is not None
        try:
            self._lend(reply.generation)
            text = decoder.add(reply.generation)
        except Exception as error:
            if not isinstance(error, ChatBridgeError):
                log.exception("a prompt could not be read")
            reply.fail(error)
            return
        self._send_text(reply, text)
        if not reply.done:
            self._active.append(reply)

    def _send_text(self, reply: Reply, text: str) -> None:
        generation = reply.generation
        assert generation is not None
        if generation.done and self._keep and generation.prefix is not None and generation.prefix.elements:
            with self._lock:
                self._prefixes = [*self._prefixes, generation.prefix][-self._keep :]
        reply.send(text)

    def _lend(self, generation: Generation) -> None:
        """Give a reply the keys and values of its conversation, if they are kept."""
        with self._lock:
            shared = [prefix.common(generation.elements) for prefix in self._prefixes]
            best = max(range(len(shared)), key=shared.__getitem__, default=None)
            if best is not None and shared[best] >= max(1, _LEAST_SHARE * len(self._prefixes[best].elements)):
                generation.prefix = self._prefixes.pop(best)

    def _send(self, reply: Reply) -> None:
        """One reply of a remote engine."""
        generation = reply.generation
        assert generation is not None
        try:
            if generation.cancelled:
                reply.send(generation.end("cancelled"))
                return
            for text in self.model.llama_model.run(generation):
                reply.send(text)
        except Exception as error:
            reply.fail(error)


def _check_order(messages: Sequence[ChatMessage]) -> None:
    """Raises PromptError: If the messages do not alternate, or the last one is not the user's, or empty."""
    for i, message in enumerate(messages):
        expected = "assistant" if i % 2 else "user"
        if message.role != expected:
            raise PromptError(f"message {i} has the role {message.role!r}, expected {expected!r}: roles alternate")
    if not len(messages) % 2:
        raise PromptError("there is no question to answer")
    if not messages[-1].text.strip() and not messages[-1].media and len(messages) == 1:
        raise PromptError("the question is empty, and there is no medium to speak about")


def _context_of(model: ChatBridge) -> int:
    if isinstance(model.llama_model, RemoteLanguageModel) and (most := model.llama_model.max_context):
        return most
    positions = families.positions_of(model.llama_model.config)
    return int(positions) if math.isfinite(positions) else _USUAL_CONTEXT


def _answer(generation: Generation, prompt: _Prompt) -> Answer:
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
    whole = generation.stream.codec.decode(generation.ids)
    return tuple(generation.ids) if stopped in stops and whole.endswith(stopped) else None
