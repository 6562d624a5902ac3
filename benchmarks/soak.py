"""A server under many clients for a while: does its memory grow, does a file stay behind, is everybody answered?

    python benchmarks/soak.py [--minutes 20] [--clients 16] [--seed 0] [--write benchmarks/soak.md]

``chatbridge serve`` with the tiny model runs as a process of its own, on loopback. Clients send it good requests (text,
pictures, sounds, videos, several of them, conversations, streams) and bad ones (broken, truncated, oversized, of a
wrong type, without a right, and clients that leave), each with content that it has not seen before. Goals, all judged
by the last line, and by the exit status: every good request is answered with 200 and a reply to the media it brought,
every bad one with its status; the memory of the server's processes (the sum of their RSS), its threads and open files
do not grow after the warm-up: their median in the last quarter of the time is at most 1.05 times that in the second
quarter and a small constant; the temporary folder is empty once all clients have gone; no fault stands in the log.

The order of requests is drawn anew for each round of all kinds; the first is always sent whole, and ``--minutes 0``
sends each kind of request once. What grows is judged from 5 minutes on.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import io
import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import av
import httpx
import numpy as np
import soundfile
import torch
import transformers
from common import circumstances, tell
from PIL import Image

MODEL, TOKEN = "chatbridge-tiny", "a-token-for-the-soak"
MAX_BODY, MAX_MEDIUM, MAX_MEDIA = 4 << 20, 1 << 20, 8
PATIENCE = 300.0
"""Seconds that a request, and the server's last requests, may take."""
SAMPLE = 2.0
"""Seconds between two looks at the server's processes."""
JUDGED = 300.0
"""Seconds from which a run says something about growth."""
GROWTH = 1.05
SLACK = {"memory": 16.0, "threads": 4.0, "files": 16.0}
"""What may be added beside `GROWTH`: MiB, threads, open files."""


# What is sent.


def picture(rng: np.random.Generator, form: str = "PNG") -> bytes:
    """A picture file of a size and of colours of its own."""
    height, width = rng.integers(24, 400, 2)
    pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((int(width), int(height))).save(file, form)
    return file.getvalue()


def sound(rng: np.random.Generator) -> bytes:
    """A tone of 0.3 to 5 seconds as a wav file."""
    times = np.arange(round(16_000 * rng.uniform(0.3, 5.0))) / 16_000
    file = io.BytesIO()
    soundfile.write(file, 0.5 * np.sin(2 * np.pi * rng.uniform(100, 2000) * times), 16_000, format="WAV")
    return file.getvalue()


def silence(seconds: float) -> bytes:
    """A long silence in a small file."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(round(8_000 * seconds), np.int16), 8_000, format="FLAC")
    return file.getvalue()


def clip(rng: np.random.Generator, heard: bool) -> bytes:
    """An mp4 of 6 to 30 frames, with a tone as its sound track or without one."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        track: Any = container.add_stream("aac", rate=16_000) if heard else None
        frames = int(rng.integers(6, 31))
        for _ in range(frames):
            pixels = np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (48, 64, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode(None))
        if heard:
            samples = np.sin(np.arange(1600 * frames) / rng.uniform(2, 20)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.sample_rate = 16_000
            container.mux([*track.encode(frame), *track.encode(None)])
    return file.getvalue()


def large_picture() -> bytes:
    """A picture of 100 million pixels in a small file."""
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    return file.getvalue()


def url_part(kind: str, content: bytes, mime: str) -> dict[str, Any]:
    """A part of a message that holds a file."""
    url = f"data:{mime};base64,{base64.b64encode(content).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def image_part(content: bytes) -> dict[str, Any]:
    """A picture's part."""
    return url_part("image", content, "image/png")


def audio_part(content: bytes) -> dict[str, Any]:
    """A sound's part."""
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), "format": "wav"}}


def video_part(content: bytes) -> dict[str, Any]:
    """A video's part."""
    return url_part("video", content, "video/mp4")


def chat(rng: np.random.Generator, *parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A request about some media."""
    text = {"type": "text", "text": f"what is the colour of shape {rng.integers(1 << 30)}?"}
    settings = {"max_tokens": int(rng.integers(1, 25)), "temperature": float(rng.choice([0.0, 1.0])), "seed": 1}
    return {"model": MODEL, "messages": [{"role": "user", "content": [*parts, text]}], **settings, **more}


def conversation(rng: np.random.Generator) -> dict[str, Any]:
    """Three turns, with a picture in the first and a sound in the last."""
    first, last = chat(rng, image_part(picture(rng))), chat(rng, audio_part(sound(rng)))
    between = [{"role": "assistant", "content": "green"}, {"role": "user", "content": "and its size?"}]
    return {
        **last,
        "messages": [*first["messages"], *between, {"role": "assistant", "content": "4"}, *last["messages"]],
    }


class Sent(NamedTuple):
    """A request as it goes over the line."""

    body: bytes
    headers: dict[str, str]
    path: str = "/v1/chat/completions"
    method: str = "POST"


def sent(request: Any, **headers: str) -> Sent:
    """A request to the chat completions."""
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    usual = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    return Sent(body, {**usual, **{name.replace("_", "-"): value for name, value in headers.items()}})


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of request.

    Args:
        name: What it is called.
        make: A new request of that kind.
        status: With which it is answered.
        reached: Kinds of media that the model then has got, if it is a good one.
        leaving: Where its client leaves: ``"body"``, ``"answer"`` or ``"stream"``; nowhere if empty.
        weight: How often it is sent in a round.
    """

    name: str
    make: Callable[[np.random.Generator], Sent]
    status: int = 200
    reached: tuple[str, ...] = ()
    leaving: str = ""
    weight: int = 1

    @property
    def group(self) -> str:
        """``"good"``, ``"bad"`` or ``"leaving"``."""
        return "leaving" if self.leaving else "good" if self.status == 200 else "bad"


def good_cases() -> list[Case]:
    """What is answered, whole and as a stream."""
    made: dict[tuple[str, ...], Callable[[np.random.Generator], dict[str, Any]]] = {
        (): chat,
        ("image",): lambda rng: chat(rng, image_part(picture(rng))),
        ("audio",): lambda rng: chat(rng, audio_part(sound(rng))),
        ("video",): lambda rng: chat(rng, video_part(clip(rng, heard=False))),
        ("video", "audio"): lambda rng: chat(rng, video_part(clip(rng, heard=True))),
        ("image", "image", "audio", "video"): lambda rng: chat(
            rng,
            image_part(picture(rng)),
            image_part(picture(rng, "JPEG")),
            audio_part(sound(rng)),
            video_part(clip(rng, heard=False)),
        ),
        ("image", "audio"): conversation,
    }
    names = ["text", "image", "audio", "video", "heard video", "four media", "three turns"]
    cases = []
    for name, (reached, make) in zip(names, made.items(), strict=True):
        cases.append(Case(name, lambda rng, make=make: sent(make(rng)), reached=reached, weight=3))
        streaming = lambda rng, make=make: sent({**make(rng), "stream": True})  # noqa: E731
        cases.append(Case(f"{name}, streamed", streaming, reached=reached, weight=2))
    return cases


def bad_media_cases() -> list[Case]:
    """Media that cannot be read, or are too much."""
    huge, long = large_picture(), silence(700)
    parts: dict[str, Callable[[np.random.Generator], dict[str, Any]]] = {
        "broken image": lambda rng: image_part(rng.bytes(3000)),
        "broken audio": lambda rng: audio_part(rng.bytes(3000)),
        "broken video": lambda rng: video_part(rng.bytes(3000)),
        "truncated image": lambda rng: image_part((whole := picture(rng))[: len(whole) // 2]),
        "truncated audio": lambda rng: audio_part(sound(rng)[:30]),
        "truncated video": lambda rng: video_part((whole := clip(rng, heard=True))[: len(whole) // 2]),
        "audio as image": lambda rng: image_part(sound(rng)),
        "image as audio": lambda rng: audio_part(picture(rng)),
        "audio as video": lambda rng: video_part(sound(rng)),
        "100 million pixels": lambda rng: image_part(huge + rng.bytes(8)),
        "audio of 700 s": lambda rng: audio_part(long + rng.bytes(8)),
        "good and broken": lambda rng: image_part(rng.bytes(500)),
        "no base64": lambda rng: {"type": "image_url", "image_url": {"url": "data:image/png;base64,$$$"}},
        "a web page": lambda rng: {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}},
        "a server's file": lambda rng: {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    }
    before = {"good and broken": lambda rng: [image_part(picture(rng)), video_part(clip(rng, heard=True))]}
    cases = []
    for name, make in parts.items():
        first = before.get(name, lambda rng: [])
        cases.append(Case(name, lambda rng, make=make, first=first: sent(chat(rng, *first(rng), make(rng))), 400))
    oversized = lambda rng: sent(chat(rng, image_part(rng.bytes(MAX_MEDIUM + 1))))  # noqa: E731
    return [*cases, Case("oversized medium", oversized, 413)]


def bad_request_cases() -> list[Case]:
    """Requests that are wrong apart from their media."""
    return [
        Case("oversized body", lambda rng: sent(rng.bytes(MAX_BODY + 1)), 413),
        Case("no JSON", lambda rng: sent(rng.bytes(200)), 400),
        Case("deep JSON", lambda rng: sent(b"[" * 100_000), 400),
        Case("wrong content type", lambda rng: sent(chat(rng), Content_Type="text/plain"), 415),
        Case("wrong token", lambda rng: sent(chat(rng), Authorization="Bearer wrong"), 401),
        Case("unknown model", lambda rng: sent(chat(rng, model="another")), 404),
        Case("unknown field", lambda rng: sent(chat(rng, temprature=1)), 400),
        Case("too many media", lambda rng: sent(chat(rng, *[image_part(picture(rng))] * (MAX_MEDIA + 1))), 400),
        Case("too long a text", lambda rng: sent(chat(rng, {"type": "text", "text": "red " * 20_000})), 400),
        Case("unknown address", lambda rng: sent(b"")._replace(path=f"/v1/{rng.integers(1000)}", method="GET"), 404),
    ]


def leaving_cases() -> list[Case]:
    """Clients that do not wait for the end."""
    much = {"max_tokens": 1000, "temperature": 1.9}
    heard = lambda rng: sent(chat(rng, image_part(picture(rng)), video_part(clip(rng, heard=True)), **much))  # noqa: E731
    streamed = lambda rng: sent(chat(rng, audio_part(sound(rng)), stream=True, **much))  # noqa: E731
    return [
        Case("leaves in its body", heard, leaving="body"),
        Case("leaves before the answer", heard, leaving="answer"),
        Case("leaves in a stream", streamed, leaving="stream"),
    ]


def all_cases() -> list[Case]:
    """Every kind of request."""
    return [*good_cases(), *bad_media_cases(), *bad_request_cases(), *leaving_cases()]


# Sending.


class Outcome(NamedTuple):
    """What became of a request: its case, seconds, seconds to the first piece of a stream, and what is wrong."""

    case: Case
    seconds: float
    first: float | None
    fault: str


def send(client: httpx.Client, case: Case, rng: np.random.Generator) -> Outcome:
    """Make a request, send it, and look at its answer."""
    request = case.make(rng)
    began = time.monotonic()
    first = None
    try:
        if case.leaving in ("body", "answer"):
            _leave(client.base_url, request, case.leaving == "body", float(rng.uniform(0, 1)))
            fault = ""
        else:
            with client.stream(request.method, request.path, content=request.body, headers=request.headers) as reply:
                lines = reply.iter_lines()
                if case.leaving:
                    next(lines)
                    fault = _status_fault(case, reply.status_code)
                else:
                    streamed = reply.headers.get("content-type", "").startswith("text/event-stream")
                    opening = next(lines, "")
                    first = time.monotonic() - began if streamed else None
                    fault = fault_of(case, reply.status_code, [opening, *lines], streamed)
    except (httpx.HTTPError, OSError) as error:
        fault = f"{type(error).__name__}: {error}"
    return Outcome(case, time.monotonic() - began, first, fault)


def _leave(url: httpx.URL, request: Sent, half: bool, seconds: float) -> None:
    """Send a request, or half of one, and close the line after a while."""
    head = f"POST {request.path} HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: {len(request.body)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in request.headers.items()) + "\r\n"
    with socket.create_connection((url.host, url.port or 80), timeout=PATIENCE) as line:
        line.sendall(head.encode() + request.body[: len(request.body) // 2 if half else None])
        line.settimeout(max(seconds, 0.01))
        with suppress(TimeoutError):
            line.recv(1)


def fault_of(case: Case, status: int, lines: Sequence[str], streamed: bool) -> str:
    """What is wrong with an answer; empty if nothing is."""
    wrong = _status_fault(case, status)
    if wrong:
        return f"{wrong}: {' '.join(lines)[:200]}"
    if case.status != 200:
        error = json.loads("".join(lines)).get("error") or {}
        return "" if error.get("message") else "an answer without a message"
    if not streamed:
        answer = json.loads("".join(lines))
        return _reply_fault(case, answer["choices"][0]["finish_reason"], answer["chatbridge"])
    events = [line.removeprefix("data: ") for line in lines if line]
    if events[-1] != "[DONE]":
        return "a stream without an end"
    last = json.loads(events[-2])
    if "error" in last:
        return f"a stream with an error: {last['error']['message']}"
    return _reply_fault(case, last["choices"][0]["finish_reason"], last["chatbridge"])


def _status_fault(case: Case, status: int) -> str:
    return "" if status == case.status else f"status {status}, expected {case.status}"


def _reply_fault(case: Case, finish: str | None, report: dict[str, Any]) -> str:
    reached = tuple(medium["type"] for medium in report["media"] if medium["reached"])
    if finish not in ("stop", "length"):
        return f"a reply that ended with {finish!r}"
    return "" if reached == case.reached else f"{reached} reached the model, expected {case.reached}"


def run_clients(url: str, clients: int, seconds: float, seed: int) -> list[Outcome]:
    """Send requests from several threads until the time is over, but each kind of request at least once."""
    cases = [case for case in all_cases() for _ in range(case.weight if seconds > 0 else 1)]
    numbers, end = itertools.count(), time.monotonic() + seconds
    outcomes: list[Outcome] = []
    lock = threading.Lock()

    def work() -> None:
        with httpx.Client(base_url=url, timeout=PATIENCE) as client:
            while True:
                with lock:
                    number = next(numbers)
                round_, place = divmod(number, len(cases))
                if round_ and time.monotonic() >= end:
                    return
                order = np.random.default_rng([seed, round_]).permutation(len(cases))
                outcomes.append(send(client, cases[order[place]], np.random.default_rng([seed, 1, number])))

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


# The server and what it holds.


class Sample(NamedTuple):
    """What a process and all below it hold at a time."""

    seconds: float
    memory: float
    """MiB of RSS, summed."""
    threads: float
    files: float
    processes: int


def look(process: int, seconds: float) -> Sample:
    """Sum over the tree of a process what Linux says of it."""
    facts: dict[int, tuple[int, float, int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # it has ended meanwhile
                found = dict(re.findall(r"^(PPid|VmRSS|Threads):\s+(\d+)", (entry / "status").read_text(), re.M))
                facts[int(entry.name)] = int(found["PPid"]), int(found.get("VmRSS", 0)) / 1024, int(found["Threads"])
    tree, added = {process}, {process}
    while added:
        added = {one for one, (parent, _, _) in facts.items() if parent in added} - tree
        tree |= added
    files = 0
    for one in tree:
        with suppress(OSError):
            files += len(os.listdir(f"/proc/{one}/fd"))
    held = [facts[one] for one in tree if one in facts]
    return Sample(seconds, sum(m for _, m, _ in held), sum(t for _, _, t in held), files, len(held))


@contextmanager
def sampling(process: int) -> Iterator[list[Sample]]:
    """Look at a process every `SAMPLE` seconds."""
    samples: list[Sample] = []
    over, began = threading.Event(), time.monotonic()

    def work() -> None:
        while True:
            samples.append(look(process, time.monotonic() - began))
            if over.wait(SAMPLE):
                return

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


class Served(NamedTuple):
    """A running server: where it answers, its process, its temporary folder, and its log."""

    url: str
    process: subprocess.Popen[str]
    temporary: Path
    log: Path


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """``chatbridge serve`` with the tiny model on a free port."""
    temporary, log = folder / "temporary", folder / "log"
    temporary.mkdir()
    command = [sys.executable, "-m", "lavis_chatbridge.cli", "serve", "--port", "0", "--device", "cpu"]
    command += ["--max-body", str(MAX_BODY / (1 << 20)), "--max-medium", str(MAX_MEDIUM / (1 << 20))]
    command += ["--max-media", str(MAX_MEDIA), "--timeout", str(PATIENCE)]
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


def left_behind(served: Served) -> list[str]:
    """The files of requests that are still there when the server has nothing more to do."""
    end = time.monotonic() + PATIENCE
    names: list[str] = []
    while time.monotonic() < end and served.process.poll() is None:
        page = httpx.get(f"{served.url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=PATIENCE).text
        busy = re.findall(r"^chatbridge_(?:waiting|running) (\d+)", page, re.M)
        names = [str(path.relative_to(served.temporary)) for path in served.temporary.glob("*/*")]
        if not names and set(busy) == {"0"}:
            break
        time.sleep(0.2)
    return names


# What is said about it.


def quarter(samples: Sequence[Sample], which: int, name: str) -> float:
    """The median of what was held in a quarter (0 to 3) of the time."""
    length = samples[-1].seconds / 4 or 1.0
    held = [getattr(sample, name) for sample in samples if which <= sample.seconds / length < which + 1 + which // 3]
    return statistics.median(held)


def growth_faults(samples: Sequence[Sample]) -> list[str]:
    """What has grown after the warm-up."""
    faults = []
    for name, slack in SLACK.items():
        early, late = quarter(samples, 1, name), quarter(samples, 3, name)
        if late > GROWTH * early + slack:
            faults.append(f"{name} grew from {early:.0f} to {late:.0f}")
    return faults


def request_table(outcomes: Sequence[Outcome]) -> list[str]:
    """Counts and latency for each kind of request, in Markdown."""
    lines = ["| request | expected | sent | as expected | median s | 95 % | 99 % | longest |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.case.name].append(outcome)
        groups[f"**all {outcome.case.group}**"].append(outcome)
    for name in [*(case.name for case in all_cases()), *(f"**all {group}**" for group in ("good", "bad", "leaving"))]:
        found = groups[name]
        if not found:
            continue
        expected = "" if name.startswith("**") else found[0].case.status
        if found[0].case.leaving and expected:
            expected = "it leaves"
        right = sum(not outcome.fault for outcome in found)
        cells = " | ".join(f"{value:.2f}" for value in _quantiles([outcome.seconds for outcome in found]))
        lines.append(f"| {name} | {expected} | {len(found)} | {right} | {cells} |")
    firsts = [outcome.first for outcome in outcomes if outcome.first is not None]
    if firsts:
        cells = " | ".join(f"{value:.2f}" for value in _quantiles(firsts))
        lines.append(f"| first piece of a stream | | {len(firsts)} | | {cells} |")
    return lines


def _quantiles(seconds: Sequence[float]) -> list[float]:
    return [float(value) for value in np.quantile(seconds, [0.5, 0.95, 0.99, 1.0])]


def memory_table(samples: Sequence[Sample]) -> list[str]:
    """What the server held in each minute, in Markdown."""
    lines = ["| minute | memory (MiB) | most | threads | open files | processes |", "|---|---|---|---|---|---|"]
    minutes: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        minutes[int(sample.seconds // 60) + 1].append(sample)
    for minute, held in minutes.items():
        memory, threads, files = (statistics.median(getattr(s, name) for s in held) for name in SLACK)
        most, processes = max(s.memory for s in held), max(s.processes for s in held)
        lines.append(f"| {minute} | {memory:.0f} | {most:.0f} | {threads:.0f} | {files:.0f} | {processes} |")
    return lines


def soak(minutes: float, clients: int, seed: int) -> tuple[str, list[str]]:
    """Run it all.

    Args:
        minutes: How long; 0: each kind of request once.
        clients: Threads that send.
        seed: Of the requests.

    Returns:
        The tables, and what is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        with serving(Path(folder)) as served:
            with sampling(served.process.pid) as samples:
                outcomes = run_clients(served.url, clients, 60 * minutes, seed)
            names = left_behind(served)
            faults = [] if served.process.poll() is None else ["the server has ended"]
        after = [path.name for path in served.temporary.iterdir()]
        log = served.log.read_text()
    faults += [f"{o.case.name}: {o.fault}" for o in outcomes if o.fault]
    faults += [f"left behind: {', '.join(found[:5])} ({len(found)})" for found in (names, after) if found]
    errors = re.findall(r"^\S*(?:Error|Exception|Disconnect)\b.*| ERROR .*", log, re.M)
    faults += [f"{len(errors)} lines of faults in the log, such as {' / '.join(errors[:4])}"] if errors else []
    judged = samples[-1].seconds >= JUDGED
    faults += growth_faults(samples) if judged else []
    lines = [f"{clients} clients, {samples[-1].seconds / 60:.1f} minutes, {len(outcomes)} requests:", ""]
    lines += [*request_table(outcomes), "", "The server's processes:", "", *memory_table(samples), ""]
    if judged:
        early, late = quarter(samples, 1, "memory"), quarter(samples, 3, "memory")
        lines.append(f"Memory, last quarter against the second: {late:.0f} / {early:.0f} MiB = {late / early:.3f}.")
    lines += [f"Files left in the temporary folder: {len(names)} at rest, {len(after)} after the end.", ""]
    return "\n".join(lines), faults


def main() -> int:
    """Print the tables and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, metavar="FILE", help="a Markdown file for the tables")
    args = parser.parse_args()
    tables, faults = soak(args.minutes, args.clients, args.seed)
    options = [f"--{name}={getattr(args, name):g}" for name in ("minutes", "clients", "seed")]
    verdict = "pass" if not faults else f"fail ({len(faults)}): " + "; ".join(faults[:10])
    how = circumstances("soak.py", *options, modules=(torch, transformers))
    tell(f"# A server under load\n\n{how}\n{tables}\n{verdict}\n", args.write)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
