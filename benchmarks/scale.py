"""The plan of a very large training, walked through whole: no sample lost, none twice, and a resume that costs nothing.

    python benchmarks/scale.py --write benchmarks/scale.md

Simulates the order of 1,024 ranks over 8 sources, 13,000 shards and 130 million samples by the plan that training uses
(``lavis_chatbridge/datasets/plan.py``). Every rank's slice of every step is drawn until each source has had a whole
epoch, and ticked off in one array per source and epoch. No sample is read: what is shown is which ones would be. The
exit status is 0 only if everything holds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT))  # behind this script's own folder: the package of this tree, installed or not

from common import circumstances, tell  # noqa: E402

from lavis_chatbridge.datasets.plan import MixturePlan  # noqa: E402

SHARES = (40, 20, 15, 10, 6, 5, 3, 1)
SECONDS, MEGABYTES = 5.0, 500.0
TRIES = 3  # of each resume; the fastest counts, since other work on the machine stretches the others
RESUME = """
import json, resource, sys
from lavis_chatbridge.datasets.plan import MixturePlan
arguments, step, rank = json.loads(sys.argv[1])
source, pairs = MixturePlan(**arguments).batch(step, rank)
used = resource.getrusage(resource.RUSAGE_SELF)
memory = used.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
if sys.platform == "linux":  # the other number counts what the parent had when it started this process
    memory = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
print(json.dumps([source, pairs, used.ru_utime + used.ru_stime, memory]))
"""


@dataclass
class Walk:
    """What was drawn while walking through the steps."""

    steps: int = 0
    seconds: float = 0.0
    turns: Counter[str] = field(default_factory=Counter)
    taken: Counter[tuple[str, int]] = field(default_factory=Counter)
    seen: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Resume:
    """One step asked for by a fresh process."""

    step: int
    seconds: float
    cpu: float
    megabytes: float
    same: bool


def sizes_of(samples: int) -> dict[str, int]:
    """Eight sources, none of a round size, that hold ``samples`` together."""
    sizes = [samples * share // 100 - 17 * number for number, share in enumerate(SHARES)]
    sizes[0] += samples - sum(sizes)
    return {f"source{number}": size for number, size in enumerate(sizes)}


def per_shard_of(sizes: dict[str, int], shards: int) -> int:
    """The least number of samples per shard for which no more than ``shards`` are needed."""
    size = sum(sizes.values()) // shards
    while shards_of(sizes, size) > shards:
        size += 1
    return size


def shards_of(sizes: dict[str, int], per_shard: int) -> int:
    """How many shards the sources have; a shard holds samples of one source."""
    return sum(-(-size // per_shard) for size in sizes.values())


def walk(plan: MixturePlan) -> Walk:
    """Draw every rank's slice of every step until each source has had an epoch."""
    done, ranks, begin = Walk(), np.arange(plan.world_size), time.perf_counter()
    while any(done.taken[name, 0] < size for name, size in plan.sizes.items()):
        name, positions = plan.slices(done.steps, ranks)
        indices, epochs = plan.drawn(name, positions.ravel())
        for epoch in np.unique(epochs):
            chosen = indices[epochs == epoch]
            key = (name, int(epoch))
            if key not in done.seen:
                done.seen[key] = np.zeros(plan.sizes[name], dtype=bool)
            done.seen[key][chosen] = True
            done.taken[key] += len(chosen)
        done.turns[name] += 1
        done.steps += 1
    done.seconds = time.perf_counter() - begin
    return done


def faults(plan: MixturePlan, done: Walk) -> tuple[int, int]:
    """How many samples of first epochs were never drawn, and how many draws of any epoch were repeats."""
    lost = sum(int(size - np.count_nonzero(done.seen[name, 0])) for name, size in plan.sizes.items())
    repeated = sum(taken - int(np.count_nonzero(done.seen[key])) for key, taken in done.taken.items())
    return lost, repeated


def disagreements(arguments: dict, steps: list[int]) -> int:
    """How many ranks, each with a plan of its own, have another source or other samples than the walk gave them."""
    whole, wrong = MixturePlan(**arguments), 0
    for step in steps:
        source, positions = whole.slices(step, np.arange(whole.world_size))
        for rank in range(whole.world_size):
            indices, epochs = whole.drawn(source, positions[rank])
            expected = (source, list(zip(indices.tolist(), epochs.tolist(), strict=True)))
            wrong += MixturePlan(**arguments).batch(step, rank) != expected
    return wrong


def shards_per_batch(plan: MixturePlan, steps: list[int], per_shard: int) -> float:
    """From how many shards a rank's samples of a step come, on average."""
    counts = []
    for step in steps:
        name, positions = plan.slices(step, np.arange(plan.world_size))
        shards = plan.drawn(name, positions.ravel())[0].reshape(positions.shape) // per_shard
        counts += [len(set(row)) for row in shards.tolist()]
    return sum(counts) / len(counts)


def resume(arguments: dict, step: int, rank: int) -> Resume:
    """Ask a fresh process for a step."""
    given = json.dumps([arguments, step, rank])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", RESUME, given], env=environment, check=True, capture_output=True)
    seconds = time.perf_counter() - begin
    source, pairs, cpu, memory = json.loads(done.stdout)
    same = (source, [tuple(pair) for pair in pairs]) == MixturePlan(**arguments).batch(step, rank)
    return Resume(step, seconds, cpu, memory, same)


def sources_table(plan: MixturePlan, done: Walk, per_shard: int) -> str:
    """What each source gave, as Markdown."""
    lines = ["| source | samples | shards | steps | drawn in its first epoch | different ones | in its second |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for name, size in plan.sizes.items():
        different = int(np.count_nonzero(done.seen[name, 0]))
        cells = (size, -(-size // per_shard), done.turns[name], done.taken[name, 0], different, done.taken[name, 1])
        lines.append(f"| {name} | " + " | ".join(f"{cell:,}" for cell in cells) + " |")
    return "\n".join(lines)


def resumes_table(rows: list[Resume]) -> str:
    """What going on cost, as Markdown."""
    lines = ["| a fresh process asks for step | seconds, best of 3 | CPU s | peak MB | same source and samples |"]
    lines += ["|---:|---:|---:|---:|---|"]
    for row in rows:
        same = "yes" if row.same else "NO"
        lines.append(f"| {row.step:,} | {row.seconds:.2f} | {row.cpu:.2f} | {row.megabytes:.0f} | {same} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=130_000_000)
    parser.add_argument("--shards", type=int, default=13_000)
    parser.add_argument("--batch", type=int, default=32, help="samples per step and rank")
    parser.add_argument("--write", type=Path, help="a Markdown file for the tables")
    args = parser.parse_args(argv)
    sizes = sizes_of(args.samples)
    per_shard = per_shard_of(sizes, args.shards)
    arguments = {"sizes": sizes, "batch_size": args.batch, "world_size": args.ranks, "seed": 42}
    plan = MixturePlan(**arguments)
    done = walk(plan)
    lost, repeated = faults(plan, done)
    looked_at = [0, done.steps // 2, done.steps - 1]
    wrong = disagreements(arguments, looked_at)
    asked = [1, done.steps // 2, done.steps - 1, 100 * done.steps]
    tries = [[resume(arguments, step, args.ranks - 1) for _ in range(TRIES)] for step in asked]
    rows = [min(row, key=lambda one: (one.same, one.seconds)) for row in tries]
    slow = [row for row in rows if row.seconds > SECONDS or row.megabytes > MEGABYTES or not row.same]
    spread = shards_per_batch(plan, looked_at, per_shard)
    good = not (lost or repeated or wrong or slow)
    what = f"{args.ranks:,} ranks, {len(sizes)} sources, {shards_of(sizes, per_shard):,} shards of up to {per_shard:,}"
    verdict = (
        f"{lost} lost, {repeated} repeated, {wrong} of {len(looked_at) * args.ranks:,} ranks with another source or "
        f"other samples, {len(slow)} of {len(rows)} resumes over {SECONDS:g} s or {MEGABYTES:g} MB or different: "
        f"{'all holds' if good else 'FAILED'}"
    )
    text = (
        f"{what} samples, {args.samples:,} samples, {args.batch} per rank and step: {done.steps:,} steps, that is "
        f"{done.steps * args.ranks:,} slices of ranks, walked through in {done.seconds:.0f} s.\n\n"
        f"{sources_table(plan, done, per_shard)}\n\n"
        "An epoch that ends within a step is filled up from the next; its draws are counted there and checked for "
        f"repeats too. A shard belongs to no rank: the {args.batch} samples of a rank and step come from {spread:.1f} "
        f"shards, read by offset.\n\n{resumes_table(rows)}\n\n{verdict}"
    )
    options = [f"--{name} {getattr(args, name)}" for name in ("ranks", "samples", "shards")]
    goal = f"none lost, none twice, one source a step, resume in at most {SECONDS:g} s and {MEGABYTES:g} MB"
    how = circumstances("scale.py", *options, modules=(np,))
    tell(f"# The plan at full scale\n\n{how}\nGoal: {goal}.\n\n{text}\n", args.write)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
