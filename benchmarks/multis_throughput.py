"""How fast `multis generate` asks, and whether its memory stays flat: many requests, a server with a fixed latency.

    python benchmarks/multis_throughput.py [--requests 10000] [--latency 0.2] [--in-flight 64]

The ideal time is requests x latency / in flight. The named baseline, measured in the same run, is the `openai` client
alone: the same requests through as many bare loops, without journal, budget and rate limit. Server and client run on
this machine, in two processes, so other work on it shows in both rows. The last line says whether the target was met.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lavis_chatbridge.multis import generate as stage
from lavis_chatbridge.multis.annotation import Annotation, MediumRef
from lavis_chatbridge.multis.endpoint import EndpointSettings
from lavis_chatbridge.multis.ledger import answers
from lavis_chatbridge.multis.limits import Price
from lavis_chatbridge.multis.prompts import PromptBook

TARGET = 1.3
_ROOT = Path(__file__).resolve().parent.parent


class Memory:
    """Resident memory of this process over time, sampled in a thread."""

    def __init__(self) -> None:
        self.samples: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def growth(self) -> tuple[float, float]:
        """MB at a quarter of the time and at its end."""
        return self.samples[len(self.samples) // 4], self.samples[-1]

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.samples.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)


def annotations(count: int) -> Iterator[Annotation]:
    """Items that differ, made one at a time."""
    for number in range(count):
        media = (MediumRef("audio", f"{number}.wav"),)
        yield Annotation(f"item{number}", media, sound_captions=(f"A bell rings {number} times while it rains.",))


def ours(url: str, count: int, in_flight: int, folder: str) -> int:
    """`multis generate`; returns the number of answers in its journal."""
    options = stage.GenerateSettings(kinds=["detail"], concurrency=in_flight)
    endpoint = EndpointSettings("m", url)
    requests = stage.plan(annotations(count), PromptBook(), options, endpoint)
    stage.generate(requests, folder, endpoint, Price(1.0, 1.0), options)
    return sum(1 for _ in answers(folder))


def bare(url: str, count: int, in_flight: int) -> int:
    """The official client in bare loops."""
    import openai

    options = stage.GenerateSettings(kinds=["detail"])
    requests = stage.plan(annotations(count), PromptBook(), options, EndpointSettings("m", url))
    done = 0

    async def worker(client: openai.AsyncOpenAI) -> None:
        nonlocal done
        for request in requests:
            messages = request.messages
            await client.chat.completions.create(model="m", messages=messages, max_tokens=request.max_tokens)  # type: ignore[call-overload]
            done += 1

    async def work() -> None:
        async with openai.AsyncOpenAI(api_key="none", base_url=url, max_retries=0) as client:
            await asyncio.gather(*(worker(client) for _ in range(in_flight)))

    asyncio.run(work())
    return done


def measure(name: str, run: Callable[[], int], ideal: float) -> float:
    """Run once, print a row of the table, return the ratio to the ideal time."""
    with Memory() as memory:
        cpu, began = time.process_time(), time.perf_counter()
        count = run()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    early, late = memory.growth()
    print(
        f"{name:20}{count:9}{seconds:9.1f}{ideal:9.1f}{seconds / ideal:8.2f}x{1000 * cpu / count:14.2f}"
        f"{early:11.0f}{late:9.0f}{late - early:+9.1f}",
        flush=True,
    )
    return seconds / ideal


def main() -> int:
    """Print the table; 0 if the target was met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--latency", type=float, default=0.2)
    parser.add_argument("--in-flight", type=int, default=64)
    args = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    ideal = args.requests * args.latency / args.in_flight
    program = [sys.executable, str(_ROOT / "tests" / "multis" / "openai_server.py"), "--latency", str(args.latency)]
    with (
        subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        try:
            url = (server.stdout.readline() if server.stdout else "").strip()
            bare(url, 64, 64)  # imports, connections
            load = os.getloadavg()[0]
            print(f"{os.cpu_count()} cores, load {load:.1f}; latency {args.latency} s, {args.in_flight} in flight")
            print(f"{'':20}  answers  seconds    ideal    ratio   CPU ms/req.  MB at 1/4   at end")
            ratio = measure("multis generate", lambda: ours(url, args.requests, args.in_flight, folder), ideal)
            measure("openai client alone", lambda: bare(url, args.requests, args.in_flight), ideal)
        finally:
            server.kill()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {peak:.0f} MB; target {TARGET}x: {'met' if ratio <= TARGET else 'missed'} ({ratio:.2f}x)")
    return 0 if ratio <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
