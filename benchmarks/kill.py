"""Kills a training of two processes at random moments, resumes it, and compares the final weights with an intact run's.

    python benchmarks/kill.py --runs 50 --write benchmarks/kill.md

Each run is the tiny ChatBridge on a small embedded world with a checkpoint after every step, so that many kills fall
inside a save. ``kill -9`` gives no process a chance to tidy up. The last line says how many runs ended with the weights
of the undisturbed one, bit for bit; the exit status is 0 only if all did.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from common import circumstances, tell

RANKS = 2
CONFIG = """
model: {{arch: chatbridge, model_type: tiny, checkpoint: null}}
datasets:
  chatbridge_world_caption: {{data_root: {folder}/world}}
run:
  task: chatbridge_alignment
  max_iters: {steps}
  batch_size_train: 4
  accum_grad_iters: 2
  num_workers: 1
  init_lr: 1.0e-3
  warmup_steps: 3
  feature_cache: {folder}/features
  save_every_steps: 1
  keep_last: 2
  valid_splits: [test]
  eval_every: 4
  log_every: 1
  resume: auto
  job_id: ""
"""


@dataclass
class Row:
    """One killed and resumed run."""

    seconds: float
    step: int
    in_save: bool
    identical: bool


def train(rank: int, port: int, config: str, output: str) -> None:
    """One process of a training, as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    import torch

    from lavis_chatbridge.plugin.launch import launch

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in a process that torchrun starts
    sys.stderr = open(f"{output}.log{rank}", "a", encoding="utf-8")  # noqa: SIM115  (until the process ends)
    launch(config, [f"run.output_dir={output}"], evaluate=False)


def start(context: ForkServerContext, config: Path, output: Path) -> list[Any]:
    """Start both processes of a training."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [context.Process(target=train, args=(rank, port, str(config), str(output))) for rank in range(RANKS)]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[Any], output: Path) -> None:
    """Wait for a training to end well."""
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        log = Path(f"{output}.log0").read_text(encoding="utf-8") if Path(f"{output}.log0").exists() else ""
        raise SystemExit(f"a training failed with {[p.exitcode for p in processes]}:\n{log[-2000:]}")


def digest(output: Path) -> str:
    """A digest of the final weights and of the optimiser."""
    from safetensors.torch import load_file

    last = sorted((output / "checkpoints").glob("step_*"))[-1]
    whole = hashlib.sha256()
    for name in ("model.safetensors", "optimizer.safetensors"):
        for key, tensor in sorted(load_file(last / name).items()):
            whole.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()


def newest_step(output: Path) -> int:
    """The newest checkpoint that the killed run left, 0 without one."""
    found = sorted((output / "checkpoints").glob("step_*"))
    return int(found[-1].name.rpartition("_")[2]) if found else 0


def kill_and_resume(
    context: ForkServerContext, config: Path, output: Path, steps: int, pace: float, wanted: str, rng: random.Random
) -> Row:
    """Kill a training at a random moment of a random step, resume it to the end, compare."""
    began = time.monotonic()
    processes = start(context, config, output)
    step = rng.randrange(steps)
    while newest_step(output) < step and any(process.is_alive() for process in processes):
        time.sleep(0.002)
    time.sleep(rng.uniform(0.0, 1.5 * pace))
    seconds = time.monotonic() - began
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()
    in_save = any((output / "checkpoints").glob(".*partial"))
    step = newest_step(output)
    finish(start(context, config, output), output)
    return Row(seconds, step, in_save, digest(output) == wanted)


def seconds_per_step(output: Path, steps: int) -> float:
    """How long a step of a running training takes, its save included."""
    while not newest_step(output):
        time.sleep(0.002)
    began = time.monotonic()
    while newest_step(output) < steps:
        time.sleep(0.002)
    return (time.monotonic() - began) / (steps - 1)


def table(rows: list[Row], steps: int) -> str:
    """The rows as Markdown."""
    lines = ["| run | killed after, s | newest checkpoint, step | inside a save | final weights identical |"]
    lines += ["|---|---|---|---|---|"]
    for number, row in enumerate(rows, start=1):
        found = f"{row.step} of {steps}"
        inside, same = "yes" if row.in_save else "no", "yes" if row.identical else "NO"
        lines.append(f"| {number} | {row.seconds:.2f} | {found} | {inside} | {same} |")
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a Markdown file for the table")
    args = parser.parse_args()
    root = str(Path(__file__).resolve().parent.parent)
    sys.path.insert(0, root)
    os.environ["PYTHONPATH"] = root  # for the server that imports everything once and forks all processes
    multiprocessing.set_forkserver_preload(["lavis_chatbridge", "lavis", "lavis_chatbridge.plugin.launch"])
    context = multiprocessing.get_context("forkserver")
    folder = Path(tempfile.mkdtemp(prefix="chatbridge-kill-"))
    try:
        rows = measure(context, folder, args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = table(rows, args.steps)
    inside = sum(row.in_save for row in rows)
    verdict = f"{sum(row.identical for row in rows)} of {len(rows)} identical ({inside} kills inside a save)"
    options = [f"--{name} {getattr(args, name)}" for name in ("runs", "steps", "seed")]
    how = circumstances("kill.py", *options, modules=(torch,))
    tell(f"# Killed and resumed\n\n{how}\n{text}\n\n{verdict}\n", args.write)
    return 0 if all(row.identical for row in rows) else 1


def measure(context: ForkServerContext, folder: Path, args: argparse.Namespace) -> list[Row]:
    """The undisturbed run, then every killed one."""
    from lavis_chatbridge.toyworld.build import Sizes, build_world

    build_world(folder / "world", Sizes(24, 12, 12, 4, 2, 2))
    config = folder / "run.yaml"
    config.write_text(CONFIG.format(folder=folder, steps=args.steps), encoding="utf-8")
    finish(start(context, config, folder / "first"), folder / "first")  # fills the feature cache
    processes = start(context, config, folder / "whole")
    pace = seconds_per_step(folder / "whole", args.steps)
    finish(processes, folder / "whole")
    wanted = digest(folder / "whole")
    rng, rows = random.Random(args.seed), []
    for number in range(args.runs):
        output = folder / f"run{number}"
        rows.append(kill_and_resume(context, config, output, args.steps, pace, wanted, rng))
        shutil.rmtree(output)
        print(f"run {number + 1}: {rows[-1]}", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
