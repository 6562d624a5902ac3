"""A small HTTP server on loopback that implements OpenAI's chat protocol and fails by a test's script.

It counts requests by ``Idempotency-Key`` and computes its answers from the notes in the prompt. As a program
(``python -m tests.multis.openai_server --latency 0.2``) it serves the throughput benchmark.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

from tests.hub_server import running


@dataclass
class Reply:
    """A response: ``body`` None is an answer computed from the prompt; ``cut`` sends only this share of the body."""

    body: bytes | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: float = 1.0


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


class OpenAIServer:
    """The server, which runs while the context is open; ``asked`` counts requests by their id.

    ``script`` makes the reply from the number of the request (from 0) and its body.
    """

    def __init__(self, script: Callable[[int, Any], Reply] | None = None, latency: float = 0.0) -> None:
        self.script, self.latency = script or (lambda number, body: Reply()), latency
        self.asked = Counter[str]()
        self.bodies, self.times, self.keys = list[dict[str, Any]](), list[float](), set[str]()
        self.at_once = self.most_at_once = 0
        app = FastAPI()
        app.post("/v1/chat/completions")(self.answer)
        self._running = running(app)

    def __enter__(self) -> OpenAIServer:
        self.url = self._running.__enter__() + "/v1"
        return self

    def __exit__(self, *error: Any) -> None:
        self._running.__exit__(*error)

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        reply = self.script(self.asked.total(), body)
        self.asked[request.headers.get("Idempotency-Key", "")] += 1
        self.keys.add(request.headers["Authorization"])
        self.times.append(time.monotonic())
        self.bodies.append(body)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(self.latency + reply.delay)
        self.at_once -= 1
        content = json.dumps(completion(body)).encode() if reply.body is None else reply.body
        headers = {"content-type": "application/json", **reply.headers, "content-length": str(len(content))}
        return StreamingResponse(iter([content[: int(len(content) * reply.cut)]]), reply.status, headers)


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
        time.sleep(1e6)
