"""Second stage: queries a language model for chat data on any OpenAI-compatible server.

Each answer is one line of ``answers.jsonl``, written before its worker sends the next request. A later run skips
requests that have an answer. The openai client retries and honours ``Retry-After``; aiolimiter limits the rates.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from lavis_chatbridge.config import Settings, parse, read_yaml
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, MissingExtraError
from lavis_chatbridge.files import append_lines, hash_of, locked, read_objects
from lavis_chatbridge.multis.annotation import Annotation
from lavis_chatbridge.multis.prompts import DATA_KINDS, DataKind, PromptBook

ANSWERS = "answers.jsonl"
STOP_AFTER = 20
"""Number of consecutive failed requests after which a run stops."""
_CHARACTERS_PER_TOKEN = 4
_TOKENS_PER_MESSAGE = 8
_log = logging.getLogger(__name__)


class GenerateSettings(Settings):
    """Server, requests and limits of a generation; ``chatbridge multis generate --help`` explains them."""

    model: str
    base_url: str | None = None
    temperature: float = 0.7
    timeout: PositiveFloat = 120.0
    retries: NonNegativeInt = 5
    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra_body: dict[str, Any] = {}
    counts: dict[DataKind, NonNegativeInt] = {}
    """Maximum number of requests per kind; a kind without a number uses all items."""
    concurrency: PositiveInt = 16
    requests_per_minute: PositiveFloat | None = None
    max_cost: float | None = None
    """A request that might exceed it is not sent."""

    def check(self) -> Iterator[str]:
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            yield f"base_url is {self.base_url!r}, expected http://... or https://..."


class Price(Settings):
    """US dollars per million tokens."""

    input: float
    output: float

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Cost of a request in US dollars."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1_000_000


def price_of(model: str, table: str | Path | None = None, or_free: bool = False) -> Price:
    """The price of the longest entry of a table (by default ``prices.yaml``) that is a prefix of the model's name.

    A model without an entry is a `ConfigError`, or costs nothing if ``or_free``.
    """
    prices = {str(name): price for name, price in read_yaml(table or Path(__file__).with_name("prices.yaml")).items()}
    known = [name for name in prices if model == name or model.startswith(f"{name}-")]
    if known:
        name = max(known, key=len)
        return parse(Price, prices[name], name)
    if or_free:
        return Price(input=0.0, output=0.0)
    raise ConfigError(
        f"no price for the model {model!r} (known: {', '.join(prices)}): pass --prices with "
        f"'{model}: {{input: ..., output: ...}}' in US dollars per million tokens, or --price-of local"
    )


@dataclass(frozen=True)
class Request:
    """One request. Its id is a hash of everything that affects the answer."""

    id: str
    item: str
    kind: DataKind
    modality: str
    messages: list[Any]
    max_tokens: int

    def greatest_cost(self, price: Price) -> float:
        """Upper bound of the cost in US dollars: every token of the prompt has at least one byte."""
        prompt_tokens = sum(len(m["content"].encode()) + _TOKENS_PER_MESSAGE for m in self.messages)
        return price.cost(prompt_tokens, self.max_tokens)


def plan(annotations: Sequence[Annotation], book: PromptBook, options: GenerateSettings) -> Iterator[Request]:
    """Yield all requests, in the order of the annotations."""
    chosen = {}  # kind -> the ids of the items with the smallest hashes
    for kind, count in options.counts.items():
        chosen[kind] = set(heapq.nsmallest(count, (a.id for a in annotations), key=partial(hash_of, kind)))
    shared = (options.model, options.temperature, options.extra_body)
    for annotation in annotations:
        for kind in DATA_KINDS:
            if kind not in chosen or annotation.id in chosen[kind]:
                messages, limit = book.messages(kind, annotation), book.kinds[kind].max_tokens
                name = hash_of(*shared, limit, annotation.id, kind, messages)[:32]
                yield Request(name, annotation.id, kind, annotation.modality, messages, limit)


def read_answers(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Request id -> the answer in an output folder; a line that an interruption cut off is skipped."""
    file = Path(folder) / ANSWERS
    return {record["id"]: record for _, record in read_objects(file, skip_cut=True)} if file.is_file() else {}


class Estimate(NamedTuple):
    """Numbers of requests without and with an answer, tokens and US dollars of the former, and US dollars spent."""

    requests: int
    known: int
    tokens: int
    cost: float
    spent: float


def estimate(requests: Iterable[Request], price: Price, folder: str | Path) -> Estimate:
    """Estimate the cost without sending a request. Answers are assumed to be as long as the seed examples."""
    answers = read_answers(folder)
    known = count = prompt = answer = 0
    for request in requests:
        if request.id in answers:
            known += 1
            continue
        count += 1
        prompt += sum(len(m["content"]) // _CHARACTERS_PER_TOKEN + _TOKENS_PER_MESSAGE for m in request.messages)
        examples = [len(m["content"]) for m in request.messages if m["role"] == "assistant"]
        answer += sum(examples) // len(examples) // _CHARACTERS_PER_TOKEN if examples else request.max_tokens
    spent = sum(record["cost"] for record in answers.values())
    return Estimate(count, known, prompt + answer, price.cost(prompt, answer), spent)


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
    """Greatest cost of unanswered requests, in US dollars."""
    failed_in_a_row: int = 0

    async def work(self, requests: Iterator[Request]) -> Report:
        try:
            from aiolimiter import AsyncLimiter
            from openai import AsyncOpenAI
        except ImportError as error:
            raise MissingExtraError(error.name or "openai", "multis", "chatbridge multis generate") from error
        own, key = self.options, os.environ.get("OPENAI_API_KEY")
        if key is None and own.base_url is None:
            raise ConfigError("set OPENAI_API_KEY to your key, or name a server with --base-url")
        answers = read_answers(self.file.parent)
        self.done = set(answers)
        self.report.spent = sum(record["cost"] for record in answers.values())
        rate = own.requests_per_minute or 1e12
        self.limiter = AsyncLimiter(max(1.0, rate / 60), max(1.0, 60 / rate))  # bursts of a second's requests
        async with AsyncOpenAI(
            api_key=key or "none", base_url=own.base_url, timeout=own.timeout, max_retries=own.retries
        ) as self.client:
            await asyncio.gather(*(self._worker(requests) for _ in range(own.concurrency)))
        return self.report

    async def _worker(self, requests: Iterator[Request]) -> None:
        for request in requests:
            if self.report.stopped:
                return
            if request.id in self.done:
                self.report.known += 1
                continue
            self.done.add(request.id)
            limit, bound = self.options.max_cost, request.greatest_cost(self.price)
            taken = self.report.spent + self.in_flight
            if limit is not None and taken + bound > limit:
                self.report.stopped = f"${taken:.4f} of ${limit} is spent, and the next request may cost ${bound:.4f}"
                return
            self.in_flight += bound
            await self._send(request)
            self.in_flight -= bound

    async def _send(self, request: Request) -> None:
        import openai

        await self.limiter.acquire()
        try:
            answer = await self.client.chat.completions.create(
                model=self.options.model,
                messages=request.messages,
                temperature=self.options.temperature,
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
        except (openai.APIError, ValueError, TypeError, AttributeError, IndexError) as error:
            self._failed(request, f"{type(error).__name__}: {error.__cause__ or error}")
        else:
            cost, usage = request.greatest_cost(self.price), {}
            if answer.usage:
                usage = answer.usage.model_dump(include={"prompt_tokens", "completion_tokens"})
                cost = self.price.cost(**usage)
            about = {"id": request.id, "item": request.item, "kind": request.kind, "modality": request.modality}
            found = {"text": text, "finish": finish, "model": answer.model, "cost": round(cost, 9), **usage}
            append_lines(self.file, [json.dumps({**about, **found})])
            self.report.answered += 1
            self.report.spent += cost
            self.failed_in_a_row = 0

    def _failed(self, request: Request, reason: str) -> None:
        _log.warning("%s of item %s has no answer: %s", request.kind, request.item, reason[:300])
        self.report.failed += 1
        self.failed_in_a_row += 1
        if self.failed_in_a_row >= STOP_AFTER:
            self.report.stopped = f"{self.failed_in_a_row} requests in a row failed, the last one: {reason[:300]}"
