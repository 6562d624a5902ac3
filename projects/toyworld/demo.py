"""The demo: build the embedded world, train both stages on it, score them, and write a report.

    torchrun --nproc-per-node 2 projects/toyworld/demo.py output/demo

``make demo`` runs it on up to two cores. Every part does the same as ``chatbridge train`` or ``chatbridge evaluate``
with a shipped configuration; all run in the same processes, so that the libraries are imported once.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from report import STARTED, summary, write_report

from lavis_chatbridge.cli import exit_status
from lavis_chatbridge.launchers import current_rank
from lavis_chatbridge.plugin.evaluate import parse_conditions
from lavis_chatbridge.plugin.launch import Runs

WORLD = Path("output/world")


@dataclass(frozen=True)
class Part:
    """A run of the demo.

    Attributes:
        title: Description for the console.
        seconds: Approximate duration on two free cores.
        configuration: A file of projects/chatbridge.
        folder: Folder of its results, below the demo's folder.
        model: The folder of an earlier part; start from its trained model.
        batch: Samples per training step over all processes, as in the configuration; 0: no training, only scores.
        conditions: Further evaluations, without some media or with other samples' media.
    """

    title: str
    seconds: int
    configuration: str
    folder: str
    model: str = ""
    batch: int = 0
    conditions: tuple[str, ...] = ()


WITHHELD = ("withheld:image,video", "withheld:audio", "withheld")
PARTS = (
    Part("render the world, and learn to describe it (stage 1)", 100, "align", "stage1", batch=32),
    Part("score descriptions", 25, "eval/world_captions", "stage1_scores", "stage1", conditions=("shuffled",)),
    Part("learn to answer about one medium (stage 2)", 130, "instruct", "stage2", "stage1", batch=24),
    Part("score answers about one medium", 15, "eval/world_answers", "stage2_scores", "stage2"),
    Part("score answers about two media at once", 25, "eval/world_joint", "joint", "stage2", conditions=WITHHELD),
)


def main(folder: Path) -> int:
    """Run all parts; returns the exit status."""
    place = current_rank(os.environ)
    first = place.rank == 0
    if first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / STARTED).touch()
    began = time.monotonic()
    with Runs() as runs:
        for number, part in enumerate(PARTS, 1):
            if first:
                left = sum(part.seconds for part in PARTS[number - 1 :])
                done = time.monotonic() - began
                print(f"\n[{number}/{len(PARTS)}] {part.title}: about {part.seconds} s", end="")
                print(f" ({done:.0f} s done, about {left:.0f} s left)", flush=True)
            _run(runs, part, folder, place.world_size)
    if first:
        report = write_report(folder, WORLD)
        print(f"\n{summary(report)}\n\n{report['seconds']:.0f} seconds in all\nreport: {folder / 'report.html'}")
    return 0


def _run(runs: Runs, part: Part, folder: Path, processes: int) -> None:
    options = [f"run.output_dir={folder / part.folder}"]
    if part.model:
        options.append(f"model.checkpoint={folder / part.model}/model.safetensors")
    if part.batch:
        options.append(f"run.batch_size_train={part.batch // processes}")
    path = f"projects/chatbridge/{part.configuration}.yaml"
    runs.run(path, options, evaluate=not part.batch)
    for condition in parse_conditions(part.conditions):
        runs.run(path, [*options, "run.test_splits=[test]", *condition.options], evaluate=True)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(Path(sys.argv[1]))))
