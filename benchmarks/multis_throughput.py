"""How fast `multis generate` asks, and whether its memory stays flat: many requests, a server with a fixed latency.

    python benchmarks/multis_throughput.py [--requests 10000] [--latency 0.2] [--in-flight 64]
        [--baseline REQUESTS] [--cores CLIENT,SERVER] [--write benchmarks/multis_throughput.md]

The ideal time is requests x latency / in flight. The named baseline, measured in the same run, is the `openai` client
alone: the same requests through as many bare loops over one client, without journal, budget and rate limit. Server and
client run on this machine, in two processes, so other work on it shows in both rows. `--cores` binds each of the two
to a core. `--baseline` gives the baseline fewer requests; ratios are per request. The last line says whether the target
was met, and how much of the client's core a request may take for that.
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
from typing import NamedTuple

from common import circumstances, tell

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


class Measured(NamedTuple):
    """One row of the table: times in seconds, memory in MB."""

    name: str
    count: int
    seconds: float
    cpu: float
    early: float
    late: float

    @property
    def each(self) -> float:
        """Seconds per request."""
        return self.seconds / self.count

    def line(self, ideal: float, baseline: float) -> str:
        """The row in Markdown; ``ideal`` and ``baseline`` are seconds per request."""
        return (
            f"| {self.name} | {self.count} | {self.seconds:.1f} | {self.each / ideal:.2f}x "
            f"| {self.each / baseline:.2f}x | {1000 * self.cpu / self.count:.2f} "
            f"| {self.early:.0f} | {self.late:.0f} ({self.late - self.early:+.1f}) |"
        )


def measure(name: str, run: Callable[[], int]) -> Measured:
    """Run once."""
    with Memory() as memory:
        cpu, began = time.process_time(), time.perf_counter()
        count = run()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Measured(name, count, seconds, cpu, *memory.growth())


def report(rows: list[Measured], args: argparse.Namespace, load: float) -> tuple[str, float]:
    """The table, and the ratio of the first row to the ideal time."""
    import openai

    ideal = args.latency / args.in_flight
    ratio = rows[0].each / ideal
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    where = (
        f"client on core {args.cores[0]}, server on core {args.cores[1]}" if args.cores else "client and server unbound"
    )
    return (
        f"# Requests of `chatbridge multis generate`\n\n"
        f"{circumstances('multis_throughput.py', *sys.argv[1:], modules=(openai,))}\n"
        f"Load {load:.1f} before the run, niceness {os.nice(0)}; {where}.\n\n"
        f"{args.requests} requests, {args.in_flight} in flight, the server answers after {args.latency} s: "
        f"ideal {args.requests * ideal:.2f} s.\n\n"
        f"| | answers | seconds | to the ideal | to the client alone | CPU ms/request | MB at 1/4 | MB at the end |\n"
        f"|---|---|---|---|---|---|---|---|\n"
        + "".join(row.line(ideal, rows[-1].each) + "\n" for row in rows)
        + f"\nPeak memory {peak:.0f} MiB. Target {TARGET}x: {'met' if ratio <= TARGET else 'missed'} ({ratio:.2f}x), "
        f"which leaves {1000 * TARGET * ideal:.2f} ms of its core to each request.\n"
    ), ratio


def cores(text: str) -> tuple[int, int]:
    """``CLIENT,SERVER``."""
    client, server = (int(part) for part in text.split(","))
    return client, server


def main() -> int:
    """Print the table; 0 if the target was met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--latency", type=float, default=0.2)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--baseline", type=int, metavar="REQUESTS", help="of the baseline (default: as many)")
    parser.add_argument("--cores", type=cores, metavar="CLIENT,SERVER", help="bind each process to a core")
    parser.add_argument("--write", type=Path, metavar="FILE", help="a Markdown file for the table")
    args = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    load = os.getloadavg()[0]
    program = [sys.executable, str(_ROOT / "tests" / "multis" / "openai_server.py"), "--latency", str(args.latency)]
    with (
        subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        try:
            if args.cores:
                os.sched_setaffinity(0, {args.cores[0]})
                os.sched_setaffinity(server.pid, {args.cores[1]})
            url = (server.stdout.readline() if server.stdout else "").strip()
            bare(url, 64, 64)  # imports, connections
            rows = [
                measure("multis generate", lambda: ours(url, args.requests, args.in_flight, folder)),
                measure("openai client alone", lambda: bare(url, args.baseline or args.requests, args.in_flight)),
            ]
        finally:
            server.kill()
    table, ratio = report(rows, args, load)
    tell(table, args.write)
    return 0 if ratio <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
