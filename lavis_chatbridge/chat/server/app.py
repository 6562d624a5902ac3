"""The HTTP side: ``/v1/chat/completions``, ``/v1/completions``, ``/v1/models``, ``/health`` and ``/metrics``.

It knows requests and the engine, no model. Every fault of a request becomes an answer in OpenAI's form and a line in
the log; no message names a path of the server.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from itertools import product
from typing import Any, TypeAlias

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lavis_chatbridge.chat.conversation import Conversation
from lavis_chatbridge.chat.engine import Answer, Engine, Event, QueueFullError, Reply
from lavis_chatbridge.chat.server import requests
from lavis_chatbridge.chat.server.requests import ChatRequest, RequestError, TextRequest
from lavis_chatbridge.chat.sources import MEBIBYTE, Access, is_loopback, is_own_name
from lavis_chatbridge.config import Settings

log = logging.getLogger("chatbridge.serve")

Asked: TypeAlias = "Conversation | str | Sequence[int]"

_LOOK = 0.5
"""Seconds between two checks whether the client of a waiting request is still there."""
_DRAINED = 4
"""This many times the limit of a body is read before the connection closes: a client that still sends would otherwise
see a lost connection instead of the refusal."""


class ServerSettings(Settings):
    """How a server behaves, and how much one request may cost."""

    name: str = "chatbridge"
    """The model's name for clients."""
    host: str = "127.0.0.1"
    """The address to listen on."""
    port: int = 8000
    """The port; 0 takes a free one."""
    tokens: tuple[str, ...] = ()
    """Bearer tokens, one of which a request must have; none asks for no token."""
    origins: tuple[str, ...] = ()
    """Origins of web pages that may call the server (CORS)."""
    access: Access = Access()
    """Which URLs of media are opened."""
    max_body: int = 64 * MEBIBYTE
    """Bytes of a request."""
    max_media: int = 16
    """Media of a request."""
    max_new_tokens: int = 1024
    """Upper limit of a reply's tokens."""
    timeout: float = 120.0
    """Seconds from a request's first byte to the last of its reply."""

    def check(self) -> Iterator[str]:
        """Yields contradictions and numbers out of range."""
        least = {"max_body": 1024, "max_media": 0, "max_new_tokens": 1, "port": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                yield f"{name} is {getattr(self, name)}, expected at least {value}"
        if not self.timeout > 0:
            yield f"timeout is {self.timeout}, expected above 0"
        if self.port > 65_535:
            yield f"port is {self.port}, expected at most 65535"
        for folder in self.access.folders:
            if not folder.is_dir():
                yield f"there is no folder {folder}"
        if any(not token.isascii() or not token.strip() or token != token.strip() for token in self.tokens):
            yield "a token is empty, or holds spaces around it or characters beyond ASCII"
        if not self.tokens and not is_loopback(self.host):
            yield f"others can reach host {self.host}: give tokens (--token-file), or listen on 127.0.0.1"


class Meters:
    """What the server counts for Prometheus."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("chatbridge_requests", "Requests.", ["path", "status"], registry=self.registry)
        self.tokens = Counter("chatbridge_tokens", "Tokens.", ["kind"], registry=self.registry)
        buckets = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
        self.seconds = Histogram(
            "chatbridge_reply_seconds", "Seconds of a reply.", buckets=buckets, registry=self.registry
        )
        for name, words, value in (
            ("present", "Replies that wait or are under way.", lambda: engine.present),
            ("running", "Replies under way.", lambda: engine.running),
            ("steps", "Steps of the local decoder.", lambda: engine.steps),
            ("step_replies", "Replies in all those steps together.", lambda: engine.rows),
        ):
            Gauge(f"chatbridge_{name}", words, registry=self.registry).set_function(value)

    def count(self, answer: Answer, seconds: float) -> None:
        """Count a complete reply."""
        numbers = {"prompt": answer.prompt_tokens, "reused": answer.reused_tokens, "generated": answer.tokens}
        for kind, number in numbers.items():
            self.tokens.labels(kind).inc(number)
        self.seconds.observe(seconds)


def build_app(engine: Engine, settings: ServerSettings) -> FastAPI:
    """The web application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # FastAPI's pages load scripts from elsewhere
    meters = Meters(engine)
    about = {"id": settings.name, "object": "model", "created": int(time.time()), "owned_by": "lavis-chatbridge"}
    about["max_model_len"] = engine.max_context

    if settings.origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(_Gate, settings=settings, meters=meters)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return _refusal(error, request)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        said = f"{request.method} {request.url.path}: {error.detail}"
        return _refusal(RequestError(error.status_code, said), request)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(meters.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [about]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        _check_model(name, settings)
        return JSONResponse(about)

    async def answered(request: Request, cls: type[Any]) -> Response:
        try:
            return await _Exchange(request, engine, settings, meters).answer(cls)
        except ClientDisconnect:
            return Response(status_code=499)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answered(request, ChatRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answered(request, TextRequest)

    return app


class _Gate:
    """Around every request: access, an id, one log line, a count, and the end of replies that nobody reads any more."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, meters: Meters) -> None:
        self._app, self._settings, self._meters = app, settings, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        given = request.headers.get("x-request-id", "")
        number = given if given.isascii() and given.isprintable() and 0 < len(given) <= 80 else secrets.token_hex(8)
        request.state.id, request.state.replies, request.state.said = number, [], ""
        status, began = 0, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", number.encode())]}
            await send(message)

        try:
            _check_access(request, self._settings)
            await self._app(scope, receive, watched)
        except RequestError as error:
            await _refusal(error, request)(scope, receive, watched)
        except Exception:
            log.exception("%s failed", number)
            if not status:
                await _refusal(_internal(number), request)(scope, receive, watched)
        finally:
            for reply in request.state.replies:
                reply.cancel()
            path = getattr(scope.get("route"), "path", "other")
            self._meters.requests.labels(path, status).inc()
            if path not in ("/health", "/metrics"):
                seconds = time.monotonic() - began
                log.info("%s %s %s %d %.2f s %s", number, request.method, path, status, seconds, request.state.said)


class _Exchange:
    """One request and its replies."""

    def __init__(self, request: Request, engine: Engine, settings: ServerSettings, meters: Meters) -> None:
        self._request, self._engine, self._settings, self._meters = request, engine, settings, meters
        self._began = time.monotonic()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._answers: dict[int, Answer] = {}

    async def answer(self, cls: type[Any]) -> Response:
        """The whole answer, or the stream of one.

        Raises:
            RequestError: If the request is at fault, or takes too long.
        """
        content_type = self._request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise RequestError(415, "the request's Content-Type is not application/json", "unsupported_media_type")
        body = await self._in_time(_body(self._request, self._settings.max_body))
        asked = await self._in_time(asyncio.to_thread(requests.read_request, cls, body))
        _check_model(asked.model or self._settings.name, self._settings)
        await self._begin(asked)
        response = requests.Response(self._settings.name, cls is ChatRequest, self._engine.codec)
        events = self._events()
        first = await anext(events)
        if asked.stream:
            usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            stream = self._stream(response, first, events, usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        async for _ in events:
            pass
        return JSONResponse(response.whole(self._ordered()))

    async def _begin(self, asked: ChatRequest | TextRequest) -> None:
        """Start every reply that the request asks for."""
        prompts: list[Asked]
        if isinstance(asked, ChatRequest):
            read = asyncio.to_thread(asked.conversation, self._settings.access, self._settings.max_media)
            prompts = [await self._in_time(read)]
        else:
            prompts = list(asked.prompts)
        loop = asyncio.get_running_loop()
        replies: list[Reply] = self._request.state.replies
        for prompt, sampling in product(prompts, asked.sampling(self._settings.max_new_tokens, asked.reported)):

            def deliver(event: Event, index: int = len(replies)) -> None:
                with suppress(RuntimeError):  # the server has ended: its loop is closed
                    loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

            try:
                replies.append(self._engine.reply(prompt, sampling, deliver))
            except QueueFullError as error:
                raise RequestError(429, str(error), "queue_full", headers={"Retry-After": "1"}) from error

    async def _events(self) -> AsyncIterator[tuple[int, Event]]:
        """What the replies deliver, with their numbers, until all are complete."""
        while len(self._answers) < len(self._request.state.replies):
            index, event = await self._next()
            if isinstance(event, Answer):
                self._answers[index] = event
                self._meters.count(event, time.monotonic() - self._began)
                said = f"{event.prompt_tokens} + {event.tokens} tokens, {len(event.media)} media"
                self._request.state.said = said
            yield index, event

    async def _stream(
        self,
        response: requests.Response,
        first: tuple[int, Event],
        events: AsyncIterator[tuple[int, Event]],
        usage: bool,
    ) -> AsyncIterator[bytes]:
        """The replies as server-sent events. A fault is an event too, since the status has been sent."""
        try:
            for index in range(len(self._request.state.replies)):
                yield response.opening(index)
            yield response.chunk(*first)
            async for index, event in events:
                yield response.chunk(index, event)
            if usage:
                yield response.numbers(self._ordered())
        except RequestError as error:
            self._request.state.said = error.message
            yield requests.event(error.body())
        except ClientDisconnect:
            return
        yield requests.DONE

    def _ordered(self) -> list[Answer]:
        return [self._answers[i] for i in range(len(self._answers))]

    async def _next(self) -> tuple[int, Event]:
        """The next event of any reply.

        Raises:
            RequestError: If the request is at fault, or takes too long.
            ClientDisconnect: If the client has gone.
        """
        while True:
            try:
                index, event = await asyncio.wait_for(self._queue.get(), min(self._left, _LOOK))
            except asyncio.TimeoutError:
                if self._left == 0:
                    raise self._late() from None
                if await self._request.is_disconnected():
                    raise ClientDisconnect from None
                continue
            if isinstance(event, Exception):
                raise self._refused(event) from event
            return index, event

    async def _in_time(self, task: Any) -> Any:
        try:
            return await asyncio.wait_for(task, self._left)
        except asyncio.TimeoutError:
            raise self._late() from None

    @property
    def _left(self) -> float:
        return max(0.0, self._began + self._settings.timeout - time.monotonic())

    def _late(self) -> RequestError:
        return RequestError(504, f"the request took longer than the limit of {self._settings.timeout:g} s", "timeout")

    def _refused(self, error: Exception) -> RequestError:
        known = requests.refusal_of(error)
        if known is None:
            log.error("%s failed", self._request.state.id, exc_info=error)
        return known or _internal(self._request.state.id)


async def _body(request: Request, limit: int) -> bytes:
    """The body of a request.

    Raises:
        RequestError: If it has more bytes than allowed.
    """
    refused = RequestError(413, f"the request's body is larger than the limit of {limit} bytes", "too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit * _DRAINED:
        raise refused
    content, count = bytearray(), 0
    async for part in request.stream():
        count += len(part)
        if count > limit * _DRAINED:
            break
        content = content + part if count <= limit else bytearray()
    if count > limit:
        raise refused
    return bytes(content)


def _check_access(request: Request, settings: ServerSettings) -> None:
    """Refuse a request without a token, or (where none is needed) one that comes by a foreign name or page."""
    if not settings.tokens and not is_own_name(request.headers.get("host", ""), settings.host):
        raise RequestError(403, "this server answers only under the name of its own address", "host_not_allowed")
    if not settings.tokens or request.url.path == "/health" or request.method == "OPTIONS":
        return
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = token.strip().encode()
    # All are compared in constant time, so that the time reveals nothing about them.
    right = [hmac.compare_digest(given, known.encode()) for known in settings.tokens]
    if scheme.lower() != "bearer" or not any(right):
        what = "the bearer token is not valid" if token else "a bearer token is needed"
        raise RequestError(401, what, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _check_model(name: str, settings: ServerSettings) -> None:
    if name != settings.name:
        raise RequestError(
            404, f"there is no model {name[:80]!r}; this server has {settings.name!r}", "model_not_found", "model"
        )


def _internal(number: str) -> RequestError:
    return RequestError(500, f"internal error; the server's log has more under {number}", "internal")


def _refusal(error: RequestError, request: Request) -> Response:
    request.state.said = error.message
    return JSONResponse(error.body(), error.status, error.headers)
