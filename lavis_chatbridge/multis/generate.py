"""Second stage: queries a language model for chat data on any OpenAI-compatible server.

Each answer is one line of ``answers.jsonl``, written before its worker sends the next request. A later run skips
requests that have an answer. The openai client retries and honours ``Retry-After``; aiolimiter limits the rates.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from lavis_chatbridge.config import Settings
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, MissingExtraError
from lavis_chatbridge.files import append_lines, hash_of, locked, read_lines
from lavis_chatbridge.multis.annotation import Annotation
from lavis_chatbridge.multis.prices import Price
from lavis_chatbridge.multis.prompts import DATA_KINDS, DataKind, PromptBook

ANSWERS = "answers.jsonl"
STOP_AFTER = 20
"""Number of consecutive failed requests after which a run stops."""
_CHARACTERS_PER_TOKEN = 4
_TOKENS_PER_MESSAGE = 8
_UNLIMITED = 1e12
_log = logging.getLogger(__name__)


class GenerateSettings(Settings):
    """Server, requests and limits of a generation; ``chatbridge multis generate --help`` explains them."""

    model: str
    base_url: str | None = None
    """URL of the server; null: OpenAI's."""
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float = 0.7
    top_p: float = 1.0
    timeout: PositiveFloat = 120.0
    """Time limit of one attempt in seconds."""
    retries: NonNegativeInt = 5
    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The request's field for the token limit; newer OpenAI models need ``max_completion_tokens``."""
    extra_body: dict[str, Any] = {}
    """Additional fields of each request."""
    kinds: list[DataKind] = list(DATA_KINDS)
    counts: dict[DataKind, int] = {}
    """Maximum number of requests per kind, sampled with ``seed``; other kinds use all items."""
    shots: NonNegativeInt = 3
    """Number of seed examples per prompt."""
    seed: int = 0
    concurrency: PositiveInt = 16
    requests_per_minute: PositiveFloat | None = None
    tokens_per_minute: PositiveFloat | None = None
    """Limit per minute on the prompts' tokens (estimated) plus the answers' token limits."""
    max_cost: float | None = None
    """Limit in US dollars, over all runs with this output folder. A request that might exceed it is not sent."""

    def check(self) -> Iterator[str]:
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            yield f"base_url must begin with http:// or https://, found {self.base_url!r}"


@dataclass(frozen=True)
class Request:
    """One request. Its id is a hash of everything that affects the answer."""

    id: str
    item: str
    kind: DataKind
    modality: str
    messages: list[Any]
    max_tokens: int

    @property
    def prompt_tokens(self) -> int:
        """Estimated number of prompt tokens, at four characters per token."""
        return sum(len(m["content"]) // _CHARACTERS_PER_TOKEN + _TOKENS_PER_MESSAGE for m in self.messages)

    @property
    def most_prompt_tokens(self) -> int:
        """Upper bound of the number of prompt tokens: every token has at least one byte."""
        return sum(len(m["content"].encode()) + _TOKENS_PER_MESSAGE for m in self.messages)


def plan(
    annotations: Callable[[], Iterable[Annotation]], book: PromptBook, options: GenerateSettings
) -> Iterator[Request]:
    """Yield all requests, in the order of the annotations.

    ``annotations`` is a function that opens the annotations; it is called again for each kind in ``options.counts``.
    """
    chosen = {kind: _sampled(annotations(), kind, count, options.seed) for kind, count in options.counts.items()}
    for annotation in annotations():
        for kind in options.kinds:
            if kind in chosen and annotation.id not in chosen[kind]:
                continue
            messages = book.messages(kind, annotation, options.shots, options.seed)
            limit = book.kinds[kind].max_tokens
            shape = (options.model, options.temperature, options.top_p, limit, annotation.id, kind, messages)
            yield Request(hash_of(*shape)[:32], annotation.id, kind, annotation.modality, messages, limit)


def _sampled(annotations: Iterable[Annotation], kind: str, count: int, seed: int) -> set[str]:
    """The ids of the ``count`` items with the smallest hashes."""
    ids = (annotation.id for annotation in annotations)
    return set(heapq.nsmallest(count, ids, key=lambda i: hashlib.sha256(f"{seed}/{kind}/{i}".encode()).digest()))


def read_answers(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the answers in an output folder, one per request; an incomplete line of a killed run is skipped."""
    file = Path(folder) / ANSWERS
    seen: set[str] = set()
    for _, line in read_lines(file) if file.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["id"] not in seen:
            seen.add(record["id"])
            yield record


class Estimate(NamedTuple):
    """Numbers of requests without and with an answer, and US dollars: expected, maximum, spent by earlier runs."""

    requests: int
    known: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    bound: float
    spent: float


def estimate(requests: Iterable[Request], book: PromptBook, price: Price, folder: str | Path) -> Estimate:
    """Estimate the cost without sending a request. Answers are assumed to be as long as the seed examples."""
    before = {record["id"]: record["cost"] for record in read_answers(folder)}
    known = count = prompt = 0
    completion = bound = 0.0
    for request in requests:
        if request.id in before:
            known += 1
            continue
        lengths = [len(answer) for _, answer in book.examples[request.kind, request.modality]]
        count += 1
        prompt += request.prompt_tokens
        completion += sum(lengths) / len(lengths) / _CHARACTERS_PER_TOKEN
        bound += price.cost(request.most_prompt_tokens, request.max_tokens)
    cost = price.cost(prompt, completion)
    return Estimate(count, known, prompt, round(completion), cost, bound, sum(before.values()))


@dataclass
class Report:
    """Counts of a run, and the total cost in US dollars of all runs with this output folder."""

    answered: int = 0
    known: int = 0
    failed: int = 0
    spent: float = 0.0
    stopped: str = ""
    """Why the run ended early, or ""."""


def generate(requests: Iterable[Request], folder: str | Path, price: Price, options: GenerateSettings) -> Report:
    """Send every request that has no answer in ``folder/answers.jsonl`` yet.

    Raises:
        ChatBridgeError: If the server rejects the key or the model; earlier answers stay in the folder.
        DataError: If another process writes to the folder.
    """
    file = Path(folder) / ANSWERS
    with locked(file, wait_seconds=0):
        return asyncio.run(_Run(file, price, options).work(iter(requests)))


@dataclass
class _Run:
    """Workers that share one iterator of requests and one client."""

    file: Path
    price: Price
    options: GenerateSettings
    report: Report = field(default_factory=Report)
    in_flight: float = 0.0
    """Upper bound of the cost of unanswered requests, in US dollars."""
    failed_in_a_row: int = 0

    async def work(self, requests: Iterator[Request]) -> Report:
        try:
            from aiolimiter import AsyncLimiter
            from openai import AsyncOpenAI
        except ImportError as error:
            raise MissingExtraError(error.name or "openai", "multis", "chatbridge multis generate") from error
        options = self.options
        key = os.environ.get(options.api_key_env)
        if key is None and options.base_url is None:
            raise ConfigError(f"set {options.api_key_env} to your key, or name a server with --base-url")
        costs = {record["id"]: record["cost"] for record in read_answers(self.file.parent)}
        self.done, self.report.spent = set(costs), sum(costs.values())
        rates = (options.requests_per_minute or _UNLIMITED, options.tokens_per_minute or _UNLIMITED)
        # Allow bursts of one second's requests, and at least one.
        self.limits = [AsyncLimiter(max(1.0, rate / 60), max(1.0, 60 / rate)) for rate in rates]
        async with AsyncOpenAI(
            api_key=key or "none", base_url=options.base_url, timeout=options.timeout, max_retries=options.retries
        ) as self.client:
            await asyncio.gather(*(self._worker(requests) for _ in range(options.concurrency)))
        return self.report

    async def _worker(self, requests: Iterator[Request]) -> None:
        for request in requests:
            if self.report.stopped:
                return
            if request.id in self.done:
                self.report.known += 1
                continue
            self.done.add(request.id)
            bound = self.price.cost(request.most_prompt_tokens, request.max_tokens)
            limit = self.options.max_cost
            if limit is not None and self.report.spent + self.in_flight + bound > limit:
                self.report.stopped = (
                    f"the next request may cost ${bound:.4f}; ${self.report.spent:.4f} of ${limit} is spent and "
                    f"${self.in_flight:.4f} is in flight"
                )
                return
            self.in_flight += bound
            try:
                await self._send(request)
            finally:
                self.in_flight -= bound

    async def _send(self, request: Request) -> None:
        import openai

        requests, tokens = self.limits
        await requests.acquire()
        await tokens.acquire(min(request.prompt_tokens + request.max_tokens, tokens.max_rate))
        try:
            answer = await self.client.chat.completions.create(
                model=self.options.model,
                messages=request.messages,
                temperature=self.options.temperature,
                top_p=self.options.top_p,
                extra_body={self.options.token_limit_field: request.max_tokens, **self.options.extra_body},
                extra_headers={"Idempotency-Key": request.id},
            )
            text, finish = answer.choices[0].message.content or "", answer.choices[0].finish_reason
        except openai.APIStatusError as error:
            if error.status_code in (401, 403, 404) or error.code == "insufficient_quota":
                self.report.stopped = f"HTTP {error.status_code}"
                raise ChatBridgeError(
                    f"{self.options.base_url or 'OpenAI'} refuses the model {self.options.model!r}: {error.message}"
                ) from error
            self._failed(request, f"HTTP {error.status_code}: {error.message}")
        except openai.APIConnectionError as error:
            self._failed(request, f"{error}: {error.__cause__ or 'no cause given'}")
        except (openai.APIError, ValueError, TypeError, AttributeError, IndexError) as error:
            self._failed(request, f"unreadable answer: {error}")
        else:
            self._answered(request, answer, text, finish)

    def _failed(self, request: Request, reason: str) -> None:
        _log.warning("%s of item %s has no answer: %s", request.kind, request.item, reason[:300])
        self.report.failed += 1
        self.failed_in_a_row += 1
        if self.failed_in_a_row >= STOP_AFTER:
            self.report.stopped = f"{self.failed_in_a_row} requests in a row failed, the last one: {reason[:300]}"

    def _answered(self, request: Request, answer: Any, text: str, finish: str) -> None:
        usage = answer.usage
        prompt = usage.prompt_tokens if usage else request.most_prompt_tokens
        completion = usage.completion_tokens if usage else request.max_tokens
        cost = self.price.cost(prompt, completion)
        record = {
            "id": request.id, "item": request.item, "kind": request.kind, "modality": request.modality, "text": text,
            "finish": finish, "model": answer.model or self.options.model, "prompt_tokens": prompt,
            "completion_tokens": completion, "cost": round(cost, 9),
        }  # fmt: skip
        append_lines(self.file, [json.dumps(record)])
        self.report.answered += 1
        self.report.spent += cost
        self.failed_in_a_row = 0
