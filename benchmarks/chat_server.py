"""How much more a server answers when several clients ask at once: tokens a second at 1, 4 and 16 clients.

    python benchmarks/chat_server.py [--width 768] [--layers 12] [--tokens 32] [--clients 1 4 16]

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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from chat import build  # the file beside this one
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


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    args = parser.parse_args()
    model, processors = build(args.width, args.layers)
    print(f"{'server':>12} {'clients':>8} {'tokens/s':>9} {'tokens/CPU s':>13} {'ratio':>6} {'CPU ratio':>10}")
    base = measure(model, processors, 1, max(args.clients), args.tokens)
    print(f"{'batch 1':>12} {max(args.clients):>8} {base[0]:>9.1f} {base[1]:>13.1f} {1:>6.2f} {1:>10.2f}", flush=True)
    for clients in args.clients:
        found = measure(model, processors, 16, clients, args.tokens)
        ratios = found[0] / base[0], found[1] / base[1]
        goal = ""
        if clients == GOAL_CLIENTS:
            goal = f"  goal {GOAL:g}: {'reached' if ratios[0] >= GOAL else 'missed'}"
        numbers = f"{found[0]:>9.1f} {found[1]:>13.1f} {ratios[0]:>6.2f} {ratios[1]:>10.2f}"
        print(f"{'batch 16':>12} {clients:>8} {numbers}{goal}", flush=True)


if __name__ == "__main__":
    main()
