"""Asking a language model for chat data: many requests at a time, none of them lost and none paid for twice.

What is written down, and when: a ``sent`` record is on the disk before its request leaves, the ``answer`` before its
worker takes another request. After a kill the answered requests are known, and so are the few that were under way (at
most `workers_for` the concurrency). Those may have been answered into the void; `InDoubt` says what happens to them.

This module knows neither how prompts are worded nor how answers are read.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import heapq
import json
import logging
import random
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lavis_chatbridge.errors import ChatBridgeError
from lavis_chatbridge.multis.annotation import Annotation
from lavis_chatbridge.multis.endpoint import Answer, Endpoint, EndpointError, EndpointSettings, RequestFailed
from lavis_chatbridge.multis.journal import Journal
from lavis_chatbridge.multis.ledger import JOURNAL_NAME, Doubt, Ledger
from lavis_chatbridge.multis.limits import Budget, Price, RateLimit, bound_tokens, estimate_tokens
from lavis_chatbridge.multis.prompts import DATA_KINDS, DataKind, Message, PromptBook

InDoubt = Literal["ask", "recover", "hold"]
"""Requests that may have been answered and paid without our knowing (a kill, a timeout, a cut connection). ``ask``: ask
again (nothing is lost, a few may be paid twice); ``recover``: fetch what the server stored, ask again only what it did
not; ``hold``: leave them out (nothing is paid twice)."""

_logger = logging.getLogger(__name__)
_LONGEST_PAUSE = 600.0
_RECOVERY_INTERVAL = 1.0


@dataclass(frozen=True)
class GenerateSettings:
    """How a generation runs.

    Args:
        kinds: Which kinds of data to ask for.
        counts: How many requests per kind at most; the items are drawn by ``seed``. An absent kind takes all items.
        shots: Seed examples per prompt.
        seed: Draws items and examples.
        concurrency: Requests under way at a time.
        attempts: How often one request is tried.
        requests_per_minute: Rate limit.
        tokens_per_minute: Rate limit, prompts and longest answers together.
        max_cost: US dollars, over all runs that share the journal.
        first_pause: Seconds before the second attempt; doubled each time, with jitter, unless the server states a time.
        stop_after: Requests given up in a row until the run stops: the server is down.
        in_doubt: What happens to requests that a kill cut off.
    """

    kinds: list[DataKind] = field(default_factory=lambda: list(DATA_KINDS))
    counts: dict[str, int] = field(default_factory=dict)
    shots: int = 3
    seed: int = 0
    concurrency: int = 16
    attempts: int = 6
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_cost: float | None = None
    first_pause: float = 1.0
    stop_after: int = 20
    in_doubt: InDoubt = "ask"

    def check(self) -> Iterator[str]:
        """Values out of range."""
        for name in ("shots", "concurrency", "attempts", "stop_after"):
            if getattr(self, name) < (0 if name == "shots" else 1):
                yield f"{name} is {getattr(self, name)}, expected a positive number"
        for kind in self.counts:
            if kind not in DATA_KINDS:
                yield f"counts has no kind {kind!r}; known are {', '.join(DATA_KINDS)}"


@dataclass(frozen=True)
class Request:
    """One chat to send. Its id is a hash of all that shapes the answer: the same question is never asked twice."""

    id: str
    item: str
    kind: DataKind
    modality: str
    messages: list[Message]
    max_tokens: int

    @property
    def bound(self) -> int:
        """Tokens of the prompt, at most."""
        return bound_tokens(self.messages)


@dataclass
class Report:
    """What a run did.

    Attributes:
        answered: Answers of this run.
        known: Requests that had an answer already.
        recovered: Of the answered ones, those fetched from the server after a kill.
        held: Requests in doubt that were left out.
        gave_up: Requests without an answer after all attempts; the next run tries them again.
        spent: US dollars, over all runs of the journal.
        stopped: Why the run ended early; empty if it did not.
    """

    answered: int = 0
    known: int = 0
    recovered: int = 0
    held: int = 0
    gave_up: int = 0
    spent: float = 0.0
    stopped: str = ""


@dataclass(frozen=True)
class Estimate:
    """What a dry run expects of the requests that have no answer yet.

    Attributes:
        requests: Their number.
        known: Requests that have an answer already.
        prompt_tokens: Estimated.
        completion_tokens: Estimated from the seed examples' answers.
        cost: US dollars, expected.
        bound: US dollars, never exceeded.
        spent: US dollars, spent before.
    """

    requests: int
    known: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    bound: float
    spent: float


def plan(
    annotations: Iterable[Annotation], book: PromptBook, options: GenerateSettings, endpoint: EndpointSettings
) -> Iterator[Request]:
    """The requests of a generation, one at a time, in the order of the annotations.

    Args:
        annotations: The items. Read twice where ``options.counts`` limits a kind, so then it must be re-iterable.
        book: Words the requests.
        options: Kinds, counts, shots and seed.
        endpoint: Model and sampling, which are part of a request's identity.
    """
    chosen = _chosen(annotations, options)
    for annotation in annotations:
        for kind in options.kinds:
            if kind in chosen and annotation.id not in chosen[kind]:
                continue
            messages = book.messages(kind, annotation, options.shots, options.seed)
            limit = book.max_tokens(kind)
            shape = [endpoint.model, endpoint.temperature, endpoint.top_p, limit, annotation.id, kind, messages]
            digest = hashlib.sha256(json.dumps(shape, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()[:32]
            yield Request(digest, annotation.id, kind, annotation.modality, messages, limit)


def estimate(requests: Iterable[Request], book: PromptBook, price: Price, ledger: Ledger) -> Estimate:
    """What the requests without an answer will cost, without sending one."""
    lengths: dict[tuple[str, str], float] = {}
    count = known = prompt = completion = 0
    bound = expected = 0.0
    for request in requests:
        if bytes.fromhex(request.id) in ledger.answered:
            known += 1
            continue
        where = (request.kind, request.modality)
        if where not in lengths:
            seeds = [answer for _, answer in book.examples(*where)]  # type: ignore[arg-type]
            lengths[where] = sum(estimate_tokens([{"content": answer}]) for answer in seeds) / len(seeds)
        count += 1
        prompt += estimate_tokens(request.messages)
        expected += lengths[where]
        bound += price.cost(request.bound, request.max_tokens)
    completion = round(expected)
    return Estimate(count, known, prompt, completion, price.cost(prompt, completion), bound, ledger.spent)


def generate(
    requests: Iterable[Request], folder: str | Path, endpoint: EndpointSettings, price: Price, options: GenerateSettings
) -> Report:
    """Ask for everything that has no answer yet.

    Args:
        requests: The whole plan, also what earlier runs answered; read one at a time.
        folder: Holds ``journal.jsonl``.
        endpoint: The server.
        price: Of its model.
        options: Limits, retries, budget.

    Raises:
        EndpointError: If the server refuses every request; all answers up to there are in the journal.
        DataError: If another process writes the same journal, or the disk stays full.
    """
    return asyncio.run(_generate(requests, Path(folder), endpoint, price, options))


def workers_for(concurrency: int) -> int:
    """How many requests are handled at a time: while some wait for the disk, others keep the server busy."""
    return concurrency + (concurrency + 1) // 2


async def _generate(
    requests: Iterable[Request], folder: Path, endpoint: EndpointSettings, price: Price, options: GenerateSettings
) -> Report:
    path = folder / JOURNAL_NAME
    with Journal(path) as journal:
        ledger = Ledger.read(path)
        run = _Run(journal, ledger, Endpoint(endpoint, options.concurrency), price, options)
        header = {"event": "run", "at": time.time(), "model": endpoint.model, "base_url": endpoint.base_url}
        await journal.write({**header, "temperature": endpoint.temperature, "top_p": endpoint.top_p})
        try:
            return await run.work(iter(requests))
        finally:
            await run.endpoint.close()


class _Run:
    """One run: workers that share an iterator of requests, a budget, a rate limit and a journal."""

    def __init__(
        self, journal: Journal, ledger: Ledger, endpoint: Endpoint, price: Price, options: GenerateSettings
    ) -> None:
        self.journal, self.ledger, self.endpoint, self.price, self.options = journal, ledger, endpoint, price, options
        self.budget = Budget(options.max_cost, ledger.spent)
        self.rate = RateLimit(options.requests_per_minute, options.tokens_per_minute)
        self.report = Report()
        self._places = asyncio.Semaphore(options.concurrency)
        self._failed_in_a_row = 0
        self._fatal: BaseException | None = None
        self._shown_at = self._began_at = time.monotonic()

    async def work(self, requests: Iterator[Request]) -> Report:
        """Run the workers until the requests, the budget or the user's patience end."""
        loop = asyncio.get_running_loop()
        signals = [signal.SIGINT, signal.SIGTERM]
        try:
            for number in signals:
                loop.add_signal_handler(number, self._interrupt, loop, number)
        except (ValueError, RuntimeError, NotImplementedError):
            signals = []  # not the main thread: somebody else handles signals
        try:
            count = workers_for(self.options.concurrency)
            workers = [asyncio.create_task(self._worker(requests)) for _ in range(count)]
            await asyncio.gather(*workers)
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
        if self._fatal is not None:
            raise self._fatal
        self.report.spent = self.budget.spent
        return self.report

    def _interrupt(self, loop: asyncio.AbstractEventLoop, number: int) -> None:
        self._stop("interrupted")
        _logger.warning("stopping: waiting for the answers that are under way; interrupt again to give them up")
        loop.remove_signal_handler(number)

    def _stop(self, reason: str) -> None:
        self.report.stopped = self.report.stopped or reason

    async def _worker(self, requests: Iterator[Request]) -> None:
        try:
            for request in requests:
                if self.report.stopped:
                    return
                key = bytes.fromhex(request.id)
                if key in self.ledger.answered:
                    self.report.known += 1
                    continue
                self.ledger.answered.add(key)  # the same request twice in one plan is asked once
                await self._serve(request)
                self._show_progress()
        except Exception as error:
            # The other workers finish and write down what is under way; then the error is raised.
            self._fatal = self._fatal or error
            self._stop(str(error))

    async def _serve(self, request: Request) -> None:
        doubt = self.ledger.doubts.get(request.id)
        failure: RequestFailed | None = None
        for attempt in range(self.options.attempts):
            if failure is not None:
                await self._wait(failure, attempt - 1)
            if doubt is not None and await self._settled(request, doubt):
                return
            if self.report.stopped:
                return
            sent_at = time.time()
            failure = await self._attempt(request, attempt)
            if failure is None:
                self._failed_in_a_row = 0
                return
            doubt = Doubt(sent_at, self._bound(request)) if failure.paid else None
            if not failure.retry:
                break
        if (
            failure is not None
            and not self.report.stopped
            and not (doubt is not None and await self._settled(request, doubt))
        ):
            await self._give_up(request, failure)

    async def _settled(self, request: Request, doubt: Doubt) -> bool:
        """Whether a request that may have been answered, and paid, without our knowing must not be sent again."""
        if self.options.in_doubt == "hold":
            self.report.held += 1
            return True
        answer = await self._recover(request, doubt) if self.options.in_doubt == "recover" else None
        if answer is None:
            return False
        cost = self._cost(request, answer)
        self.budget.spent += cost - doubt.bound
        self.report.recovered += 1
        await self._accept(request, answer, cost, 0.0)
        return True

    async def _attempt(self, request: Request, attempt: int) -> RequestFailed | None:
        """Send once; None if that brought an answer, or if the budget does not allow it."""
        bound = self._bound(request)
        if not await self.budget.reserve(bound):
            self._stop(
                f"the next request may cost ${bound:.4f}, and ${self.budget.spent:.4f} of {self.budget.limit} is spent"
            )
            return None
        cost = bound  # whatever ends this attempt otherwise, it may have been paid
        try:
            await self.rate.admit(self._tokens(request))
            sent_at = time.time()
            await self.journal.write(
                {"event": "sent", "id": request.id, "attempt": attempt, "bound": round(bound, 9), "at": sent_at}
            )
            try:
                answer = await self._ask(request)
            except RequestFailed as failure:
                cost = bound if failure.paid else 0.0
                await self._note_failure(request, attempt, failure.reason, failure.paid, failure.body)
                return failure
            except EndpointError as error:
                cost = 0.0
                await self._note_failure(request, attempt, str(error), paid=False)
                raise
            cost = self._cost(request, answer)
            await self._accept(request, answer, cost, time.time() - sent_at)
            return None
        finally:
            self.budget.settle(bound, cost)

    async def _ask(self, request: Request) -> Answer:
        """Send a request when there is a place for it; a failure that concerns all is heeded before others follow."""
        async with self._places:
            await self.rate.resume()
            if self.report.stopped:
                raise RequestFailed("not sent: the run was stopped", retry=False)
            try:
                return await self.endpoint.ask(request.id, request.messages, request.max_tokens)
            except EndpointError as error:
                self._stop(str(error))
                raise
            except RequestFailed as failure:
                if failure.after is not None and failure.after > _LONGEST_PAUSE:
                    self._stop(
                        f"the server asks to wait {failure.after:.0f} s ({failure.reason}); start again after that"
                    )
                elif failure.after is not None:
                    self.rate.pause(failure.after)
                raise

    async def _note_failure(self, request: Request, attempt: int, reason: str, paid: bool, body: str = "") -> None:
        record = {"event": "failed", "id": request.id, "attempt": attempt, "reason": reason, "paid": paid}
        await self.journal.write(record | ({"body": body} if body else {}))

    async def _accept(self, request: Request, answer: Answer, cost: float, seconds: float) -> None:
        await self.journal.write(
            {
                "event": "answer",
                "id": request.id,
                "item": request.item,
                "kind": request.kind,
                "modality": request.modality,
                "text": answer.text,
                "finish": answer.finish,
                "model": answer.model or self.endpoint.options.model,
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
                "cost": round(cost, 9),
                "seconds": round(seconds, 3),
            }
        )
        self.report.answered += 1

    def _tokens(self, request: Request) -> int:
        """For the rate limit; 0 where tokens are not limited."""
        limited = self.options.tokens_per_minute is not None
        return estimate_tokens(request.messages) + request.max_tokens if limited else 0

    def _bound(self, request: Request) -> float:
        return self.price.cost(request.bound, request.max_tokens)

    def _cost(self, request: Request, answer: Answer) -> float:
        prompt = request.bound if answer.prompt_tokens is None else answer.prompt_tokens
        completion = request.max_tokens if answer.completion_tokens is None else answer.completion_tokens
        return self.price.cost(prompt, completion)

    async def _give_up(self, request: Request, failure: RequestFailed) -> None:
        record = {"event": "gave_up", "id": request.id, "item": request.item, "kind": request.kind}
        await self.journal.write({**record, "reason": failure.reason})
        _logger.warning("%s of item %s: gave up: %s", request.kind, request.item, failure.reason)
        self.report.gave_up += 1
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self.options.stop_after:
            self._stop(f"{self._failed_in_a_row} requests in a row had no answer, the last one: {failure.reason}")

    async def _wait(self, failure: RequestFailed, attempt: int) -> None:
        if failure.after is None:
            longest = min(_LONGEST_PAUSE, self.options.first_pause * 2**attempt)
            await asyncio.sleep(longest * random.uniform(0.5, 1.0))  # jitter, so that they do not all come back at once
        else:
            await self.rate.resume()

    async def _recover(self, request: Request, doubt: Doubt) -> Answer | None:
        """The stored answer of a request in doubt; waits as long as the server may still be writing it."""
        while True:
            waited = time.time() - doubt.sent_at
            try:
                answer = await self.endpoint.stored(request.id)
            except RequestFailed as failure:
                if not failure.retry:
                    raise ChatBridgeError(
                        f"--in-doubt recover: the server lists no stored answers ({failure.reason}); use ask or hold"
                    ) from failure
                answer = None
            if answer is not None or waited > 2 * self.endpoint.options.timeout or self.report.stopped:
                return answer
            await asyncio.sleep(min(_RECOVERY_INTERVAL, self.endpoint.options.timeout / 4))

    def _show_progress(self) -> None:
        now = time.monotonic()
        if now - self._shown_at >= 30:
            self._shown_at = now
            rate = self.report.answered / (now - self._began_at)
            _logger.info(
                "%d answered (%.1f/s), %d given up, $%.4f spent",
                *(self.report.answered, rate, self.report.gave_up, self.budget.spent),
            )


def _chosen(annotations: Iterable[Annotation], options: GenerateSettings) -> Mapping[str, set[str]]:
    """Per limited kind the ids of its items: those with the smallest hashes."""
    limits = {kind: count for kind, count in options.counts.items() if kind in options.kinds}
    if not limits:
        return {}
    ids = [annotation.id for annotation in annotations]

    def rank(kind: str, item: str) -> bytes:
        return hashlib.sha256(f"{options.seed}/{kind}/{item}".encode()).digest()

    return {kind: set(heapq.nsmallest(count, ids, key=functools.partial(rank, kind))) for kind, count in limits.items()}
