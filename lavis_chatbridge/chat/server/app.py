"""The HTTP side: ``/v1/chat/completions``, ``/v1/models``, ``/health`` and ``/metrics``.

It knows requests, answers and the engine, nothing of models. Whatever goes wrong with a request becomes an answer in
OpenAI's form; paths of the server stand in no message.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lavis_chatbridge.chat.history import ChatTurn
from lavis_chatbridge.chat.server import answers, attachments
from lavis_chatbridge.chat.server.engine import Engine, Event, Job, QueueFullError
from lavis_chatbridge.chat.server.errors import RequestError, timed_out, too_large
from lavis_chatbridge.chat.server.folder import RequestFolder
from lavis_chatbridge.chat.server.metrics import Metrics
from lavis_chatbridge.chat.server.requests import ChatRequest, read_request
from lavis_chatbridge.chat.server.settings import ServerSettings
from lavis_chatbridge.chat.session import Answer
from lavis_chatbridge.errors import ConfigError, MediaError, PromptError

log = logging.getLogger(__name__)

_LOOK = 0.5
"""Seconds after which a waiting request looks whether its client is still there."""
_DRAINED = 4
"""Of a body that is too large, so many times the limit is read and thrown away: a client that still sends would
otherwise see a broken line in place of the answer."""


def build_app(engine: Engine, settings: ServerSettings, scratch: Path) -> FastAPI:
    """The web application.

    Args:
        engine: What answers.
        settings: What is allowed.
        scratch: The folder in which media of requests lie while they are read.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # FastAPI's pages load scripts from elsewhere
    metrics = _metrics(engine)
    chats = _Chats(engine, settings, scratch, metrics)
    created = int(time.time())
    about = {"id": settings.name, "object": "model", "created": created, "owned_by": "lavis-chatbridge"}

    app.add_middleware(_Gate, settings=settings, metrics=metrics)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return _refusal(error)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return _refusal(RequestError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok" if engine.healthy else "failed"}, 200 if engine.healthy else 503)

    @app.get("/metrics")
    async def numbers() -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [about]})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        _check_model(name, settings)
        return JSONResponse(about)

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        return await chats.answer(request)

    return app


class _Gate:
    """Asks for the token, counts what is answered, answers what nobody foresaw, and closes every request.

    A request is over when its call of the application is: with an answer, by a fault, by a client that left before or
    in a stream (whose generator is then neither run to its end nor closed by anyone), or cancelled. So what a request
    holds is given back here, and nowhere else.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        request = Request(scope)
        closing = request.state.closing = ExitStack()
        try:
            _check_access(request, self._settings)
            await self._app(scope, receive, watched)
        except RequestError as error:
            await _refusal(error)(scope, receive, watched)
        except Exception:
            number = secrets.token_hex(4)
            log.exception("request %s failed", number)
            if not status:
                await _refusal(_internal(number))(scope, receive, watched)
        finally:
            closing.close()
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.count("chatbridge_requests_total", path=path, status=status)


class _Chats:
    """Chat completions, one call of `answer` each."""

    def __init__(self, engine: Engine, settings: ServerSettings, scratch: Path, metrics: Metrics) -> None:
        self._engine, self._settings, self._scratch, self._metrics = engine, settings, scratch, metrics
        self._present = 0

    async def answer(self, request: Request) -> Response:
        """Answer one request, whole or as a stream."""
        # Bodies and fetched media cost memory and disk before the engine's own queue sees anything of them.
        if self._present >= self._settings.queue + self._settings.batch:
            raise _queue_full()
        deadline = time.monotonic() + self._settings.timeout
        waiting = _Waiting(self, deadline)
        self._present += 1
        request.state.closing.callback(waiting.close)
        try:
            asked = await self._read(request, deadline)
            await self._start(asked, waiting)
            first = await waiting.next(request)
            waiting.forget_media()
            if asked.stream:
                body = self._stream(asked, waiting, first, request)
                return StreamingResponse(body, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
            while not isinstance(first, Answer):
                first = await waiting.next(request)
            self._count(first, waiting)
            return JSONResponse(answers.Completion(asked.model).whole(first))
        except (_GoneError, ClientDisconnect):
            return Response(status_code=499)

    async def _read(self, request: Request, deadline: float) -> ChatRequest:
        settings = self._settings
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "the request's Content-Type is not application/json", "unsupported_media_type")
        try:
            raw = await asyncio.wait_for(_body(request, settings.max_body), attachments.remaining(deadline))
            body = await asyncio.to_thread(json.loads, raw)
        except asyncio.TimeoutError:
            raise timed_out(settings.timeout) from None
        except (ValueError, RecursionError) as error:
            raise RequestError(400, "the request's body is not JSON", "invalid_json") from error
        asked = read_request(body, settings.max_new_tokens, settings.max_media)
        _check_model(asked.model, settings)
        return asked

    async def _start(self, asked: ChatRequest, waiting: _Waiting) -> None:
        """Write the media into a folder, and hand the conversation to the engine."""
        waiting.folder = RequestFolder(self._scratch)
        saving = asyncio.to_thread(attachments.save, asked.media, waiting.folder, self._settings, waiting.deadline)
        try:
            paths = await asyncio.wait_for(saving, attachments.remaining(waiting.deadline))
        except asyncio.TimeoutError:
            raise timed_out(self._settings.timeout) from None
        waiting.names = {str(path): medium.where for path, medium in zip(paths, asked.media, strict=True)}
        media = iter(attachments.media_of(asked.media, paths, asked.hear_videos))
        turns = [
            ChatTurn(message.role, message.text, tuple(medium for _ in message.media for medium in next(media)))
            for message in asked.messages
        ]
        waiting.job = Job(turns, asked.sampling, waiting.deliver, asked.system)
        try:
            self._engine.submit(waiting.job)
        except QueueFullError:
            raise _queue_full() from None

    async def _stream(
        self, asked: ChatRequest, waiting: _Waiting, heard: str | Answer, request: Request
    ) -> AsyncIterator[bytes]:
        """A reply as server-sent events; a fault on the way is one too, since the status has been sent."""
        completion = answers.Completion(asked.model)
        try:
            yield answers.event(completion.opening())
            while not isinstance(heard, Answer):
                yield answers.event(completion.chunk({"content": heard}))
                heard = await waiting.next(request)
            self._count(heard, waiting)
            yield answers.event(completion.closing(heard))
            if asked.usage:
                yield answers.event(completion.numbers(heard))
            yield answers.END
        except RequestError as error:
            yield answers.event(error.body())
            yield answers.END
        except _GoneError:
            return

    def _count(self, answer: Answer, waiting: _Waiting) -> None:
        count, seconds = self._metrics.count, time.monotonic() - waiting.started
        count("chatbridge_tokens_total", answer.prompt_tokens, kind="prompt")
        count("chatbridge_tokens_total", answer.reused_tokens, kind="reused")
        count("chatbridge_tokens_total", answer.tokens, kind="generated")
        self._metrics.time("chatbridge_reply_seconds", seconds)
        log.info("%d + %d tokens, %d media, %.2f s", answer.prompt_tokens, answer.tokens, len(answer.media), seconds)

    def leave(self) -> None:
        """A request is over."""
        self._present -= 1


class _GoneError(Exception):
    """The client has closed its line."""


class _Waiting:
    """One request, from its first byte to the last of its answer: what the engine says, and what is to be cleared."""

    def __init__(self, chats: _Chats, deadline: float) -> None:
        self._chats = chats
        self.deadline, self.started = deadline, time.monotonic()
        self.job: Job | None = None
        self.folder: RequestFolder | None = None
        self.names: dict[str, str] = {}
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def deliver(self, event: Event) -> None:
        """Called by the engine's threads."""
        with suppress(RuntimeError):  # the server has ended: its loop is closed
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self, request: Request) -> str | Answer:
        """What the engine says next.

        Args:
            request: Looked at from time to time, for whether its client is still there.

        Raises:
            RequestError: If the request is at fault, or takes too long.
            _GoneError: If the client has gone.
        """
        while True:
            left = attachments.remaining(self.deadline)
            try:
                event = await asyncio.wait_for(self._events.get(), min(left, _LOOK))
            except asyncio.TimeoutError:
                if attachments.remaining(self.deadline) == 0:
                    raise timed_out(self.deadline - self.started) from None
                if await request.is_disconnected():
                    raise _GoneError from None
                continue
            if isinstance(event, Exception):
                raise self._refusal(event) from event
            return event

    def forget_media(self) -> None:
        """Remove the request's files: what has been answered with one word has been read whole."""
        if self.folder is not None:
            self.folder.close()

    def close(self) -> None:
        """Stop what is still under way, and remove the request's files."""
        if self.job is not None:
            self.job.cancel()
        self.forget_media()
        self._chats.leave()

    def _refusal(self, fault: Exception) -> RequestError:
        if isinstance(fault, MediaError):
            where = self.names.get(fault.source)
            cause = self._without_paths(fault.cause)
            return RequestError(400, f"{where or 'a medium'} cannot be read: {cause}", "invalid_media", where)
        if isinstance(fault, PromptError):
            return RequestError(400, str(fault), "context_length_exceeded", "messages")
        if isinstance(fault, ConfigError):
            return RequestError(400, str(fault), "invalid_value")
        number = secrets.token_hex(4)
        log.error("request %s failed", number, exc_info=fault)
        return _internal(number)

    def _without_paths(self, text: str) -> str:
        for path in sorted(self.names, key=len, reverse=True):
            text = text.replace(path, "the file")
        return text if self.folder is None else text.replace(str(self.folder.path), "")


async def _body(request: Request, limit: int) -> bytes:
    """The body of a request.

    Raises:
        RequestError: If it has more bytes than allowed.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit * _DRAINED:
        raise too_large("the request's body", limit)
    parts, count = [], 0
    async for part in request.stream():
        count += len(part)
        if count > limit * _DRAINED:
            break
        if count <= limit:
            parts.append(part)
        else:
            parts.clear()
    if count > limit:
        raise too_large("the request's body", limit)
    return b"".join(parts)


def _check_access(request: Request, settings: ServerSettings) -> None:
    """Refuse who brings no token, or (where nobody needs one) comes by a name that is not this machine's."""
    if settings.host_names:
        host = request.headers.get("host", "").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if name not in settings.host_names:
            raise RequestError(403, "this server answers only under the name of its own address", "host_not_allowed")
    if not settings.tokens or request.url.path == "/health":
        return
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = token.strip().encode()
    # All are compared, in constant time: how long it takes tells nothing of them.
    right = [hmac.compare_digest(given, known.encode()) for known in settings.tokens]
    if scheme.lower() != "bearer" or not any(right):
        what = "no bearer token was given" if not token else "the bearer token is not a valid one"
        raise RequestError(401, what, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _check_model(name: str, settings: ServerSettings) -> None:
    if name != settings.name:
        raise RequestError(
            404, f"there is no model {name[:80]!r}; this server has {settings.name!r}", "model_not_found", "model"
        )


def _queue_full() -> RequestError:
    return RequestError(
        429, "too many requests wait already; try again later", "queue_full", headers={"Retry-After": "1"}
    )


def _internal(number: str) -> RequestError:
    return RequestError(500, f"internal error {number}; the server's log says more", "internal")


def _refusal(error: RequestError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


def _metrics(engine: Engine) -> Metrics:
    metrics = Metrics()
    metrics.describe(
        chatbridge_requests_total="Answered requests.",
        chatbridge_tokens_total="Tokens read (prompt), of them not read again (reused), and written (generated).",
        chatbridge_reply_seconds="From a request's first byte to the end of its reply.",
    )
    metrics.gauge("chatbridge_waiting", "Requests that wait.", lambda: engine.waiting)
    metrics.gauge("chatbridge_running", "Replies under way.", lambda: engine.running)
    metrics.gauge("chatbridge_steps", "Steps of the decoder since the start.", lambda: engine.steps)
    metrics.gauge("chatbridge_step_replies", "Replies in all those steps together.", lambda: engine.rows)
    return metrics
