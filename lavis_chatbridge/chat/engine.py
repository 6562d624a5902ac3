"""The one engine: answers conversations, several at once, with the language model here or on a vLLM server.

Threads open and encode a conversation's media and word its prompt. One thread then runs a local language model, where
every reply joins the others at the next token; a remote one gets each prompt's embeddings in a request. The engine
knows templates and decoding, no user interface and no HTTP.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from lavis_chatbridge.chat.conversation import ChatMessage, Conversation
from lavis_chatbridge.chat.reader import MediaReader
from lavis_chatbridge.chat.reply import Asked, Event, MediaNote, Prompt, Reply
from lavis_chatbridge.errors import ChatBridgeError, PromptError
from lavis_chatbridge.models import families
from lavis_chatbridge.models.decoding import Decoder, Generation
from lavis_chatbridge.models.kept import Element, Prefix
from lavis_chatbridge.models.layout import elements_of
from lavis_chatbridge.models.remote import RemoteLanguageModel
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.models.templates import Template, load_template
from lavis_chatbridge.models.text import TextStream
from lavis_chatbridge.prompting import Modality, slots_of
from lavis_chatbridge.prompting.conversation import check_order

if TYPE_CHECKING:
    from torch import Tensor

    from lavis_chatbridge.models.chatbridge import ChatBridge

log = logging.getLogger(__name__)

_USUAL_CONTEXT = 2048
_LEAST_SHARE = 0.5
"""Keys and values of an earlier conversation are used if at least this share of it begins the new one."""
_PREPARERS = 2  # conversations whose media are opened at once


class QueueFullError(ChatBridgeError):
    """Too many conversations wait for their reply."""


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
                    self._thread = threading.Thread(target=self._generate, name="chatbridge-generate", daemon=True)
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
        stops = (*(() if sampling.ignore_eos else prompt.stops), *sampling.stop)
        stream = TextStream(self.codec, stops, sampling.min_new_tokens)
        sampling = sampling.model_copy(update={"max_new_tokens": min(sampling.max_new_tokens, room)})
        generation = Generation(prompt.elements, prompt.soft, Prefix(), stream, prompt.end_ids, sampling)
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
        lengths = {slot: (key, len(soft)) for slot, (key, soft) in found.items()}
        return elements_of(pieces, lengths, self.codec), dict(found.values())

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
