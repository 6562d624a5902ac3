"""A small HTTP server on loopback that implements OpenAI's chat protocol and fails by a test's script.

It counts requests by ``Idempotency-Key`` and computes its answers from the notes in the prompt. As a program
(``python -m tests.multis.openai_server --latency 0.2``) it serves the throughput benchmark.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """A response: ``body`` None is an answer computed from the prompt; ``cut`` sends only this share of the body."""

    body: bytes | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: float = 1.0


Script = Callable[[int, dict[str, Any]], Reply]  # from the number of the request (from 0) and its body


def failure(status: int, message: str = "no", **headers: str) -> Reply:
    """An error in OpenAI's form."""
    body = json.dumps({"error": {"message": message, "type": "error", "code": None}}).encode()
    return Reply(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


def write_answer(messages: list[dict[str, str]]) -> str:
    """Chat data in the requested form, taken word for word from the notes of the last message."""
    system, notes = messages[0]["content"], messages[-1]["content"]
    said = [line[2:].strip().rstrip(".") for line in notes.splitlines() if line.startswith("- ")]
    if "Write a conversation" in system:
        pairs = [f"Question: What is the matter, seen from side {n}?\nAnswer: {text}." for n, text in enumerate(said)]
        return "\n".join([*pairs, f"Question: Anything else?\nAnswer: It is as before: {said[-1]}."])
    if "detailed description" in system:
        end = "That is all of it, from the first moment to the last one, with none left out."
        return f"To begin with, this is what there is: {'. '.join(said)}. {end}"
    return (
        f"Question: Why may one conclude what is going on here?\nAnswer: First of all, {said[0]}. From that it follows "
        f"step by step what goes on, since {said[-1]}, and no other reading fits so well."
    )


class OpenAIServer(ThreadingHTTPServer):
    """The server, running in threads while the context is open; ``asked`` counts requests by their id."""

    request_queue_size = 1024
    daemon_threads, block_on_close = True, False

    def __init__(self, script: Script | None = None, latency: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.script, self.latency = script or (lambda number, body: Reply()), latency
        self.asked = Counter[str]()
        self.bodies, self.times, self.keys = list[dict[str, Any]](), list[float](), set[str]()
        self.at_once = self.most_at_once = 0
        self.lock, self.closing = threading.Lock(), threading.Event()

    def __enter__(self) -> OpenAIServer:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has left is no fault."""


class _Handler(BaseHTTPRequestHandler):
    server: OpenAIServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        owner, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = self.headers.get("Idempotency-Key", "")
        with owner.lock:
            number = owner.asked.total()
            owner.asked[name] += 1
            owner.keys.add(self.headers["Authorization"])
            owner.times.append(time.monotonic())
            owner.bodies.append(body)
            owner.at_once += 1
            owner.most_at_once = max(owner.most_at_once, owner.at_once)
        reply = owner.script(number, body)
        owner.closing.wait(owner.latency + reply.delay)
        content = reply.body if reply.body is not None else json.dumps(completion(body)).encode()
        with owner.lock:
            owner.at_once -= 1
        self.send_response(reply.status)
        for key, value in {"content-type": "application/json", **reply.headers}.items():
            self.send_header(key, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: int(len(content) * reply.cut)])
        self.close_connection = reply.cut < 1

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""


def completion(body: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": write_answer(body["messages"])}
    choices = [{"index": 0, "finish_reason": "stop", "message": message}]
    usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
    return {"model": body["model"], "choices": choices, "usage": usage}


if __name__ == "__main__":  # serves until killed; the first line of the output is the base URL
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.2)
    with OpenAIServer(latency=parser.parse_args().latency) as server:
        print(server.url, flush=True)
        threading.Event().wait()
