"""How much more a server answers when several clients ask at once: tokens a second at 1, 4 and 16 clients.

    python benchmarks/chat_server.py [--width 768] [--layers 12] [--tokens 32] [--clients 1 4 16]
        [--write benchmarks/chat_server.md]

A model of middle size with random weights, on the CPU, behind the real HTTP server; every client asks about a picture.
The baseline is the same server with ``--batch 1``, which answers one after the other. Goal: at 16 clients at least
twice its tokens a second. CPU seconds are given beside those of the clock: they count what is computed, however busy
the machine is.
"""

from __future__ import annotations

import argparse
import base64
import io
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import transformers
import uvicorn
from chat import build  # the file beside this one
from common import circumstances, tell
from PIL import Image

from lavis_chatbridge.chat.server.app import build_app
from lavis_chatbridge.chat.server.command import address_of, listen
from lavis_chatbridge.chat.server.engine import Engine
from lavis_chatbridge.chat.server.settings import ServerSettings

GOAL_CLIENTS, GOAL = 16, 2.0
REQUESTS = 16


@contextmanager
def serving(model: Any, processors: Any, batch: int) -> Iterator[str]:
    """The server in this process; its URL."""
    engine = Engine(model, processors, batch=batch, keep=0)
    line = listen("127.0.0.1", 0)
    with tempfile.TemporaryDirectory() as scratch:
        app = build_app(engine, ServerSettings(batch=batch, timeout=3600), Path(scratch))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=lambda: server.run(sockets=[line]), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        try:
            yield address_of(line)
        finally:
            server.should_exit = True
            thread.join(30)
            engine.close()


def question(number: int, tokens: int) -> dict[str, Any]:
    """A request about a picture of its own."""
    pixels = np.random.default_rng(number).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": f"what is in picture {number}?"},
    ]
    return {"model": "chatbridge", "messages": [{"role": "user", "content": parts}], "max_tokens": tokens}


def measure(model: Any, processors: Any, batch: int, clients: int, tokens: int) -> tuple[float, float]:
    """Tokens of all replies per second of the clock, and per second of this process's CPU."""
    with serving(model, processors, batch) as url, httpx.Client(timeout=3600) as client:

        def ask(number: int) -> int:
            reply = client.post(f"{url}/v1/chat/completions", json=question(number, tokens))
            reply.raise_for_status()
            return reply.json()["usage"]["completion_tokens"]

        ask(999)  # the first one pays for what is built on first use
        began, worked = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(clients) as pool:
            total = sum(pool.map(ask, range(REQUESTS)))
        return total / (time.perf_counter() - began), total / (time.process_time() - worked)


def throughput(width: int, layers: int, tokens: int, clients: Sequence[int]) -> str:
    """The table of tokens a second, in Markdown."""
    model, processors = build(width, layers)
    base = measure(model, processors, 1, max(clients), tokens)
    lines = [
        f"Tokens of all replies a second; {REQUESTS} requests about a picture each, {tokens} tokens a reply:",
        "",
        "| server | clients | tokens/s | ratio | tokens/CPU s | ratio |",
        "|---|---|---|---|---|---|",
        f"| `--batch 1` | {max(clients)} | {base[0]:.1f} | 1.00 | {base[1]:.1f} | 1.00 |",
    ]
    verdict = ""
    for number in clients:
        found = measure(model, processors, 16, number, tokens)
        ratio = found[0] / base[0]
        lines.append(
            f"| `--batch 16` | {number} | {found[0]:.1f} | {ratio:.2f} | {found[1]:.1f} | {found[1] / base[1]:.2f} |"
        )
        if number == GOAL_CLIENTS:
            told = "reached" if ratio >= GOAL else "missed"
            verdict = f"\nGoal: at least {GOAL:g} times at {GOAL_CLIENTS} clients: {told}, {ratio:.2f} times.\n"
    return "\n".join(lines) + "\n" + verdict


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--write", type=Path, metavar="FILE", help="a Markdown file for the table")
    args = parser.parse_args()
    options = [f"--{name}={getattr(args, name)}" for name in ("width", "layers", "tokens")]
    how = circumstances("chat_server.py", *options, modules=(torch, transformers))
    table = throughput(args.width, args.layers, args.tokens, args.clients)
    tell(f"# Many clients at once\n\n{how}\n{table}", args.write)


if __name__ == "__main__":
    main()
