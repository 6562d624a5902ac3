"""Throughput of ``chatbridge multis generate`` against a local server with a fixed latency.

    python benchmarks/multis.py [--requests 2000] [--latency 0.2] [--in-flight 64]

The baseline, measured in the same run, is the openai client alone: the same requests from as many bare loops, without
answers file, budget and rate limit. Ideal time = requests x latency / in flight. Server and client share this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lavis_chatbridge.multis import generate as stage  # noqa: E402
from lavis_chatbridge.multis.annotation import Annotation, MediumRef  # noqa: E402
from lavis_chatbridge.multis.prompts import PromptBook  # noqa: E402


async def bare(plan: list[stage.Request], url: str, in_flight: int) -> None:
    """Send all requests with the openai client and do nothing with the answers."""
    from openai import AsyncOpenAI

    requests = iter(plan)
    async with AsyncOpenAI(api_key="none", base_url=url) as client:

        async def worker() -> None:
            for request in requests:
                await client.chat.completions.create(
                    model="m", messages=request.messages, max_tokens=request.max_tokens
                )

        await asyncio.gather(*(worker() for _ in range(in_flight)))


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds")
    parser.add_argument("--in-flight", type=int, default=64)
    args = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    command = [sys.executable, "-m", "tests.multis.openai_server", "--latency", str(args.latency)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        only = {"conversation": 0, "reasoning": 0}
        options = stage.GenerateSettings(model="m", base_url=url, counts=only, concurrency=args.in_flight)
        bell = (MediumRef(type="audio", path="bell.wav"),)
        items = [Annotation(id=str(n), media=bell, sound_captions=(f"{n} bells",)) for n in range(args.requests)]
        plan = list(stage.plan(items, PromptBook(), options))
        with tempfile.TemporaryDirectory() as folder:
            price = stage.price_of("local")
            rows = {
                "openai client alone": timed(lambda: asyncio.run(bare(plan, url, args.in_flight))),
                "multis generate": timed(lambda: stage.generate(plan, folder, price, options)),
            }
            assert len(stage.read_answers(folder)) == args.requests
        server.terminate()
    ideal = args.requests * args.latency / args.in_flight
    base = rows["openai client alone"][0]
    print("| | seconds | x ideal | x baseline | CPU ms a request |\n|---|---:|---:|---:|---:|")
    for name, (wall, cpu) in rows.items():
        print(f"| {name} | {wall:.1f} | {wall / ideal:.2f} | {wall / base:.2f} | {1000 * cpu / args.requests:.2f} |")


if __name__ == "__main__":
    main()
