"""Kills a training of two processes at random moments, resumes it, and compares the final weights with an intact run's.

    python benchmarks/kill.py --runs 20 --write benchmarks/kill.md

Each run is the tiny ChatBridge on a small embedded world with a checkpoint after every step, so that some kills hit a
save. The exit status is 0 only if every run ended with the weights and the optimiser of the intact one, bit for bit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from common import circumstances, command_line, write_table

RANKS = 2
CONFIG = """
model: {{arch: chatbridge, model_type: tiny, checkpoint: null}}
datasets: {{chatbridge_world_caption: {{data_root: {folder}/world}}}}
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
  valid_splits: [test]
  eval_every: 4
  log_every: 1
  resume: auto
  job_id: ""
"""


def train(rank: int, port: int, config: str, output: str) -> None:
    """One process of a training, as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    import torch

    from lavis_chatbridge.plugin.launch import Runs

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in a process that torchrun starts
    sys.stderr = open(f"{output}.log{rank}", "a", encoding="utf-8")  # noqa: SIM115  (until the process ends)
    with Runs() as runs:
        runs.run(config, [f"run.output_dir={output}"], evaluate=False)


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
    """Wait for a training to succeed."""
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"a training failed:\n{Path(f'{output}.log0').read_text(encoding='utf-8')[-2000:]}")


def final(output: Path) -> dict[str, bytes]:
    """The bytes of the last weights and optimiser, and of the file that a user takes."""
    last = output / "checkpoints" / f"step_{newest_step(output):08d}"
    files = (last / "model.safetensors", last / "optimizer.safetensors", output / "model.safetensors")
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def newest_step(output: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return max((int(path.name.rpartition("_")[2]) for path in (output / "checkpoints").glob("step_*")), default=0)


def kill_and_resume(
    context: ForkServerContext, config: Path, output: Path, step: int, delay: float, wanted: dict[str, bytes]
) -> tuple[float, int, bool, bool]:
    """Kill a training ``delay`` seconds after ``step``, resume it to the end, and compare.

    Returns:
        Seconds until the kill, the newest checkpoint's step, whether a save was interrupted, whether the end is equal.
    """
    began = time.monotonic()
    processes = start(context, config, output)
    while newest_step(output) < step and any(process.is_alive() for process in processes):
        time.sleep(0.002)
    time.sleep(delay)
    seconds = time.monotonic() - began
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    in_save, found = any((output / "checkpoints").glob(".*partial")), newest_step(output)
    finish(start(context, config, output), output)
    return seconds, found, in_save, final(output) == wanted


def measure(folder: Path, args: argparse.Namespace) -> list[tuple[float, int, bool, bool]]:
    """The intact run, then every killed one."""
    from lavis_chatbridge.toyworld.build import Sizes, build_world

    context = multiprocessing.get_context("forkserver")
    build_world(folder / "world", Sizes(24, 12, 12, 4, 2, 2))
    config = folder / "run.yaml"
    config.write_text(CONFIG.format(folder=folder, steps=args.steps), encoding="utf-8")
    finish(start(context, config, folder / "first"), folder / "first")  # fills the feature cache
    began = time.monotonic()
    finish(start(context, config, folder / "intact"), folder / "intact")
    pace = (time.monotonic() - began) / args.steps
    wanted, rng, rows = final(folder / "intact"), random.Random(args.seed), []
    for number in range(args.runs):
        output = folder / f"run{number}"
        step, delay = rng.randrange(args.steps), rng.uniform(0.0, 1.5 * pace)
        rows.append(kill_and_resume(context, config, output, step, delay, wanted))
        shutil.rmtree(output)
        print(f"run {number + 1}: {rows[-1]}", flush=True)
    return rows


def main() -> int:
    """Run the benchmark."""
    import torch

    parser = command_line(__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    root = str(Path(__file__).resolve().parent.parent)
    sys.path.insert(0, root)
    os.environ["PYTHONPATH"] = root  # for the server that imports everything once and forks all processes
    multiprocessing.set_forkserver_preload(["lavis_chatbridge", "lavis", "lavis_chatbridge.plugin.launch"])
    with tempfile.TemporaryDirectory(prefix="chatbridge-kill-", ignore_cleanup_errors=True) as folder:
        rows = measure(Path(folder), args)
    options = [f"--{name} {getattr(args, name)}" for name in ("runs", "steps", "seed")]
    lines = ["# Killed and resumed", "", circumstances("kill.py", *options, modules=(torch,))]
    lines += [f"{RANKS} processes, {args.steps} steps, a checkpoint after each.", ""]
    lines += ["| run | killed after, s | newest checkpoint | inside a save | identical |", "|---|---:|---:|---|---|"]
    for number, (seconds, step, in_save, same) in enumerate(rows, start=1):
        inside = "yes" if in_save else "no"
        lines.append(f"| {number} | {seconds:.2f} | step {step} | {inside} | {'yes' if same else 'NO'} |")
    right, inside = sum(row[3] for row in rows), sum(row[2] for row in rows)
    lines += ["", f"{right} of {len(rows)} identical ({inside} kills inside a save).", ""]
    write_table("\n".join(lines), args.write)
    return 0 if right == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
