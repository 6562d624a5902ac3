"""``chatbridge serve`` under clients: tokens a second with one language model here or on vLLM, and a soak.

    python benchmarks/chat.py [--clients 1 4 16] [--requests 64] [--engine http://127.0.0.1:8001/v1] [--write FILE]
    python benchmarks/chat.py --soak 20 --clients 16 [--seed 0] [--write FILE]

The first form measures the tiny model's server. The second sends valid requests (text, images, sounds, videos, streams)
and invalid ones (broken, truncated, too large, unauthorised, clients that disconnect) for minutes. Goals of the soak:
every valid request gets 200 and a reply that uses its media, every invalid one its status; memory, threads and open
files of the server's processes do not grow (median of the last quarter at most 1.05 times that of the second, plus a
small constant); no file is left; the log has no error.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import av
import httpx
import numpy as np
import psutil
import soundfile
import torch
import transformers
from common import circumstances, command_line, write_table
from PIL import Image

MODEL, TOKEN = "chatbridge-tiny", "a-token-for-the-benchmark"
MAX_BODY, MAX_MEDIUM, MAX_MEDIA = 4, 1, 8  # MiB, MiB, media
PATIENCE, LOOK = 300.0, 2.0  # seconds of a request, between two looks at the server's processes
GROWTH, SLACK = 1.05, {"memory": 16.0, "threads": 4.0, "files": 16.0}  # MiB, threads, open files
NEW_TOKENS = 48


def picture(rng: np.random.Generator) -> bytes:
    """An image file of a random size."""
    file = io.BytesIO()
    height, width = map(int, rng.integers(24, 400, 2))
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height)).save(file, "PNG")
    return file.getvalue()


def sound(rng: np.random.Generator) -> bytes:
    """A tone of 0.3 to 5 seconds as a wav file."""
    times, file = np.arange(round(16_000 * rng.uniform(0.3, 5.0))) / 16_000, io.BytesIO()
    soundfile.write(file, 0.5 * np.sin(2 * np.pi * rng.uniform(100, 2000) * times), 16_000, format="WAV")
    return file.getvalue()


def clip(rng: np.random.Generator) -> bytes:
    """An mp4 of 6 to 30 frames without a sound track."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(int(rng.integers(6, 31))):
            pixels = np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (48, 64, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def part(modality: str, content: bytes) -> dict[str, Any]:
    """A medium of a message."""
    url = f"data:;base64,{base64.b64encode(content).decode()}"
    return {"type": f"{modality}_url", f"{modality}_url": {"url": url}}


def chat(rng: np.random.Generator, *parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A question about some media."""
    text = {"type": "text", "text": f"what is the colour of shape {rng.integers(1 << 30)}?"}
    messages = [{"role": "user", "content": [*parts, text]}]
    return {"model": MODEL, "messages": messages, "max_tokens": int(rng.integers(1, 25)), **more}


class Case(NamedTuple):
    """A type of request: its body (or bytes), expected status, media that reach the model; ``leaving`` disconnects."""

    name: str
    make: Callable[[np.random.Generator], Any]
    status: int = 200
    reached: tuple[str, ...] = ()
    leaving: bool = False
    headers: dict[str, str] = {}


def all_cases() -> list[Case]:
    """Every type of request."""
    made: dict[str, tuple[tuple[str, ...], Callable[..., list[Any]]]] = {
        "text": ((), lambda rng: []),
        "image": (("image",), lambda rng: [part("image", picture(rng))]),
        "audio": (("audio",), lambda rng: [part("audio", sound(rng))]),
        "video": (("video",), lambda rng: [part("video", clip(rng))]),
        "two media": (("image", "audio"), lambda rng: [part("image", picture(rng)), part("audio", sound(rng))]),
    }
    cases = []
    for name, (reached, parts) in made.items():
        for stream in (False, True):
            make = lambda rng, parts=parts, stream=stream: chat(rng, *parts(rng), stream=stream)  # noqa: E731
            cases += [Case(f"{name}, streamed" if stream else name, make, 200, reached)] * 3
    broken: dict[str, Callable[[np.random.Generator], dict[str, Any]]] = {
        "broken image": lambda rng: part("image", rng.bytes(3000)),
        "broken audio": lambda rng: part("audio", rng.bytes(3000)),
        "broken video": lambda rng: part("video", rng.bytes(3000)),
        "truncated image": lambda rng: part("image", (whole := picture(rng))[: len(whole) // 2]),
        "truncated video": lambda rng: part("video", (whole := clip(rng))[: len(whole) // 2]),
        "audio as image": lambda rng: part("image", sound(rng)),
        "audio as video": lambda rng: part("video", sound(rng)),
        "no base64": lambda rng: {"type": "image_url", "image_url": {"url": "data:image/png;base64,$$$"}},
        "a web page": lambda rng: {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}},
        "a server's file": lambda rng: {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    }
    cases += [Case(name, lambda rng, make=make: chat(rng, make(rng)), 400) for name, make in broken.items()]
    long = {"temperature": 1.9, "stream": True}
    return [
        *cases,
        Case("large medium", lambda rng: chat(rng, part("image", rng.bytes((MAX_MEDIUM << 20) + 1))), 413),
        Case("large body", lambda rng: rng.bytes((MAX_BODY << 20) + 1), 413),
        Case("no JSON", lambda rng: rng.bytes(200), 400),
        Case("wrong token", chat, 401, headers={"Authorization": "Bearer wrong"}),
        Case("unknown model", lambda rng: chat(rng, model="another"), 404),
        Case("tools", lambda rng: chat(rng, tools=[{}]), 400),
        Case("too many media", lambda rng: chat(rng, *[part("image", picture(rng))] * (MAX_MEDIA + 1)), 400),
        Case("too long a text", lambda rng: chat(rng, {"type": "text", "text": "red " * 20_000}), 400),
        *[Case("leaves", lambda rng: {**chat(rng, part("audio", sound(rng))), "max_tokens": 999, **long}, leaving=True)]
        * 4,
    ]


def fault_of(client: httpx.Client, case: Case, rng: np.random.Generator) -> str:
    """Send a request; returns the fault of its answer, or an empty text."""
    body = case.make(rng)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json", **case.headers}
    try:
        with client.stream("POST", "/v1/chat/completions", content=content, headers=headers) as reply:
            lines = reply.iter_lines()
            if case.leaving:
                next(lines)
                return "" if reply.status_code == 200 else f"status {reply.status_code}"
            said = [line.removeprefix("data: ") for line in lines if line]
    except (httpx.HTTPError, OSError, StopIteration) as error:
        return f"{type(error).__name__}: {error}"
    if reply.status_code != case.status:
        return f"status {reply.status_code}, expected {case.status}: {' '.join(said)[:200]}"
    if case.status != 200:
        return "" if json.loads("".join(said))["error"]["message"] else "no message"
    last = json.loads(said[-2] if said[-1] == "[DONE]" else "".join(said))
    if "error" in last:
        return str(last["error"]["message"])
    reached = tuple(medium["type"] for medium in last["chatbridge"]["media"] if medium["reached"])
    right = reached == case.reached and last["choices"][0]["finish_reason"] in ("stop", "length")
    return "" if right else f"{reached} reached the model, expected {case.reached}"


class Served(NamedTuple):
    """A running server: its address, process, temporary folder and log."""

    url: str
    process: subprocess.Popen[str]
    temporary: Path
    log: Path


@contextmanager
def serving(*more: str) -> Iterator[Served]:
    """``chatbridge serve`` with the tiny model on a free port."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        temporary, log = Path(folder, "temporary"), Path(folder, "log")
        temporary.mkdir()
        command = [sys.executable, "-m", "lavis_chatbridge.cli", "serve", "--port", "0", "--device", "cpu", *more]
        command += ["--max-body", str(MAX_BODY), "--max-medium", str(MAX_MEDIUM), "--max-media", str(MAX_MEDIA)]
        command += ["--timeout", str(PATIENCE)]
        environment = {**os.environ, "CHATBRIDGE_TOKENS": TOKEN, "TMPDIR": str(temporary)}
        with (
            log.open("w") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
        ):
            try:
                assert process.stdout is not None
                found = re.search(r"(http://\S+)/v1", process.stdout.readline())
                if not found:
                    raise SystemExit(f"the server did not start: {log.read_text()[-2000:]}")
                yield Served(found.group(1), process, temporary, log)
            finally:
                process.terminate()
                process.wait(60)


class Held(NamedTuple):
    """Resources of the server's processes at a time: MiB of RSS, threads, open files."""

    seconds: float
    memory: float
    threads: float
    files: float


def look(process: int, seconds: float) -> Held:
    """The resources of a process and all below it."""
    memory = threads = files = 0
    root = psutil.Process(process)
    for one in (root, *root.children(recursive=True)):
        with suppress(psutil.Error):  # it has ended meanwhile
            memory += one.memory_info().rss
            threads += one.num_threads()
            files += one.num_fds()
    return Held(seconds, memory / (1 << 20), threads, files)


@contextmanager
def watching(process: int) -> Iterator[list[Held]]:
    """Look at a process every `LOOK` seconds."""
    found: list[Held] = []
    over, began = threading.Event(), time.monotonic()

    def work() -> None:
        while not over.wait(LOOK):
            found.append(look(process, time.monotonic() - began))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def growth_faults(found: Sequence[Held]) -> list[str]:
    """The resources that grew after the warm-up."""
    faults, length = [], found[-1].seconds / 4 or 1.0
    for name, slack in SLACK.items():
        quarters = [
            [getattr(one, name) for one in found if which <= one.seconds / length <= which + 1] for which in (1, 3)
        ]
        early, late = (statistics.median(held) for held in quarters)
        if late > GROWTH * early + slack:
            faults.append(f"{name} grew from {early:.0f} to {late:.0f}")
    return faults


def soak(minutes: float, clients: int, seed: int, more: Sequence[str]) -> tuple[str, list[str]]:
    """Send every type of request for some minutes; returns the tables, and the faults."""
    cases = all_cases()
    counts: Counter[str] = Counter()
    faults: list[str] = []
    end = time.monotonic() + 60 * minutes

    def client(number: int) -> None:
        rng = np.random.default_rng([seed, number])
        with httpx.Client(base_url=served.url, timeout=PATIENCE) as line:
            while time.monotonic() < end:
                for which in rng.permutation(len(cases)):
                    fault = fault_of(line, cases[which], rng)
                    counts[cases[which].name] += 1
                    faults.extend([f"{cases[which].name}: {fault}"] if fault else [])
                    if time.monotonic() > end:
                        break

    with serving(*more) as served, watching(served.process.pid) as held:
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, range(clients)))
        time.sleep(3)
        left = [path.name for path in served.temporary.rglob("*") if path.is_file()]
        log = served.log.read_text()
    errors = re.findall(r"^\S*(?:Error|Exception)\b.*| ERROR .*", log, re.M)
    faults += [f"{len(errors)} faults in the log: {errors[0]}"] if errors else []
    faults += [f"files are left: {left[:5]}"] if left else []
    faults += growth_faults(held)
    rows = [f"| {name} | {count} |" for name, count in counts.items()]
    step = max(1, len(held) // 20)
    memory = [f"| {h.seconds / 60:.1f} | {h.memory:.0f} | {h.threads:.0f} | {h.files:.0f} |" for h in held[::step]]
    lines = [f"{clients} clients, {minutes:g} minutes, {sum(counts.values())} requests.", "", "| request | sent |"]
    lines += ["|---|---|", *rows, "", "| minute | memory (MiB) | threads | open files |", "|---|---|---|---|", *memory]
    return "\n".join([*lines, ""]), faults


def throughput(clients: Sequence[int], requests: int, seed: int, engines: dict[str, str]) -> str:
    """Tokens a second and the time of a reply, with the language model here and on vLLM."""
    lines = ["| clients | language model | tokens/s | against 1 client, local | median s | 95 % s |", "|---" * 6 + "|"]
    base = 0.0
    for name, url in engines.items():
        with serving(*(["--engine", url] if url else [])) as served:
            for count in clients:
                rng = np.random.default_rng(seed)
                bodies = [
                    chat(rng, part("image", picture(rng)), max_tokens=NEW_TOKENS, ignore_eos=True)
                    for _ in range(requests)
                ]

                def ask(body: dict[str, Any], url: str = served.url) -> tuple[int, float]:
                    began = time.monotonic()
                    headers = {"Authorization": f"Bearer {TOKEN}"}
                    reply = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=PATIENCE)
                    return reply.json()["usage"]["completion_tokens"], time.monotonic() - began

                ask(bodies[0])
                began = time.monotonic()
                with ThreadPoolExecutor(count) as pool:
                    done = list(pool.map(ask, bodies))
                speed = sum(tokens for tokens, _ in done) / (time.monotonic() - began)
                base = base or speed
                middle, late = np.quantile([seconds for _, seconds in done], [0.5, 0.95])
                lines.append(f"| {count} | {name} | {speed:.0f} | {speed / base:.1f} | {middle:.2f} | {late:.2f} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Print the tables and, of a soak, the verdict."""
    parser = command_line(__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--engine", default="", help="a vLLM server of the tiny model's language model")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    faults: list[str] = []
    if args.soak:
        more = ["--engine", args.engine] if args.engine else []
        text, faults = soak(args.soak, args.clients[-1], args.seed, more)
        text += "\n" + ("pass" if not faults else f"fail ({len(faults)}): " + "; ".join(faults[:10])) + "\n"
    else:
        engines = {"local": "", **({"vLLM": args.engine} if args.engine else {})}
        text = throughput(args.clients, args.requests, args.seed, engines)
    how = circumstances("chat.py", *sys.argv[1:], modules=(torch, transformers))
    write_table(f"# `chatbridge serve` under clients\n\n{how}\n{text}", args.write)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
