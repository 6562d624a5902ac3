"""Whatever becomes of a request, its files go and its place is free again: the application, driven without a network.

Each test is one way to leave that once kept (or could keep) a request's folder.
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra 'serve'")

from lavis_chatbridge.chat.server import attachments
from lavis_chatbridge.chat.server.app import build_app
from lavis_chatbridge.chat.server.engine import QueueFullError
from lavis_chatbridge.chat.server.folder import FolderClosedError, RequestFolder
from lavis_chatbridge.chat.server.settings import ServerSettings
from lavis_chatbridge.chat.session import Answer

PATIENCE = 60.0
ANSWER = Answer("done", "stop", 1, 1, 0, (), 0, 0, 0.0)
GONE = {"type": "http.disconnect"}


class Engine(SimpleNamespace):
    """Takes jobs, and says at once to each what it is made with."""

    def __init__(self, *events: Any) -> None:
        super().__init__(healthy=True, waiting=0, running=0, steps=0, rows=0, jobs=[], events=events)

    def submit(self, job: Any) -> None:
        self.jobs.append(job)
        for event in self.events:
            job.deliver(event)


class Line:
    """One client's line: the request is there at once; ``send`` is what becomes of each message to the client."""

    def __init__(self, body: dict[str, Any], newer: bool = False) -> None:
        head = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4" if newer else "2.3"},
            "method": "POST",
            "path": "/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
            "query_string": b"",
            "headers": head,
            "http_version": "1.1",
            "scheme": "http",
            "server": ("localhost", 80),
        }
        self._body: bytes | None = json.dumps(body).encode()
        self.left = asyncio.Event()
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return GONE

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]


def request(stream: bool, *urls: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls or (picture_url(),)]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]
    return {"model": "chatbridge", "messages": messages, "stream": stream}


def picture_url() -> str:
    return f"data:image/png;base64,{base64.b64encode(b'read by nobody here').decode()}"


async def leaves_before_the_first_byte(app: Any, engine: Engine) -> None:
    engine.events = ("a",)
    line = Line(request(stream=True))
    line.left.set()
    await app(line.scope, line.receive, line.send)


async def leaves_while_a_piece_is_sent(app: Any, engine: Engine) -> None:
    """The generator stands at its ``yield``; nobody resumes it or closes it."""
    engine.events = ("a",)
    line = Line(request(stream=True))

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            line.left.set()
            await asyncio.Event().wait()

    await app(line.scope, line.receive, send)


async def leaves_between_two_pieces(app: Any, engine: Engine) -> None:
    engine.events = ("a",)
    line = Line(request(stream=True))

    async def send(message: dict[str, Any]) -> None:
        if b'"content":"a"' in message.get("body", b""):
            line.left.set()

    await app(line.scope, line.receive, send)


async def its_line_breaks(app: Any, engine: Engine) -> None:
    """Servers of a newer ASGI raise at the next message."""
    engine.events = ("a",)
    line = Line(request(stream=True), newer=True)

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            raise OSError("broken pipe")

    await app(line.scope, line.receive, send)


async def leaves_unnoticed(app: Any, engine: Engine) -> None:
    """Where messages to nobody are accepted, and nobody listens for the client's leaving but us."""
    engine.events = ("a",)
    line = Line(request(stream=True), newer=True)
    line.left.set()
    await app(line.scope, line.receive, line.send)


async def leaves_before_the_answer(app: Any, engine: Engine) -> None:
    engine.events = ()
    line = Line(request(stream=False))
    line.left.set()
    await app(line.scope, line.receive, line.send)
    assert line.status == 499


async def leaves_in_its_body(app: Any, engine: Engine) -> None:
    """Nothing is answered to, and it is nobody's fault."""
    line = Line(request(stream=False))
    messages = iter([{"type": "http.request", "body": b'{"model": "chat', "more_body": True}, GONE])

    async def receive() -> dict[str, Any]:
        return next(messages)

    await app(line.scope, receive, line.send)
    engine.jobs.append(SimpleNamespace(cancelled=True))
    assert line.status == 499


async def is_cancelled(app: Any, engine: Engine, stream: bool = False) -> None:
    """As at the server's end."""
    engine.events = ("a",) if stream else ()
    line = Line(request(stream=stream))
    task = asyncio.ensure_future(app(line.scope, line.receive, line.send))
    known = len(engine.jobs)
    await true(lambda: len(engine.jobs) > known and (not stream or len(line.sent) > 1))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def its_stream_is_cancelled(app: Any, engine: Engine) -> None:
    await is_cancelled(app, engine, stream=True)


async def the_engine_fails(app: Any, engine: Engine) -> None:
    engine.events = (RuntimeError("for the test"),)
    line = Line(request(stream=False))
    await app(line.scope, line.receive, line.send)
    assert line.status == 500


async def the_engine_takes_nobody(app: Any, engine: Engine) -> None:
    def fails(job: Any) -> None:
        raise RuntimeError("for the test")

    line = Line(request(stream=True))
    own, engine.submit = engine.submit, fails
    await app(line.scope, line.receive, line.send)
    engine.submit = own
    engine.jobs.append(SimpleNamespace(cancelled=True))
    assert line.status == 500


WAYS = (
    leaves_before_the_first_byte,
    leaves_while_a_piece_is_sent,
    leaves_between_two_pieces,
    its_line_breaks,
    leaves_unnoticed,
    leaves_before_the_answer,
    leaves_in_its_body,
    is_cancelled,
    its_stream_is_cancelled,
    the_engine_fails,
    the_engine_takes_nobody,
)


async def true(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not become true"
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.replace("_", "-"))
def test_who_leaves_takes_everything_with_him(tmp_path: Path, way: Any):
    engine = Engine()
    # Two requests may be present: a third one is only taken if those before have given back their places.
    app = build_app(engine, ServerSettings(queue=1, batch=1, timeout=PATIENCE), tmp_path)

    async def run() -> int:
        for _ in range(3):
            await asyncio.wait_for(way(app, engine), PATIENCE)
            assert list(tmp_path.iterdir()) == []
        engine.events = (ANSWER,)
        line = Line(request(stream=False))
        await app(line.scope, line.receive, line.send)
        return line.status

    assert asyncio.run(run()) == 200
    assert len(engine.jobs) == 4
    assert all(job.cancelled for job in engine.jobs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("full", ["places", "engine"])
def test_who_finds_no_place_is_to_come_again(tmp_path: Path, full: str):
    engine = Engine()
    app = build_app(engine, ServerSettings(queue=1, batch=1, timeout=PATIENCE), tmp_path)

    def takes_nobody(job: Any) -> None:
        raise QueueFullError

    async def run() -> Line:
        present = [Line(request(stream=False)) for _ in range(2 if full == "places" else 0)]
        tasks = [asyncio.ensure_future(app(line.scope, line.receive, line.send)) for line in present]
        await true(lambda: len(engine.jobs) == len(present))
        if full == "engine":
            engine.submit = takes_nobody
        late = Line(request(stream=False))
        await app(late.scope, late.receive, late.send)
        for job in engine.jobs:
            job.deliver(ANSWER)
        await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
        assert [line.status for line in present] == [200] * len(present)
        return late

    late = asyncio.run(run())
    assert late.status == 429
    assert (b"retry-after", b"1") in late.sent[0]["headers"]
    assert json.loads(late.sent[1]["body"])["error"]["code"] == "queue_full"
    assert list(tmp_path.iterdir()) == []


def test_a_streams_media_go_when_they_have_been_read(tmp_path: Path):
    engine = Engine("a")
    app = build_app(engine, ServerSettings(timeout=PATIENCE), tmp_path)

    async def run() -> None:
        line = Line(request(stream=True))
        task = asyncio.ensure_future(app(line.scope, line.receive, line.send))
        await true(lambda: len(line.sent) > 2)
        assert list(tmp_path.iterdir()) == []  # the stream still runs
        engine.jobs[0].deliver(ANSWER)
        await asyncio.wait_for(task, PATIENCE)
        assert line.sent[-2]["body"].endswith(b"[DONE]\n\n")

    asyncio.run(run())


def test_a_thread_that_still_writes_removes_what_it_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The request's time is up while a page is fetched; the second one is then not even begun."""
    begun, go_on = threading.Event(), threading.Event()
    urls, faults = [], []

    def slow(url: str, file: Any, limit: int, deadline: float) -> None:
        urls.append(url)
        file.write(b"first")
        begun.set()
        assert go_on.wait(PATIENCE)
        try:
            file.write(b"second")
        except FolderClosedError as fault:
            faults.append(fault)
            raise

    monkeypatch.setattr(attachments.fetch, "fetch", slow)
    app = build_app(Engine(), ServerSettings(allow_urls=True, timeout=0.5), tmp_path)

    async def run() -> None:
        line = Line(request(False, "http://a.test/1", "http://a.test/2"))
        await app(line.scope, line.receive, line.send)
        assert line.status == 504
        assert begun.is_set()
        assert [path.read_bytes() for path in tmp_path.glob("*/*")] in ([b""], [b"first"])  # it is still being used
        go_on.set()
        await true(lambda: list(tmp_path.iterdir()) == [])

    asyncio.run(run())
    assert urls == ["http://a.test/1"]
    assert len(faults) == 1


def test_a_folder_goes_with_its_last_user(tmp_path: Path):
    folder = RequestFolder(tmp_path)
    with folder.writing():
        with folder.writing(), folder.create("a") as file:
            file.write(b"a")
            folder.close()
            with pytest.raises(FolderClosedError):
                file.write(b"b")
        folder.close()
        assert (folder.path / "a").exists()
    assert not folder.path.exists()
    with pytest.raises(FolderClosedError), folder.writing():
        raise AssertionError("it was closed")
    folder.close()


def test_a_folder_that_cannot_be_removed_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = RequestFolder(tmp_path)
    folder.path.rmdir()
    folder.close()
    assert "could not be removed" in caplog.text


def test_an_engine_that_outlives_the_server_speaks_to_nobody(tmp_path: Path):
    engine = Engine()
    asyncio.run(is_cancelled(build_app(engine, ServerSettings(), tmp_path), engine))
    engine.jobs[0].deliver("a")  # its event loop is closed: nothing is raised
