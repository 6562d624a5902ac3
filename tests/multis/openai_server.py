"""A small HTTP server on loopback that speaks OpenAI's chat protocol and fails as a test's script says.

It counts requests by ``Idempotency-Key`` and computes its answers from the notes in the prompt. As a program
(``python -m tests.multis.openai_server --latency 0.2``) it serves the throughput benchmark.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

PROMPT_TOKENS, COMPLETION_TOKENS = 1000, 100


@dataclass
class Reply:
    """What is sent back.

    Args:
        body: The bytes; None for an answer computed from the prompt.
        status: HTTP status.
        headers: Further headers.
        delay: Seconds before it is sent.
        cut: Send this share of the body only, then close the connection.
        finish: The answer's ``finish_reason``.
    """

    body: bytes | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: float | None = None
    finish: str = "stop"


Script = Callable[[int, dict[str, Any]], Reply]


def failure(status: int, message: str = "no", code: str | None = None, **headers: str) -> Reply:
    """An error in OpenAI's form."""
    body = json.dumps({"error": {"message": message, "type": "error", "code": code}}).encode()
    return Reply(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


def write_answer(messages: list[dict[str, str]]) -> str:
    """Chat data in the asked form, taken word for word from the notes of the last message."""
    system, notes = messages[0]["content"], messages[-1]["content"]
    said = [line[2:].strip().rstrip(".") for line in notes.splitlines() if line.startswith("- ")]
    said = list(dict.fromkeys(said)) or ["nothing is known"]
    if "Write a conversation" in system:
        pairs = [
            f"Question: What is the matter here, seen from side {n}?\nAnswer: {text}." for n, text in enumerate(said)
        ]
        return "\n".join([*pairs, f"Question: Anything else?\nAnswer: It is as before: {said[-1]}."])
    if "detailed description" in system:
        whole = ". ".join(said)
        end = "That is all of it, from the first moment to the last one, with none left out."
        return f"To begin with, this is what there is: {whole}. {end}"
    return (
        f"Question: Why may one conclude what is going on here?\nAnswer: First of all, {said[0]}. From that it follows "
        f"step by step what goes on, since {said[-1]}, and no other reading fits so well."
    )


class OpenAIServer:
    """The server, running in a thread of its own while the context is open.

    Args:
        script: From the number of the request (from 0) and its body to the reply; by default it always answers.
        latency: Seconds before every answer.
        remember: Whether the bodies of requests are kept.

    Attributes:
        asked: How often each request id was received.
        answered: How often a request id was given a whole answer (sent, not necessarily received).
        bodies: The requests.
        keys: What stood under ``Authorization``.
        most_at_once: The largest number of requests under way together.
    """

    def __init__(self, script: Script | None = None, latency: float = 0.0, remember: bool = True) -> None:
        self._script = script or (lambda number, body: Reply())
        self._latency, self._remember = latency, remember
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: set[str] = set()
        self.most_at_once = 0
        self._at_once = 0
        self._ready = threading.Event()

    def __enter__(self) -> OpenAIServer:
        self._thread = threading.Thread(target=lambda: asyncio.run(self.serve()), daemon=True)
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    @property
    def url(self) -> str:
        """The base URL for a client."""
        return f"http://127.0.0.1:{self.port}/v1"

    async def serve(self) -> None:
        """Serve until the context ends."""
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in asyncio.all_tasks():
            if task is not asyncio.current_task():
                task.cancel()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (head := await reader.readuntil(b"\r\n\r\n")) and await self._request(head, reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _request(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        _, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        body, name = json.loads(content), headers.get("idempotency-key", "")
        number = self.asked.total()
        self.asked[name] += 1
        self.keys.add(headers.get("authorization", ""))
        self.times.append(time.monotonic())
        if self._remember:
            self.bodies.append(body)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            reply = self._script(number, body)
            await asyncio.sleep(self._latency + reply.delay)
            if reply.body is None:
                reply.body = json.dumps(self._completion(name, body, reply.finish)).encode()
                self.answered[name] += reply.cut is None
            return await self._send(writer, reply)
        finally:
            self._at_once -= 1

    def _completion(self, name: str, body: dict[str, Any], finish: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{name[:8]}",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": finish,
                    "message": {"role": "assistant", "content": write_answer(body["messages"])},
                }
            ],
            "usage": {
                "prompt_tokens": PROMPT_TOKENS,
                "completion_tokens": COMPLETION_TOKENS,
                "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
            },
        }

    async def _send(self, writer: asyncio.StreamWriter, reply: Reply) -> bool:
        body = reply.body or b""
        headers = {"content-type": "application/json", "content-length": str(len(body)), **reply.headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        sent = body if reply.cut is None else body[: int(len(body) * reply.cut)]
        writer.write(f"HTTP/1.1 {reply.status} X\r\n{lines}\r\n".encode() + sent)
        await writer.drain()
        return reply.cut is None


def main() -> None:
    """Serve until killed; the first line of the output is the base URL."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.2)
    server = OpenAIServer(latency=parser.parse_args().latency, remember=False)
    with server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
