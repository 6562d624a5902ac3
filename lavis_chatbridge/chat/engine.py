"""The one engine: answers conversations, several at once, with the language model here or on a vLLM server.

Worker threads read conversations. One thread then runs a local language model, where every reply joins the others at
the next token; a remote one gets each prompt's embeddings in a request. The engine has no user interface and no HTTP.
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

from lavis_chatbridge.chat.conversation import Conversation, MediaNote, MediaReader, Prompt, word
from lavis_chatbridge.errors import ChatBridgeError, DataError, PromptError
from lavis_chatbridge.models import families
from lavis_chatbridge.models.decoding import Decoder, Finish, Generation, Prefix, TokenLogprob
from lavis_chatbridge.models.remote import RemoteLanguageModel
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.models.templates import Template, load_template
from lavis_chatbridge.prompting.conversation import check_order

if TYPE_CHECKING:
    from lavis_chatbridge.models.chatbridge import ChatBridge

log = logging.getLogger(__name__)

_USUAL_CONTEXT = 2048
"""Positions of a language model without a limit of its own."""
_LEAST_SHARE = 0.5
"""Keys and values of an earlier conversation are used if at least this share of it begins the new one."""
_READERS = 2  # conversations that are read at once

Event: TypeAlias = "str | Answer | Exception"
"""A reply's events: pieces of text, then the whole answer; or an exception, and nothing more."""
Asked: TypeAlias = "Conversation | str | Sequence[int]"
"""A conversation whose last message is the user's; or a text, or token ids, to be continued as they are."""


class QueueFullError(ChatBridgeError):
    """Too many conversations wait for their reply."""


@dataclass(frozen=True)
class Answer:
    """A reply, and how it came about. ``str(answer)`` is its text.

    Attributes:
        finish: ``"stop"`` if the model ended it, ``"length"`` at its limit, ``"cancelled"`` if a caller ended it.
        reused_tokens: Positions of the prompt whose keys and values were kept from an earlier reply.
        media: Notes on the media of all messages that the model got.
        dropped: Messages at the start of the conversation that did not fit into the context.
        warnings: What the user should know about this message's media and the dropped messages.
        first_token_seconds: From the request to the first token, the opening of media included.
        ids: The reply's token ids.
        logprobs: For each token its id, its log-probability, and those of the likeliest tokens, if requested.
    """

    text: str
    finish: Finish
    tokens: int
    prompt_tokens: int
    reused_tokens: int
    media: tuple[MediaNote, ...]
    dropped: int
    warnings: tuple[str, ...]
    first_token_seconds: float
    ids: tuple[int, ...] = field(default=(), repr=False)
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return self.text


class Reply(Iterator[str]):
    """A reply that is being made: iterate over it for pieces of text as they become final.

    ``deliver`` is called from the engine's threads with each `Event`; if it raises, the reply is cancelled. Without it
    the reply itself keeps them.
    """

    def __init__(self, deliver: Callable[[Event], None] | None) -> None:
        self.started = time.monotonic()
        self.cancelled = False
        self.prompt: Prompt | None = None
        """What the model reads; set before the first piece of text."""
        self.generation: Generation | None = None
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._deliver = deliver or self._events.put
        self._result: Future[Answer] = Future()

    def __next__(self) -> str:
        event = self._events.get()
        if isinstance(event, str):
            return event
        self._events.put(event)  # for another iteration
        if isinstance(event, Exception):
            raise event
        raise StopIteration

    @property
    def answer(self) -> Answer:
        """The whole answer, once it is complete, or the error that ended it."""
        return self._result.result()

    @property
    def done(self) -> bool:
        """Whether the reply is complete, or has failed."""
        return self._result.done()

    def cancel(self) -> None:
        """End the reply at its next token; any thread may call this."""
        self.cancelled = True
        if self.generation is not None:
            self.generation.cancel()

    def send(self, text: str) -> None:
        """Deliver text (by the engine), and the answer if the generation is complete."""
        if text:
            self._tell(text)
        generation, prompt = self.generation, self.prompt
        if generation is None or prompt is None or not generation.done:
            return
        answer = Answer(
            text=generation.stream.text,
            finish=generation.finish or "stop",
            tokens=len(generation.ids),
            prompt_tokens=len(prompt.elements),
            reused_tokens=generation.reused,
            media=prompt.media,
            dropped=prompt.dropped,
            warnings=prompt.warnings,
            first_token_seconds=generation.first_token or 0.0,
            ids=tuple(generation.ids),
            logprobs=tuple(generation.logprobs),
        )
        self._result.set_result(answer)
        self._tell(answer)

    def fail(self, error: Exception) -> None:
        """Deliver the fault that ends it (by the engine)."""
        if not self.done:
            self._result.set_exception(error)
            self._tell(error)

    def _tell(self, event: Event) -> None:
        """Deliver an event; a callback that raises ends only its own reply."""
        try:
            self._deliver(event)
        except Exception:
            log.exception("a reply is cancelled: its callback raised")
            self.cancel()


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
        self.tokenizer = model.llama_tokenizer
        self._remote = model.llama_model if isinstance(model.llama_model, RemoteLanguageModel) else None
        own = None if self._remote is None else self._remote.max_context
        positions = own or families.positions_of(model.llama_model.config)
        self.max_context = max_context or (int(positions) if math.isfinite(positions) else _USUAL_CONTEXT)
        self.load_template("")  # raises now, not at the first message
        self._batch, self._keep, self._most = batch, keep, batch + waiting
        if self._remote is None:
            self._decoder = Decoder(model.llama_model)
        self._lock = threading.Lock()
        self._present: set[Reply] = set()
        self._ready: list[Reply] = []
        self._prefixes: list[Prefix] = []
        self._thread: threading.Thread | None = None
        self._workers = ThreadPoolExecutor(batch if self._remote else _READERS, "chatbridge-engine")

    def load_template(self, system: str) -> Template:
        """The conversation's format with a system prompt."""
        return load_template(self.template, self.tokenizer, system, self.model.settings.reply_end)

    def reply(
        self, asked: Asked, sampling: Sampling | None = None, deliver: Callable[[Event], None] | None = None
    ) -> Reply:
        """Begin a reply, greedy by default; ``deliver`` gets its events, see `Reply`.

        Raises:
            QueueFullError: If too many replies wait already.
        """
        reply = Reply(deliver)
        with self._lock:
            self._present = {other for other in self._present if not other.done}
            if len(self._present) >= self._most:
                raise QueueFullError(f"{len(self._present)} replies wait already; try again later")
            self._present.add(reply)
        self._workers.submit(self._begin, reply, asked, sampling or Sampling())
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

    def _begin(self, reply: Reply, asked: Asked, sampling: Sampling) -> None:
        """Read what a reply answers; then queue it for the local language model, or let a remote one complete it."""
        try:
            if reply.cancelled:
                raise PromptError("the reply was cancelled before it began")
            generation = self._generation(reply, asked, sampling)
            if self._remote is not None:
                for text in self._remote.run(generation):
                    reply.send(text)
                return
            with self._lock:
                self._ready.append(reply)
                if self._thread is None:
                    # Not a daemon: Python aborts if such a thread frees tensors while the interpreter ends.
                    self._thread = threading.Thread(target=self._generate, name="chatbridge-generate")
                    self._thread.start()
        except Exception as error:  # the other replies continue
            reply.fail(error)

    def _generation(self, reply: Reply, asked: Asked, sampling: Sampling) -> Generation:
        prompt = reply.prompt = self._prompt(asked, sampling.max_new_tokens)
        room = self.max_context - len(prompt.elements)
        if room <= 0:
            raise PromptError(
                f"this message alone has {len(prompt.elements)} tokens, but the context has {self.max_context} with "
                "the answer: shorten the text or give fewer media"
            )
        sampling = sampling.model_copy(update={"max_new_tokens": min(sampling.max_new_tokens, room)})
        stops = prompt.template.stops if isinstance(asked, Conversation) else ()
        end_ids = prompt.template.end_ids
        generation = Generation(prompt.elements, prompt.soft, self.tokenizer, sampling, stops, end_ids, Prefix())
        generation.started = reply.started
        reply.generation = generation
        if reply.cancelled:  # before it had a generation to cancel
            generation.cancel()
        return generation

    def _prompt(self, asked: Asked, room: int) -> Prompt:
        if isinstance(asked, Conversation):
            check_order([message.worded for message in asked.messages], generate=True)
            self.reader.read([medium for message in asked.messages for medium in message.media])
            return word(asked, self.load_template(asked.system), room, self.max_context)
        front = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        ids = [*front, *self.tokenizer.encode(asked)] if isinstance(asked, str) else [*asked]
        size = self.model.llama_model.get_input_embeddings().num_embeddings
        for position, token in enumerate(ids):
            if not 0 <= token < size:
                raise DataError(f"prompt[{position}] is {token}, expected a token id from 0 to {size - 1}")
        return Prompt([*ids], self.load_template(""))

    def _generate(self) -> None:
        """Generate all ready replies, one token of each per step; the thread ends with the last of them."""
        active: list[Reply] = []
        while True:
            with self._lock:
                room = self._batch - len(active)
                arrivals, self._ready = self._ready[:room], self._ready[room:]
                if not arrivals and not active:
                    self._thread = None
                    return
            active += [reply for reply in arrivals if self._admit(reply)]
            try:
                texts = {id(generation): text for generation, text in self._decoder.step()}
                for reply in active:
                    self._send(reply, texts.get(id(reply.generation), ""))
            except Exception as error:
                log.exception("generation failed; %d replies end", len(active))
                self._decoder = Decoder(self.model.llama_model)
                for reply in active:
                    reply.fail(error)
            active = [reply for reply in active if not reply.done]

    def _admit(self, reply: Reply) -> bool:
        """Let the model read a prompt, beyond what is kept of its conversation; whether its reply is incomplete."""
        generation = reply.generation
        assert generation is not None
        try:
            shared = [prefix.common(generation.elements) for prefix in self._prefixes]
            best = max(range(len(shared)), key=shared.__getitem__, default=None)
            if best is not None and shared[best] >= max(1, _LEAST_SHARE * len(self._prefixes[best].elements)):
                generation.prefix = self._prefixes.pop(best)
            self._send(reply, self._decoder.add(generation))
        except Exception as error:
            if not isinstance(error, ChatBridgeError):
                log.exception("a prompt could not be read")
            reply.fail(error)
            generation.cancel()  # the decoder may have it already
        return not reply.done

    def _send(self, reply: Reply, text: str) -> None:
        """Deliver text; of a complete reply, keep the keys and values."""
        generation = reply.generation
        assert generation is not None
        if generation.done and self._keep and generation.prefix is not None and generation.prefix.elements:
            self._prefixes = [*self._prefixes, generation.prefix][-self._keep :]
        reply.send(text)
