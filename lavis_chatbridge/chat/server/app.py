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
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from itertools import product
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lavis_chatbridge.chat.engine import Answer, Engine, Event, QueueFullError
from lavis_chatbridge.chat.server import requests
from lavis_chatbridge.chat.server.requests import Body, ChatRequest, RequestError, TextRequest
from lavis_chatbridge.chat.urls import MEBIBYTE, is_own_name

if TYPE_CHECKING:
    from lavis_chatbridge.chat.server.command import ServerOptions

log = logging.getLogger("chatbridge.serve")

_DRAINED = 4
"""This many times the limit of a body is read before the connection closes: a client that still sends would otherwise
see a lost connection instead of the refusal."""


class Meters:
    """Counters for Prometheus."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("chatbridge_requests", "Requests.", ["path", "status"], registry=self.registry)
        self.tokens = Counter("chatbridge_tokens", "Tokens.", ["kind"], registry=self.registry)
        buckets = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
        self.seconds = Histogram(
            "chatbridge_reply_seconds", "Seconds of a reply.", buckets=buckets, registry=self.registry
        )
        for name, words, value in (
            ("present", "Replies that wait or are being generated.", lambda: engine.present),
            ("running", "Replies that are being generated.", lambda: engine.running),
            ("steps", "Steps of the local decoder.", lambda: engine.steps),
            ("step_replies", "Replies in all those steps together.", lambda: engine.rows),
        ):
            Gauge(f"chatbridge_{name}", words, registry=self.registry).set_function(value)

    def count(self, answer: Answer, seconds: float) -> None:
        """Count a complete reply."""
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
    if options.allowed_origins:
        origins = list(options.allowed_origins)
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(_Gate, options=options, meters=meters)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return _refusal(error, request)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return _refusal(RequestError(error.status_code, f"{request.url.path}: {error.detail}"), request)

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)

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
        return await _Exchange(request, engine, options, meters).answer(ChatRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _Exchange(request, engine, options, meters).answer(TextRequest)

    return app


class _Gate:
    """Around every request: access, an id, one log line, a count, and the end of its replies when it is over."""

    def __init__(self, app: ASGIApp, options: ServerOptions, meters: Meters) -> None:
        self._app, self._options, self._meters = app, options, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        given = request.headers.get("x-request-id", "")
        number = given if given.isascii() and given.isprintable() and 0 < len(given) <= 80 else secrets.token_hex(8)
        ends: list[Callable[[], object]] = []
        request.state.id, request.state.ends, request.state.remark = number, ends, ""
        status, began = 0, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", number.encode())]}
            await send(message)

        try:
            _check_access(request, self._options)
            await self._app(scope, receive, watched)
        except RequestError as error:
            await _refusal(error, request)(scope, receive, watched)
        except Exception:
            log.exception("%s failed", number)
            if not status:
                await _refusal(_internal(number), request)(scope, receive, watched)
        finally:
            for end in ends:
                end()
            path = getattr(scope.get("route"), "path", "other")
            self._meters.requests.labels(path, status).inc()
            if path not in ("/health", "/metrics"):
                seconds = time.monotonic() - began
                log.info("%s %s %s %d %.2f s %s", number, request.method, path, status, seconds, request.state.remark)


class _Exchange:
    """One request and its replies, whose events arrive in a queue; so do the end of its time and of its connection."""

    def __init__(self, request: Request, engine: Engine, options: ServerOptions, meters: Meters) -> None:
        self._request, self._engine, self._options, self._meters = request, engine, options, meters
        self._began = time.monotonic()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._answers: dict[int, Answer] = {}
        self._count = 0

    async def answer(self, cls: type[Body]) -> Response:
        """The whole answer, or the stream of one; RequestError if the request is at fault, or takes too long."""
        limit = self._options.timeout
        late = RequestError(504, f"the request took longer than the limit of {limit:g} s", "timeout")
        try:
            body = await asyncio.wait_for(self._begin(cls), limit)
        except asyncio.TimeoutError:
            raise late from None
        left = self._began + limit - time.monotonic()
        timer = asyncio.get_running_loop().call_later(left, self._queue.put_nowait, (0, late))
        watcher = asyncio.create_task(self._watch())
        self._request.state.ends += [timer.cancel, watcher.cancel]
        response = requests.Response(self._options.name, cls is ChatRequest, self._engine.codec)
        events = self._events()
        first = await anext(events)
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            stream = self._stream(response, first, events, usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        async for _ in events:
            pass
        return JSONResponse(response.whole(self._ordered()))

    async def _begin(self, cls: type[Body]) -> Body:
        """Read the request and start every reply that it asks for."""
        content_type = self._request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise RequestError(415, "the request's Content-Type is not application/json", "unsupported_media_type")
        content = await _content(self._request, round(self._options.max_body * MEBIBYTE))
        body = await asyncio.to_thread(requests.read_request, cls, content)
        _check_model(body.model or self._options.name, self._options.name)
        try:
            prompts = await asyncio.to_thread(body.prompts, self._options.access, self._options.max_media)
        except Exception as error:
            raise self._refused(error) from error
        loop = asyncio.get_running_loop()
        for prompt, sampling in product(prompts, body.samplings(self._options.max_tokens)):

            def deliver(event: Event, index: int = self._count) -> None:
                with suppress(RuntimeError):  # the server has ended: its loop is closed
                    loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

            try:
                reply = self._engine.reply(prompt, sampling, deliver)
            except QueueFullError as error:
                raise RequestError(429, str(error), "queue_full", headers={"Retry-After": "1"}) from error
            self._request.state.ends.append(reply.cancel)
            self._count += 1
        return body

    async def _watch(self) -> None:
        """Wait until the client leaves."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait((0, ClientDisconnect()))

    async def _events(self) -> AsyncIterator[tuple[int, Event]]:
        """The events of the replies, with their numbers, until all are complete or one is a fault."""
        while len(self._answers) < self._count:
            index, event = await self._queue.get()
            if isinstance(event, ClientDisconnect):
                raise event
            if isinstance(event, Exception):
                raise self._refused(event) from event
            if isinstance(event, Answer):
                self._answers[index] = event
                self._meters.count(event, time.monotonic() - self._began)
                remark = f"{event.prompt_tokens} + {event.tokens} tokens, {len(event.media)} media"
                self._request.state.remark = remark
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
            for index in range(self._count):
                yield response.opening(index)
            yield response.chunk(*first)
            async for index, event in events:
                yield response.chunk(index, event)
            if usage:
                yield response.usage(self._ordered())
        except RequestError as error:
            self._request.state.remark = error.message
            yield requests.server_sent(error.body())
        except ClientDisconnect:
            return
        yield requests.DONE

    def _ordered(self) -> list[Answer]:
        return [self._answers[i] for i in range(self._count)]

    def _refused(self, error: Exception) -> RequestError:
        known = requests.refusal_of(error)
        if known is None:
            log.error("%s failed", self._request.state.id, exc_info=error)
        return known or _internal(self._request.state.id)


async def _content(request: Request, limit: int) -> bytes:
    """The body of a request; RequestError if it has more bytes than allowed."""
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


def _check_access(request: Request, options: ServerOptions) -> None:
    """Refuse a request without a token, or (where none is needed) one that comes by a foreign name."""
    if not options.tokens and not is_own_name(request.headers.get("host", ""), options.host):
        raise RequestError(403, "this server answers only under the name of its own address", "host_not_allowed")
    if not options.tokens or request.url.path == "/health" or request.method == "OPTIONS":
        return
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = token.strip().encode()
    # All are compared in constant time, so that the time reveals nothing about them.
    right = [hmac.compare_digest(given, known.encode()) for known in options.tokens]
    if scheme.lower() != "bearer" or not any(right):
        message = "the bearer token is not valid" if token else "a bearer token is needed"
        raise RequestError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _check_model(name: str, own: str) -> None:
    if name != own:
        raise RequestError(404, f"there is no model {name[:80]!r}; this server has {own!r}", "model_not_found", "model")


def _internal(number: str) -> RequestError:
    return RequestError(500, f"internal error; the server's log has more under {number}", "internal")


def _refusal(error: RequestError, request: Request) -> Response:
    request.state.remark = error.message
    return JSONResponse(error.body(), error.status, error.headers)
