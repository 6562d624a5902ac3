"""The HTTP side: ``/v1/chat/completions``, ``/v1/completions``, ``/v1/models``, ``/health`` and ``/metrics``.

Every fault of a request becomes an answer in OpenAI's form and a line in the log; no message names a path of the
server. This module uses requests and the engine, never a model.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from itertools import product
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lavis_chatbridge.chat.engine import Answer, Engine, Event, Reply
from lavis_chatbridge.chat.messages import Access
from lavis_chatbridge.chat.server import requests
from lavis_chatbridge.chat.server.command import MEBIBYTE, own_names
from lavis_chatbridge.chat.server.requests import Body, ChatRequest, RequestError, TextRequest, refusal_of

if TYPE_CHECKING:
    from lavis_chatbridge.chat.server.command import ServerOptions

T = TypeVar("T")

log = logging.getLogger("chatbridge.serve")

_DRAINED = 4
"""A body up to this many times the limit is read and dropped: a client that still sends would otherwise see a lost
connection instead of the refusal."""
_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds
Events: TypeAlias = "AsyncIterator[tuple[int, Event]]"
"""The events of several replies, with the replies' numbers."""


class Meters:
    """Counters for Prometheus."""

    def __init__(self, engine: Engine) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter("chatbridge_requests", "Requests.", ["path", "status"], registry=own)
        self.tokens = Counter("chatbridge_tokens", "Tokens.", ["kind"], registry=own)
        self.seconds = Histogram("chatbridge_reply_seconds", "Seconds of a reply.", buckets=_BUCKETS, registry=own)
        present = Gauge("chatbridge_present", "Replies that wait or are being generated.", registry=own)
        present.set_function(lambda: engine.present)
        running = Gauge("chatbridge_running", "Replies that are being generated.", registry=own)
        running.set_function(lambda: engine.running)

    def count(self, answer: Answer, seconds: float) -> None:
        self.tokens.labels("prompt").inc(answer.prompt_tokens)
        self.tokens.labels("reused").inc(answer.reused_tokens)
        self.tokens.labels("generated").inc(answer.tokens)
        self.seconds.observe(seconds)


def build_app(engine: Engine, options: ServerOptions) -> FastAPI:
    """The web application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # FastAPI's pages load scripts from elsewhere
    meters, now = Meters(engine), int(time.time())
    about = {"id": options.name, "object": "model", "created": now, "owned_by": "lavis-chatbridge"}
    about["max_model_len"] = engine.max_context
    app.add_middleware(_Gate, options=options, meters=meters)
    if options.allowed_origins:
        origins = list(options.allowed_origins)
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return _refusal(RequestError(error.status_code, f"{request.url.path}: {error.detail}"), request)

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
        _check_model(name, options.name)
        return JSONResponse(about)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _Exchange(request, engine, options, meters).respond(ChatRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _Exchange(request, engine, options, meters).respond(TextRequest)

    return app


class _Gate:
    """Around every request: access, an id, one log line, a count, faults, and the end of its replies."""

    def __init__(self, app: ASGIApp, options: ServerOptions, meters: Meters) -> None:
        self._app, self._meters, self._tokens = app, meters, options.tokens
        self._own_names = own_names(options.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        given = request.headers.get("x-request-id", "")
        number = given if given.isascii() and given.isprintable() and 0 < len(given) <= 80 else secrets.token_hex(8)
        replies: list[Reply] = []
        request.state.id, request.state.replies, request.state.remark = number, replies, ""
        status, began = 0, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", number.encode())]}
            await send(message)

        try:
            self._check_access(request)
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            status = 499
        except Exception as error:
            refusal = refusal_of(error, number)
            if not status:
                await _refusal(refusal, request)(scope, receive, watched)
        finally:
            for reply in replies:
                reply.cancel()
            path = getattr(scope.get("route"), "path", "other")
            self._meters.requests.labels(path, status).inc()
            if path not in ("/health", "/metrics"):
                seconds = time.monotonic() - began
                log.info("%s %s %s %d %.2f s %s", number, request.method, path, status, seconds, request.state.remark)

    def _check_access(self, request: Request) -> None:
        """Refuse a request without a token, or (where none is needed) one that comes by a foreign name."""
        if not self._tokens and not self._own_names.fullmatch(request.headers.get("host", "")):
            raise RequestError(403, "this server answers only under the name of its own address", "host_not_allowed")
        if not self._tokens or request.url.path == "/health":
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip().encode()
        # All are compared in constant time, so that the time reveals nothing about them.
        right = [hmac.compare_digest(given, known.encode()) for known in self._tokens]
        if scheme.lower() != "bearer" or not any(right):
            message = "the bearer token is not valid" if token else "a bearer token is needed"
            raise RequestError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


class _Exchange:
    """One request and the replies to it. Their events arrive in a queue, and so does the client's leaving."""

    def __init__(self, request: Request, engine: Engine, options: ServerOptions, meters: Meters) -> None:
        self._request, self._engine, self._options, self._meters = request, engine, options, meters
        self._replies: list[Reply] = request.state.replies
        self._began = time.monotonic()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._answers: dict[int, Answer] = {}

    async def respond(self, cls: type[Body]) -> Response:
        """The whole answer, or the stream of one; RequestError if the request is at fault, or takes too long."""
        body = await self._in_time(self._begin(cls))
        response = requests.Response(self._options.name, cls is ChatRequest, self._engine.tokenizer)
        events = self._events()
        first = await anext(events)  # a fault before it still gets a status of its own
        if body.stream:
            usage = bool((body.stream_options or {}).get("include_usage"))
            stream = self._stream(response, first, events, usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        async for _ in events:
            pass
        return JSONResponse(response.whole(self._complete()))

    async def _in_time(self, result: Awaitable[T]) -> T:
        limit = self._options.timeout
        try:
            return await asyncio.wait_for(result, self._began + limit - time.monotonic())
        except asyncio.TimeoutError:
            raise RequestError(504, f"the request took longer than the limit of {limit:g} s", "timeout") from None

    async def _begin(self, cls: type[Body]) -> Body:
        """Read the request and start every reply that it asks for."""
        own = self._options
        content_type = self._request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise RequestError(415, "the request's Content-Type is not application/json", "unsupported_media_type")
        content = await _content(self._request, round(own.max_body * MEBIBYTE))
        body = await asyncio.to_thread(requests.read_request, cls, content)
        _check_model(body.model or own.name, own.name)
        limit = round(own.max_medium * MEBIBYTE)
        access = Access(folders=own.files, hosts=own.allowed_hosts, max_bytes=limit)
        prompts = await asyncio.to_thread(body.prompts, access, own.max_media)
        loop = asyncio.get_running_loop()
        for index, (prompt, sampling) in enumerate(product(prompts, body.samplings(own.max_tokens))):

            def deliver(event: Event, index: int = index) -> None:
                with suppress(RuntimeError):  # the server has ended: its loop is closed
                    loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

            self._replies.append(self._engine.reply(prompt, sampling, deliver))
        return body

    async def _events(self) -> Events:
        """The replies' events, until all are complete or one is a fault."""
        watcher = asyncio.create_task(self._watch())
        try:
            while len(self._answers) < len(self._replies):
                index, event = await self._in_time(self._queue.get())
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Answer):
                    self._answers[index] = event
                    self._meters.count(event, time.monotonic() - self._began)
                    remark = f"{event.prompt_tokens} + {event.tokens} tokens, {len(event.media)} media"
                    self._request.state.remark = remark
                yield index, event
        finally:
            watcher.cancel()

    async def _watch(self) -> None:
        """Wait until the client leaves."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait((0, ClientDisconnect()))

    async def _stream(
        self, response: requests.Response, first: tuple[int, Event], events: Events, usage: bool
    ) -> AsyncIterator[bytes]:
        """The replies as server-sent events. A fault is an event too, since the status has been sent."""
        try:
            for index in range(len(self._replies)):
                yield response.opening(index)
            yield response.chunk(*first)
            async for index, event in events:
                yield response.chunk(index, event)
            if usage:
                yield response.usage(self._complete())
        except ClientDisconnect:
            return
        except Exception as error:
            refusal = refusal_of(error, self._request.state.id)
            self._request.state.remark = refusal.message
            yield requests.server_sent(refusal.body())
        yield requests.DONE

    def _complete(self) -> list[Answer]:
        return [self._answers[i] for i in range(len(self._replies))]


async def _content(request: Request, limit: int) -> bytes:
    """The body of a request; RequestError if it has more bytes than allowed."""
    refused = RequestError(413, f"the request's body is larger than the limit of {limit} bytes", "too_large")
    if int(request.headers.get("content-length", 0)) > limit * _DRAINED:
        raise refused
    content = bytearray()
    async for part in request.stream():
        if len(content) <= limit:
            content += part
    if len(content) > limit:
        raise refused
    return bytes(content)


def _check_model(name: str, own: str) -> None:
    if name != own:
        raise RequestError(404, f"there is no model {name[:80]!r}; this server has {own!r}", "model_not_found", "model")


def _refusal(error: RequestError, request: Request) -> Response:
    request.state.remark = error.message
    return JSONResponse(error.body(), error.status, error.headers)
