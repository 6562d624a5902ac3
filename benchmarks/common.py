"""Shared by the benchmarks: a training step, the circumstances of a measurement, printing a table to a file too.

``python benchmarks/NAME.py`` finds this module, since a script's own folder is first on the path.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from lavis_chatbridge.files import write_text


def circumstances(script: str, *options: str, modules: tuple[ModuleType, ...] = ()) -> str:
    """Date, cores, versions and command of a measurement: a line of Markdown."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = [f"Python {platform.python_version()}", *(f"{one.__name__} {one.__version__}" for one in modules)]
    threads = os.environ.get("OMP_NUM_THREADS")
    command = " ".join(
        [*([f"OMP_NUM_THREADS={threads}"] if threads else []), "python", f"benchmarks/{script}", *options]
    )
    return f"{datetime.date.today()}, {cores} CPU core(s), {', '.join(versions)}; `{command}`.\n"


def command_line(description: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark, with ``--write``."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--write", type=Path, metavar="FILE", help="a Markdown file for the table")
    return made


def write_table(text: str, file: Path | None) -> None:
    """Print a text, and write it to a file if one is given."""
    sys.stdout.write(text)
    if file is not None:
        write_text(file, text)


class Trainer:
    """The package's own step over a model of stage 1; each is the first of a run, of which ``settings`` are more."""

    def __init__(self, model: Any, device: str, **settings: Any) -> None:
        import torch

        from lavis_chatbridge.runners.settings import RunSettings
        from lavis_chatbridge.runners.step import TrainStep, learning_rate

        run = RunSettings(task="chatbridge_alignment", max_iters=100_000, **settings)
        self._rate, self.model = learning_rate(run, 0, 100_000), model
        self._step = TrainStep(model, self.loss, run, torch.device(device))

    @staticmethod
    def loss(model: Any, samples: Any) -> tuple[Any, Any]:
        """The mean loss, and its number of target tokens."""
        out = model(samples)
        return out["loss"], out["target_tokens"]

    def step(self, batch: dict[str, Any], *_: Any) -> Any:
        """One training step: a `StepResult`."""
        return self._step(0, self._rate, [batch])
