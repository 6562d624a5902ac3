"""Asks a language model for chat data: many requests at a time, one line of JSON per answer.

``answers.jsonl`` is the whole state: a request that has an answer there is never sent again, so the same command
continues an interrupted run. Requests that a kill cut off are asked again. The openai client retries failures; this
module knows neither how prompts are worded nor how answers are read.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import logging
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lavis_chatbridge import config
from lavis_chatbridge.config import Settings
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, MissingExtraError
from lavis_chatbridge.files import append_lines, hash_of, locked
from lavis_chatbridge.multis.annotation import Annotation, describe, whole_records
from lavis_chatbridge.multis.prompts import DATA_KINDS, Chat, DataKind, PromptBook

ANSWERS = "answers.jsonl"
_TOKEN = re.compile(r"[^\W\d_]{1,7}|\d{1,3}|\n|[^\w\s]")
_TOKENS_PER_MESSAGE = 8  # role and separators; providers state 3 to 7
_SHOW_EVERY = 100
_log = logging.getLogger(__name__)


class GenerateSettings(Settings):
    """What to ask, where, and how."""

    model: str
    """The model's name at the server."""
    base_url: str | None = None
    """An OpenAI-compatible server, e.g. ``http://localhost:8000/v1``; null for OpenAI's own."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable with the key."""
    temperature: float = 0.7
    top_p: float = 1.0
    timeout: float = 120.0
    """Seconds per attempt."""
    retries: int = 5
    """Further attempts after a failure; their pauses double, unless the server states a time."""
    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The request's field for the longest answer; newer OpenAI models want the second."""
    extra_body: dict[str, Any] = {}
    """Further fields of each request."""
    kinds: tuple[DataKind, ...] = DATA_KINDS
    counts: dict[str, int] = {}
    """The most requests per kind, whose items are sampled by ``seed``; other kinds take all items."""
    shots: int = 3
    """Seed examples per prompt."""
    seed: int = 0
    """Samples items and examples."""
    concurrency: int = 16
    """Requests at a time."""
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    """Of prompts and longest answers together."""
    max_cost: float | None = None
    """US dollars after which no request is sent, over all runs into the folder; those in flight may exceed it."""
    stop_after: int = 20
    """Requests without an answer in a row after which the run stops: the server is down."""

    def check(self) -> Iterator[str]:
        for name, least in (("shots", 0), ("retries", 0), ("concurrency", 1), ("stop_after", 1)):
            if getattr(self, name) < least:
                yield f"{name} is {getattr(self, name)}, expected at least {least}"
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            yield f"base_url is {self.base_url!r}, expected http://... or https://..."
        if self.timeout <= 0:
            yield f"timeout is {self.timeout}, expected more than 0"
        for kind in self.counts:
            if kind not in DATA_KINDS:
                yield f"counts has no kind {kind!r}; known are {', '.join(DATA_KINDS)}"


class Price(Settings):
    """US dollars per million tokens."""

    input: float
    output: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """US dollars for one request."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1_000_000


def price_of(model: str, table: str | Path | None = None) -> Price:
    """The price of a model: that of the longest name in the table with which ``model`` begins.

    Args:
        model: Its name.
        table: A YAML file ``name: {input: ..., output: ...}``; by default the package's own.

    Raises:
        ConfigError: If the table does not have this form, or has no such model.
    """
    file = Path(table) if table else Path(__file__).with_name("prices.yaml")
    prices = config.read_yaml(file)
    names = [str(name) for name in prices]
    known = [name for name in names if model == name or model.startswith(f"{name}-")]
    if not known:
        raise ConfigError(
            f"no price for the model {model!r} in {file} (known: {', '.join(names)}); write a table "
            f"'{model}: {{input: ..., output: ...}}' in US dollars per million tokens and pass it with --prices, or "
            "name a listed price with --price-of (local costs nothing)"
        )
    name = max(known, key=len)
    return config.parse(Price, dict(prices[name]), name)


def estimate_tokens(chat: Iterable[dict[str, str]]) -> int:
    """About how many tokens a chat has: words (long ones count twice), groups of three digits, signs."""
    return sum(len(_TOKEN.findall(message["content"])) + _TOKENS_PER_MESSAGE for message in chat)


@dataclass(frozen=True)
class Request:
    """One chat to send. Its id is a hash of everything that affects the answer."""

    id: str
    item: str
    kind: DataKind
    modality: str
    chat: Chat
    max_tokens: int


def plan(
    annotations: Callable[[], Iterable[Annotation]], book: PromptBook, options: GenerateSettings
) -> Iterator[Request]:
    """The requests of a generation, one at a time, in the order of the annotations.

    Args:
        annotations: Reads the items; called twice if ``options.counts`` limits a kind.
        book: Words the requests.
        options: Kinds, counts, shots, seed; model and sampling are part of a request's id.
    """
    chosen: dict[str, set[str]] = {}
    ids = [annotation.id for annotation in annotations()] if options.counts else []
    for kind, count in options.counts.items():
        ranks = {hash_of(options.seed, kind, item): item for item in ids}
        chosen[kind] = {ranks[rank] for rank in heapq.nsmallest(count, ranks)}
    for annotation in annotations():
        notes, modality = describe(annotation), annotation.modality
        for kind in options.kinds:
            if kind not in chosen or annotation.id in chosen[kind]:
                chat = book.messages(kind, modality, annotation.id, notes, options.shots, options.seed)
                longest = book.max_tokens(kind)
                shape = (options.model, options.temperature, options.top_p, longest, annotation.id, kind, chat)
                yield Request(hash_of(*shape)[:32], annotation.id, kind, modality, chat, longest)


def answers(path: str | Path) -> Iterator[dict[str, Any]]:
    """The answers of a generation's folder or file, one per request, in the order in which they came."""
    path, seen = Path(path), set()
    for record in whole_records(path / ANSWERS if path.is_dir() else path):
        if record["id"] not in seen:
            seen.add(record["id"])
            yield record


def estimate(requests: Iterable[Request], folder: Path, book: PromptBook, price: Price) -> str:
    """What the requests without an answer will cost, in words; sends nothing."""
    known = {record["id"]: float(record.get("cost") or 0.0) for record in answers(folder)}
    waiting = [request for request in requests if request.id not in known]
    prompt, completion, lengths = 0, 0.0, {}
    for request in waiting:
        where = (request.kind, request.modality)
        if where not in lengths:
            examples = book.examples(*where)  # type: ignore[arg-type]
            lengths[where] = sum(estimate_tokens([{"content": answer}]) for _, answer in examples) / len(examples)
        prompt += estimate_tokens(request.chat)
        completion += lengths[where]
    return "\n".join(
        [
            f"requests to send:        {len(waiting)} ({len(known)} have an answer already)",
            f"prompt tokens, about:    {prompt}",
            f"answer tokens, about:    {round(completion)}",
            f"cost, about:             ${price.cost(prompt, round(completion)):.2f}",
            f"spent so far:            ${sum(known.values()):.2f}",
        ]
    )


@dataclass
class Report:
    """What a run did; ``spent`` in US dollars over all runs, ``stopped`` the reason if it ended early."""

    answered: int = 0
    known: int = 0
    gave_up: int = 0
    spent: float = 0.0
    stopped: str = ""


class EndpointError(ChatBridgeError):
    """The server will answer no request: wrong key, unknown model, empty account."""


def generate(requests: Iterable[Request], folder: str | Path, price: Price, options: GenerateSettings) -> Report:
    """Ask for everything that has no answer yet.

    Args:
        requests: The whole plan, also what earlier runs answered; read one at a time.
        folder: Gets ``answers.jsonl``.
        price: Of the model.
        options: Server, limits, retries, budget.

    Raises:
        EndpointError: If the server refuses every request; earlier answers are in the file.
        DataError: If another process writes the same file.
        MissingExtraError: If openai or aiolimiter is absent.
        ConfigError: If OpenAI's own server is asked without a key.
    """
    path = Path(folder) / ANSWERS
    with locked(path, wait_seconds=0):
        return asyncio.run(_Run(path, price, options).work(iter(requests)))


class _Run:
    """Workers that share an iterator of requests, a client, rate limits and a file."""

    def __init__(self, path: Path, price: Price, options: GenerateSettings) -> None:
        self.path, self.price, self.options, self.report = path, price, options, Report()
        known = {record["id"]: float(record.get("cost") or 0.0) for record in answers(path)}
        self.done, self.report.spent = set(known), sum(known.values())
        self._failed_in_a_row = 0
        self._fatal: EndpointError | None = None

    async def work(self, requests: Iterator[Request]) -> Report:
        """Run the workers until the requests, the budget or the user's patience end."""
        try:
            import openai
            from aiolimiter import AsyncLimiter
        except ImportError as error:
            raise MissingExtraError(error.name or "openai", "multis", "chatbridge multis generate") from error
        options = self.options
        key = os.environ.get(options.api_key_env)
        if key is None and options.base_url is None:
            raise ConfigError(f"set {options.api_key_env} to your key, or name another server with --base-url")
        every = 60 / options.requests_per_minute if options.requests_per_minute else 0
        self._pace = AsyncLimiter(1, every) if every else None
        self._tokens = AsyncLimiter(options.tokens_per_minute, 60) if options.tokens_per_minute else None
        loop = asyncio.get_running_loop()
        with suppress(ValueError, RuntimeError, NotImplementedError):  # possible in the main thread only
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self._interrupt, loop, number)
        async with openai.AsyncOpenAI(
            api_key=key or "none", base_url=options.base_url, timeout=options.timeout, max_retries=options.retries
        ) as client:
            await asyncio.gather(*(self._worker(client, requests) for _ in range(options.concurrency)))
        if self._fatal is not None:
            raise self._fatal
        return self.report

    def _interrupt(self, loop: asyncio.AbstractEventLoop, number: int) -> None:
        self._stop("interrupted")
        _log.warning("stopping: waiting for the answers in flight; interrupt again to lose them")
        loop.remove_signal_handler(number)

    def _stop(self, reason: str) -> None:
        self.report.stopped = self.report.stopped or reason

    async def _worker(self, client: Any, requests: Iterator[Request]) -> None:
        for request in requests:
            limit = self.options.max_cost
            if limit is not None and self.report.spent >= limit:
                self._stop(f"${self.report.spent:.4f} are spent, the limit (max_cost) is ${limit:g}")
            if self.report.stopped:
                return
            if request.id in self.done:
                self.report.known += 1
                continue
            self.done.add(request.id)
            await self._ask(client, request)

    async def _ask(self, client: Any, request: Request) -> None:
        import openai

        if self._tokens is not None:
            tokens = estimate_tokens(request.chat) + request.max_tokens
            await self._tokens.acquire(min(tokens, self._tokens.max_rate))
        if self._pace is not None:
            await self._pace.acquire()
        options = self.options
        try:
            answer = await client.chat.completions.create(
                model=options.model,
                messages=request.chat,
                temperature=options.temperature,
                top_p=options.top_p,
                extra_body={options.token_limit_field: request.max_tokens, **options.extra_body},
                extra_headers={"Idempotency-Key": request.id},
            )
            self._accept(request, answer)
        except openai.APIStatusError as error:
            self._failed(request, f"HTTP {error.status_code}: {error.message[:300]}")
            if error.status_code in (401, 403, 404) or error.code == "insufficient_quota":
                server = options.base_url or "OpenAI"
                self._fatal = EndpointError(f"{server} refuses the model {options.model!r}: {error.message[:300]}")
                self._stop(str(self._fatal))
        except (openai.APIError, ValueError, LookupError, TypeError, AttributeError) as error:  # no chat completion
            self._failed(request, f"{type(error).__name__}: {error}")

    def _failed(self, request: Request, reason: str) -> None:
        _log.warning("%s of item %s: no answer: %s", request.kind, request.item, reason)
        self.report.gave_up += 1
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self.options.stop_after:
            self._stop(f"{self._failed_in_a_row} requests in a row had no answer, the last one: {reason}")

    def _accept(self, request: Request, answer: Any) -> None:
        choice, usage = answer.choices[0], answer.usage
        text = choice.message.content or ""
        if not isinstance(text, str):
            raise TypeError(f"the content is {type(text).__name__}")
        prompt = usage.prompt_tokens if usage else estimate_tokens(request.chat)
        completion = usage.completion_tokens if usage else estimate_tokens([{"content": text}])
        cost = self.price.cost(prompt, completion)
        record = {
            "id": request.id,
            "item": request.item,
            "kind": request.kind,
            "modality": request.modality,
            "text": text,
            "finish": choice.finish_reason,
            "model": answer.model or self.options.model,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "cost": round(cost, 9),
        }
        append_lines(self.path, [json.dumps(record)])
        self._failed_in_a_row = 0
        self.report.answered += 1
        self.report.spent += cost
        if self.report.answered % _SHOW_EVERY == 0:
            report = self.report
            _log.info("%d answered, %d given up, $%.4f spent", report.answered, report.gave_up, report.spent)
