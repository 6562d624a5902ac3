"""Hostile inputs, thousands of them: pictures, videos, sounds, annotations, configurations, weights, requests, prompts.

    python benchmarks/fuzz.py [--inputs 24000] [--seed 0] [--target NAME ...] [--media DIR ...]
        [--write benchmarks/fuzz.md]
    python benchmarks/fuzz.py --replay FILE

Every input must end in a result or in one of the package's exceptions, within 10 s of CPU time and the memory of its
target; what a target is and what else must hold is in ``tests/fuzzing``. Inputs run in a process of their own, so that
a crash is counted and not suffered. An input that fails is kept in ``--failures``, with the command that feeds it
again. ``--media`` names folders of real files, which are mutated beside those made here. The last line says pass or
fail, and so does the exit status.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import av  # noqa: F401  (before LAVIS, which loads decord, whose libvpx would take the place of PyAV's)
from common import circumstances, status, tell

ROOT = Path(__file__).resolve().parent.parent
SECONDS, PATIENCE, SPACE = 10.0, 120.0, 6 << 30
WARM_UP = 3
SHARES = {"image": 3.0, "video": 3.0, "audio": 3.0, "configurations": 0.5, "templates": 0.5}
"""How many inputs a target gets, against 1 for the others."""


class Outcome(NamedTuple):
    """What became of one input.

    Attributes:
        what: ``"result"``, the name of the exception that refused it, or ``"FAULT: ..."``.
        seconds: CPU time.
        megabytes: What it added to the memory of the process at its peak.
    """

    what: str
    seconds: float
    megabytes: float

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than it may."""
        return self.what.startswith("FAULT")


@dataclass
class Row:
    """The inputs of one target."""

    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    megabytes: float = 0.0
    cases: dict[str, Outcome] = field(default_factory=dict)

    def add(self, case: int | str, outcome: Outcome) -> None:
        """Count an input."""
        self.outcomes["faults" if outcome.failed else outcome.what] += 1
        self.seconds, self.megabytes = max(self.seconds, outcome.seconds), max(self.megabytes, outcome.megabytes)
        if isinstance(case, str):
            self.cases[case] = outcome


def feed(target: Any, data: bytes) -> Outcome:
    """Give one input to the package, in this process."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        before, begin = status("VmRSS"), time.process_time()
        try:
            what = target.outcome(data, Path(folder))
        except BaseException as error:  # whatever it is, it is what is looked for
            if isinstance(error, KeyboardInterrupt):
                raise
            what = " ".join(f"FAULT: {type(error).__name__}: {error}".split())[:300]
        seconds, megabytes = time.process_time() - begin, (status("VmHWM") - before) / (1 << 20)
    if seconds > SECONDS and not what.startswith("FAULT"):
        what = f"FAULT: {seconds:.1f} s"
    if megabytes > target.megabytes and not what.startswith("FAULT"):
        what = f"FAULT: {megabytes:.0f} MB"
    return Outcome(what, seconds, max(0.0, megabytes))


def targets() -> dict[str, Any]:
    """All targets, by name."""
    sys.path.insert(0, str(ROOT))
    import logging

    import tests.conftest  # noqa: F401  (the environment of the tests: offline, few threads, PyAV first)
    from tests.fuzzing.targets import TARGETS

    logging.disable(logging.CRITICAL)
    return TARGETS


def work(connection: Connection, seed: int) -> None:
    """Feed inputs until the other side says stop."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)  # decoders complain there about every broken file
    known, warm = targets(), set()
    import warnings

    warnings.simplefilter("ignore")
    while (order := connection.recv()) is not None:
        name, case = order
        target = known[name]
        if name not in warm:
            for number in range(WARM_UP):  # what is imported or built on first use is not the input's memory
                feed(target, target.input(-1, number))
            resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + SPACE, resource.RLIM_INFINITY))
            warm.add(name)
        connection.send(feed(target, target.input(seed, case)))


class Worker:
    """A process that inputs are fed in; a new one takes its place when it dies."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=work, args=(other, self._seed), daemon=True)
        self._process.start()
        other.close()

    def __call__(self, name: str, case: int | str) -> Outcome:
        """What becomes of an input."""
        self._connection.send((name, case))
        try:
            if self._connection.poll(PATIENCE):
                return self._connection.recv()
            what = f"FAULT: still running after {PATIENCE:g} s"
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode or 0
            what = f"FAULT: the process died of {signal.Signals(-code).name if code < 0 else f'exit status {code}'}"
        self.stop()
        self._start()
        return Outcome(what, 0.0, 0.0)

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def counts(chosen: list[str], inputs: int) -> dict[str, int]:
    """Target -> how many inputs beside its special cases."""
    whole = sum(SHARES.get(name, 1.0) for name in chosen)
    return {name: round(inputs * SHARES.get(name, 1.0) / whole) for name in chosen}


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Run all targets, one after the other."""
    known = targets()
    chosen = args.target or list(known)
    if unknown := [name for name in chosen if name not in known]:
        sys.exit(f"--target: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    worker = Worker(args.seed)
    for name, count in counts(chosen, args.inputs).items():
        row = Row(name)
        for case in [*known[name].cases, *range(count)]:
            outcome = worker(name, case)
            row.add(case, outcome)
            if outcome.failed:
                path = kept(args.failures, name, case, known[name].input(args.seed, case))
                print(f"{name}, {case}: {outcome.what}\n    python benchmarks/fuzz.py --replay {path}", flush=True)
        print(f"{name}: {sum(row.outcomes.values())} inputs, {row.outcomes['faults']} faults", flush=True)
        yield row
    worker.stop()


def kept(folder: Path, name: str, case: int | str, data: bytes) -> Path:
    """Keep an input under a name from which ``--replay`` knows its target."""
    folder.mkdir(parents=True, exist_ok=True)
    words = re.sub(r"[^A-Za-z0-9]+", "-", str(case)).strip("-")
    path = folder / f"{name.replace(' ', '_')}--{words}.bin"
    path.write_bytes(data)
    return path


def replay(path: Path) -> int:
    """Feed a kept input again, here, with its traceback."""
    target = targets()[path.name.partition("--")[0].replace("_", " ")]
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        print(target.outcome(path.read_bytes(), folder))
    finally:
        shutil.rmtree(folder)
    return 0


def report(rows: list[Row], minutes: float, options: list[str]) -> str:
    """The tables as Markdown."""
    import torch
    import transformers

    total, faults = sum(sum(row.outcomes.values()) for row in rows), sum(row.outcomes["faults"] for row in rows)
    lines = [
        "# Hostile inputs",
        "",
        circumstances("fuzz.py", *options, modules=(torch, transformers)),
        f"{total} inputs in {minutes:.0f} minutes. Each must end in a result or an exception of the package, within "
        f"{SECONDS:g} s of CPU time. Memory is what an input adds to its process at the peak, bounded for each target.",
        "",
        "| target | inputs | results | refused | faults | worst CPU s | worst MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        refused = sorted((n, c) for n, c in row.outcomes.items() if n not in ("result", "faults"))
        named = ", ".join(f"{name} {count}" for name, count in refused)
        numbers = f"{row.outcomes['faults']} | {row.seconds:.2f} | {row.megabytes:.0f}"
        lines.append(f"| {row.name} | {sum(row.outcomes.values())} | {row.outcomes['result']} | {named} | {numbers} |")
    lines += ["", "Special cases:", "", "| target | input | outcome | CPU s | MB |", "|---|---|---|---|---|"]
    for row in rows:
        for case, one in row.cases.items():
            lines.append(f"| {row.name} | {case} | {one.what} | {one.seconds:.2f} | {one.megabytes:.0f} |")
    verdict = "pass" if not faults and total else "fail"
    return "\n".join([*lines, "", f"{faults} faults in {total} inputs: {verdict}", ""])


def main() -> int:
    """Print the tables; 0 if there was no fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=24_000, help="mutated inputs, beside the special cases")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--target", action="append", metavar="NAME", help="only these; may be given several times")
    parser.add_argument("--media", action="append", type=Path, default=[], metavar="DIR", help="folders of real files")
    parser.add_argument("--failures", type=Path, default=Path("output/fuzz"), metavar="DIR", help="keeps what failed")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="feed a kept input again, with its traceback")
    parser.add_argument("--write", type=Path, metavar="FILE", help="a Markdown file for the tables")
    args = parser.parse_args()
    if args.media:
        os.environ["FUZZ_MEDIA"] = os.pathsep.join(str(folder.resolve()) for folder in args.media)
    if args.replay:
        return replay(args.replay)
    begin = time.monotonic()
    rows = list(measure(args))
    options = [f"--inputs {args.inputs}", f"--seed {args.seed}", *("--media DIR" for _ in args.media)]
    text = report(rows, (time.monotonic() - begin) / 60, options)
    tell(text, args.write)
    return 1 if any(row.outcomes["faults"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
