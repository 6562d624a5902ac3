"""Requests per second of ``chatbridge multis generate`` against a server on loopback that answers after 200 ms.

The baseline is the ideal: ``requests / concurrency * latency``. Run from the repository's root, on a quiet machine::

    OMP_NUM_THREADS=1 python benchmarks/multis.py [--requests 2000] [--concurrency 64] [--write benchmarks/multis.md]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai
from common import circumstances, status, tell

from lavis_chatbridge.multis.annotation import Annotation, MediumRef
from lavis_chatbridge.multis.generate import GenerateSettings, Price, generate, plan
from lavis_chatbridge.multis.prompts import PromptBook

SERVER = Path(__file__).resolve().parents[1] / "tests" / "multis" / "openai_server.py"


def notes(count: int) -> list[Annotation]:
    """Items with one sentence each."""
    return [
        Annotation(
            id=f"item{n}", media=(MediumRef(type="audio", path="a.wav"),), sound_captions=(f"A bell rings {n} times.",)
        )
        for n in range(count)
    ]


def measure(requests: int, concurrency: int, latency: float, folder: Path) -> str:
    """A table with one row."""
    program = [sys.executable, str(SERVER), "--latency", str(latency)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        options = GenerateSettings(model="m", base_url=url, kinds=("detail",), concurrency=concurrency)
        items = notes(requests)
        every = plan(lambda: items, PromptBook(), options)
        begin, used = time.monotonic(), time.process_time()
        report = generate(every, folder, Price(input=0, output=0), options)
        seconds, used = time.monotonic() - begin, time.process_time() - used
        server.kill()
    assert report.answered == requests, report
    ideal = requests / concurrency * latency
    return (
        "| requests | in flight | ideal s | s | ratio | CPU ms per request | peak MB |\n"
        "|---:|---:|---:|---:|---:|---:|---:|\n"
        f"| {requests} | {concurrency} | {ideal:.1f} | {seconds:.1f} | {seconds / ideal:.2f} | "
        f"{1000 * used / requests:.2f} | {status('VmHWM') >> 20} |\n"
    )


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds")
    parser.add_argument("--write", type=Path, help="file for the table")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = measure(given.requests, given.concurrency, given.latency, Path(folder))
    arguments = (f"--requests {given.requests}", f"--concurrency {given.concurrency}")
    how = circumstances("multis.py", *arguments, modules=(openai,))
    tell(f"# Speed of MULTIS's requests\n\n{how}\n{table}", given.write)


if __name__ == "__main__":
    main()
