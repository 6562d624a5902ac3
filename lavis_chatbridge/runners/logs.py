"""Metrics of a run: console, ``log.txt``, TensorBoard and Weights & Biases. Only rank 0 writes them."""

from __future__ import annotations

import datetime
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from lavis_chatbridge.errors import ConfigError, one_line
from lavis_chatbridge.files import append_lines, read_objects, write_text
from lavis_chatbridge.runners import distributed
from lavis_chatbridge.runners.checkpoints import TrainState
from lavis_chatbridge.runners.settings import RunSettings
from lavis_chatbridge.runners.step import StepResult

_log = logging.getLogger(__name__)
LOG = "log.txt"

Sink: TypeAlias = Callable[[str, Mapping[str, Any], int], None]
"""Writes the metrics of a split (``train``, ``val``) at a step."""


class Meter:
    """Means and rates since the last log line."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}
        self.tokens: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.waited = 0.0
        self.started = time.perf_counter()

    def record(self, dataset: str, result: StepResult, waited: float) -> None:
        """Count a step; ``waited`` is the time in seconds spent waiting for its data."""
        if result.outcome in ("ok", "overflow"):
            self.losses[dataset] = self.losses.get(dataset, 0.0) + result.loss * result.tokens
            self.tokens[dataset] += result.tokens
        self.counts.update(samples=result.samples, tokens=result.tokens, skipped=result.skipped)
        self.waited += waited

    def summary(self) -> dict[str, float]:
        """Mean loss per token, samples and target tokens per second, and the share of time spent waiting for data."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        stats: dict[str, float] = {}
        if total := self.tokens.total():
            stats["loss"] = sum(self.losses.values()) / total
        stats |= {f"loss_{name}": self.losses[name] / tokens for name, tokens in self.tokens.items()}
        stats["samples_per_second"] = self.counts["samples"] / seconds
        stats["tokens_per_second"] = self.counts["tokens"] / seconds
        stats["data_wait_share"] = min(1.0, self.waited / seconds)
        if torch.cuda.is_initialized():
            stats["memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
        return stats | {"skipped": self.counts["skipped"]}


class Reporter(ExitStack):
    """Sends metrics to console, log file, TensorBoard and W&B. Does nothing on ranks other than 0.

    ``steps`` is the length of the complete run, ``state`` its progress, which is not 0 at the start of a resumed run.

    Raises:
        ConfigError: If W&B cannot start.
    """

    def __init__(self, run: RunSettings, folder: Path, steps: int, state: TrainState) -> None:
        super().__init__()
        self.run, self.steps, self.state = run, steps, state
        self.meter = Meter()
        self._sinks: list[Sink] = []
        self._started, self._first = time.perf_counter(), state.step
        if distributed.is_main():
            drop_after(folder / LOG, state.step)
            self._sinks += [partial(write, folder / LOG), self._print]
            self._sinks += [self._tensorboard(folder / "tensorboard")] if run.tensorboard else []
            self._sinks += [self._wandb(folder / "wandb")] if run.wandb else []

    def step(self, dataset: str, result: StepResult, waited: float) -> None:
        """Count a step; write means and rates every ``log_every`` steps and at the end."""
        self.meter.record(dataset, result, waited)
        if self.state.step % self.run.log_every == 0 or self.state.step == self.steps:
            stats = {"lr": result.rate, "grad_norm": result.grad_norm, **self.meter.summary()}
            self.write("train", stats | {"nonfinite_steps": self.state.nonfinite_steps})
            self.meter = Meter()

    def write(self, split: str, stats: Mapping[str, Any]) -> None:
        """Write the metrics of a split at the current step; training continues without a log that fails."""
        for sink in list(self._sinks):
            try:
                sink(split, stats, self.state.step)
            except Exception as error:  # TensorBoard and W&B raise errors of any class
                _log.warning("a log failed, training continues without it: %s", one_line(error))
                self._sinks.remove(sink)

    def _print(self, split: str, stats: Mapping[str, Any], step: int) -> None:
        """Log a line on the console, with the estimated remaining time."""
        shown = (f"{k} {v}" if isinstance(v, int) else f"{k} {v:.4g}" for k, v in _numbers(stats).items())
        pace = (time.perf_counter() - self._started) / max(1, step - self._first)
        eta = datetime.timedelta(seconds=int(pace * (self.steps - step)))
        _log.info("%s step %d/%d %s eta %s", split, step, self.steps, " ".join(shown), eta)

    def _tensorboard(self, folder: Path) -> Sink:
        """TensorBoard events; a resumed run purges the events of steps that it repeats."""
        from torch.utils.tensorboard import SummaryWriter

        writer = self.enter_context(SummaryWriter(str(folder), purge_step=self._first + 1))

        def write_events(split: str, stats: Mapping[str, Any], step: int) -> None:
            for key, value in _numbers(stats).items():
                writer.add_scalar(f"{split}/{key}", value, step)

        return write_events

    def _wandb(self, folder: Path) -> Sink:
        """A Weights & Biases run; W&B's environment variables set project and mode."""
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE", "offline")
        try:
            run = wandb.init(dir=str(folder), config=self.run.model_dump(), mode=mode)
        except Exception as error:  # W&B raises errors of any class
            raise ConfigError(
                f"run.wandb: W&B cannot start (WANDB_MODE={mode}): {one_line(error)}; run `wandb login`, set "
                "WANDB_MODE=offline, or set run.wandb=false"
            ) from error
        self.callback(run.finish)
        return lambda split, stats, step: run.log({f"{split}/{k}": v for k, v in _numbers(stats).items()}, step=step)


def write(path: Path, split: str, stats: Mapping[str, Any], step: int) -> None:
    """Append metrics to LAVIS's ``log.txt``: one JSON object per line, keys prefixed with the split."""
    record = {f"{split}_{key}": value for key, value in {"step": step, **stats}.items()}
    append_lines(path, [json.dumps(record, default=str)])


def drop_after(path: Path, step: int) -> None:
    """Remove the lines of later steps (a line's first value) from a ``log.txt``: a resumed run repeats these steps."""
    if path.exists():
        records = (record for _, record in read_objects(path, skip_cut=True))
        kept = [json.dumps(record) + "\n" for record in records if next(iter(record.values())) <= step]
        write_text(path, "".join(kept))


def _numbers(stats: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in stats.items() if isinstance(value, (int, float))}
