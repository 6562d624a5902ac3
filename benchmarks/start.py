"""Seconds until ``chatbridge ask`` has answered, and the plugin's share of ``import torch``.

    python benchmarks/start.py --rounds 5 --write benchmarks/start.md

Every row is the median of warm starts on one core. The baseline is the import of torch and transformers' LLaMA alone.
"plain" is the same question without the quick start (`lavis_chatbridge/plugin/quick.py`). The other commands are timed
until they have printed something, and until they are ready.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from common import circumstances, command_line, write_table

import lavis_chatbridge

LIMIT_MS = 3.0
PICTURE = Path(lavis_chatbridge.__file__).parent / "assets" / "examples" / "picture.jpg"
ASK = ["-m", "lavis_chatbridge.cli", "ask", "what is it?", "--image", str(PICTURE), "--device", "cpu"]
PLAIN = "import sys, lavis; from lavis_chatbridge import cli; sys.exit(cli.main(sys.argv[1:]))"
ROWS = {
    "torch and transformers' LLaMA": ["-c", "import torch; from transformers import LlamaForCausalLM, AutoTokenizer"],
    "ask, plain": ["-c", PLAIN, *ASK[2:]],
    "ask": ASK,
}
COMMANDS = {"chat": "Ask something", "web --port 0": "open http", "serve --port 0": "listening on"}
HOOK = """
import time
import torch
from importlib.metadata import entry_points
entry = next(iter(entry_points(group="torch.backends", name="lavis_chatbridge")))
start = time.perf_counter()
entry.load()()
print((time.perf_counter() - start) * 1e3)
"""


def seconds(words: list[str], rounds: int) -> tuple[float, float]:
    """Median wall-clock and CPU seconds of a process on one core; other work of the machine changes the first only."""
    taken = []
    for _ in range(rounds + 1):
        begin, before = time.perf_counter(), os.times()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        after = os.times()
        cpu = after.children_user - before.children_user + after.children_system - before.children_system
        taken.append((time.perf_counter() - begin, cpu))
    wall, cpu = zip(*taken[1:], strict=True)
    return statistics.median(wall), statistics.median(cpu)


def shown_after(command: str, ready: str) -> tuple[float, float]:
    """Seconds until a command has printed its first line, and the line with ``ready``."""
    words = [sys.executable, "-m", "lavis_chatbridge.cli", *command.split(), "--device", "cpu"]
    begin, first = time.perf_counter(), 0.0
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            taken = time.perf_counter() - begin
            first = first or taken
            if ready.encode() in line:
                break
        process.kill()
    return first, taken


def hook_cost() -> float:
    """Milliseconds that the plugin adds to ``import torch``: loading and calling its entry point, as torch does."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", HOOK], env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


def main(words: list[str] | None = None) -> None:
    """Measure, print, and write if asked to."""
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measured starts of each row")
    arguments = parser.parse_args(words)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["OMP_NUM_THREADS"] = "1"
    taken = {name: seconds(row, arguments.rounds) for name, row in ROWS.items()}
    base = next(iter(taken.values()))[1]
    lines = ["# Start", "", circumstances("start.py", f"--rounds {arguments.rounds}", modules=(torch, transformers))]
    lines += ["| process | s | CPU s | of the baseline's CPU s |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {wall:.2f} | {cpu:.2f} | {cpu / base:.2f} |" for name, (wall, cpu) in taken.items()]
    for command, ready in COMMANDS.items():
        first, last = (min(each) for each in zip(*(shown_after(command, ready) for _ in range(2)), strict=True))
        lines.append(f"| {command}: first line, ready | {first:.2f}, {last:.2f} | | |")
    added = min(hook_cost() for _ in range(3))
    lines += ["", f"The plugin adds {added:.1f} ms to `import torch` (limit {LIMIT_MS:g} ms)."]
    write_table("\n".join(lines) + "\n", arguments.write)


if __name__ == "__main__":
    main()
