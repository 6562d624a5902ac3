"""Answers many requests at once with one model.

Some threads prepare (open and encode the media, lay out the prompt), one generates: whoever is prepared joins the
replies that are under way at their next token. It knows sessions and decoders, no HTTP.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lavis_chatbridge.chat.history import ChatTurn
from lavis_chatbridge.chat.media import MediaReader
from lavis_chatbridge.chat.session import Answer, Session
from lavis_chatbridge.models.decoding import Decoder, Generation, Prefix, Sampling

log = logging.getLogger(__name__)

_PATIENCE = 0.2
"""Seconds after which an idle thread looks whether the engine is closed."""
_LEAST_SHARE = 0.5
"""A kept conversation is gone on from if at least this share of it stands at the beginning of the new one."""

Event: TypeAlias = "str | Answer | Exception"
"""What a request hears: pieces of text, then the whole answer; or an exception, and nothing more."""


class QueueFullError(Exception):
    """Too many requests wait already."""


@dataclass(eq=False)
class Job:
    """A request on its way.

    Args:
        turns: The conversation, up to the question.
        sampling: How the reply is chosen.
        deliver: Called from the engine's threads with each `Event`.
        system: Words in front of the conversation.
    """

    turns: Sequence[ChatTurn]
    sampling: Sampling
    deliver: Callable[[Event], None]
    system: str = ""
    session: Session | None = field(default=None, repr=False)
    generation: Generation | None = field(default=None, repr=False)
    _cancelled: threading.Event = field(default_factory=threading.Event, repr=False)

    def cancel(self) -> None:
        """Nobody waits for the answer any more; may be called from any thread."""
        self._cancelled.set()
        if self.generation is not None:
            self.generation.cancel()

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it."""
        return self._cancelled.is_set()


class Engine:
    """Threads that answer `Job`s.

    Args:
        model: The ChatBridge.
        processors: As `processors.load_processors` gives them.
        template: The conversation's format, see `chat.Session`.
        batch: Replies that move forward together.
        waiting: Jobs that may wait.
        preparers: Jobs that are prepared at the same time.
        keep: Conversations whose keys and values are kept for their next turn.
    """

    def __init__(
        self,
        model: Any,
        processors: Any,
        template: str = "human_assistant",
        *,
        batch: int = 16,
        waiting: int = 64,
        preparers: int = 2,
        keep: int = 8,
    ) -> None:
        self._model, self._template, self._batch, self._keep = model, template, batch, keep
        self._reader = MediaReader(model, processors)
        self._session([])  # a template that does not fit is told now
        self._waiting: queue.Queue[Job] = queue.Queue(waiting)
        self._ready: queue.Queue[Job] = queue.Queue(batch)
        self._prefixes: list[Prefix] = []
        self._closed = threading.Event()
        self._active: list[Job] = []
        self.steps = 0
        """Times that the replies under way have moved forward by a token."""
        self.rows = 0
        """Replies in all those steps together."""
        self._threads = [threading.Thread(target=self._prepare_all, daemon=True) for _ in range(preparers)]
        self._threads.append(threading.Thread(target=self._generate_all, daemon=True))
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Let a job be answered.

        Raises:
            QueueFullError: If too many wait already.
        """
        try:
            self._waiting.put_nowait(job)
        except queue.Full:
            raise QueueFullError from None

    @property
    def healthy(self) -> bool:
        """Whether all threads run."""
        return not self._closed.is_set() and all(thread.is_alive() for thread in self._threads)

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return self._waiting.qsize() + self._ready.qsize()

    @property
    def running(self) -> int:
        """Replies under way."""
        return len(self._active)

    def close(self, patience: float = 5.0) -> None:
        """End all replies and the threads."""
        self._closed.set()
        for job in list(self._active):
            job.cancel()
        end = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _session(self, turns: Sequence[ChatTurn], system: str = "") -> Session:
        return Session(
            self._model, template=self._template, system=system, turns=turns, reader=self._reader, keep=False
        )

    def _prepare_all(self) -> None:
        while not self._closed.is_set():
            try:
                job = self._waiting.get(timeout=_PATIENCE)
            except queue.Empty:
                continue
            try:
                if self._prepare(job):
                    self._hand_on(job)
            except Exception as error:  # whatever is wrong with one request, the others go on
                job.deliver(error)

    def _prepare(self, job: Job) -> bool:
        """Open a job's media and lay out its prompt; returns whether somebody still waits for it."""
        if job.cancelled:
            return False
        job.session = self._session(job.turns, job.system)
        job.generation = job.session.begin(**dataclasses.asdict(job.sampling))
        return not job.cancelled

    def _hand_on(self, job: Job) -> None:
        while not self._closed.is_set() and not job.cancelled:
            try:
                self._ready.put(job, timeout=_PATIENCE)
                return
            except queue.Full:
                continue

    def _generate_all(self) -> None:
        decoder = Decoder(self._model.llama_model)
        while not self._closed.is_set():
            for job in self._arrivals():
                self._admit(decoder, job)
            if not self._active:
                continue
            self.steps, self.rows = self.steps + 1, self.rows + len(self._active)
            try:
                texts = {id(generation): text for generation, text in decoder.step()}
            except Exception as error:
                log.exception("generation failed; %d replies are lost", len(self._active))
                decoder = Decoder(self._model.llama_model)
                for job in self._active:
                    job.deliver(error)
                self._active = []
                continue
            for job in self._active:
                self._tell(job, texts.get(id(job.generation), ""))
            self._active = [job for job in self._active if not _done(job)]

    def _arrivals(self) -> list[Job]:
        """Prepared jobs for which there is room; waits for one if nothing else is to be done."""
        arrivals: list[Job] = []
        while len(self._active) + len(arrivals) < self._batch:
            try:
                busy = bool(self._active or arrivals)
                arrivals.append(self._ready.get_nowait() if busy else self._ready.get(timeout=_PATIENCE))
            except queue.Empty:
                break
        return arrivals

    def _admit(self, decoder: Decoder, job: Job) -> None:
        assert job.generation is not None
        try:
            self._lend(job.generation)
            text = decoder.add(job.generation)
        except Exception as error:
            log.exception("a prompt could not be read")
            job.deliver(error)
            return
        self._tell(job, text)
        if not job.generation.done:
            self._active.append(job)

    def _tell(self, job: Job, text: str) -> None:
        assert job.session is not None
        assert job.generation is not None
        if text:
            job.deliver(text)
        if job.generation.done:
            answer = job.session.finish(job.generation)
            self._take_back(job.generation)
            job.deliver(answer)

    def _lend(self, generation: Generation) -> None:
        """Give a reply what was read of its conversation before, if it is kept."""
        shared = [prefix.common(generation.elements) for prefix in self._prefixes]
        best = max(range(len(shared)), key=shared.__getitem__, default=None)
        if best is not None and shared[best] >= max(1, _LEAST_SHARE * len(self._prefixes[best].elements)):
            generation.prefix, generation.reused = self._prefixes.pop(best), shared[best]

    def _take_back(self, generation: Generation) -> None:
        if self._keep and generation.prefix is not None and generation.prefix.elements:
            self._prefixes = [*self._prefixes, generation.prefix][-self._keep :]


def _done(job: Job) -> bool:
    return job.generation is not None and job.generation.done
