"""Metrics of a run: console, ``log.txt``, TensorBoard and Weights & Biases. Only rank 0 writes them."""

from __future__ import annotations

import datetime
import json
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lavis_chatbridge.errors import ConfigError, MissingExtraError, TrainingError
from lavis_chatbridge.files import append_lines, write_text
from lavis_chatbridge.runners import distributed
from lavis_chatbridge.runners.checkpoints import one_line
from lavis_chatbridge.runners.settings import RunSettings
from lavis_chatbridge.runners.step import StepResult, TrainState

_log = logging.getLogger(__name__)
LOG = "log.txt"


class Meter:
    """Means and rates since the last line of the log."""

    def __init__(self) -> None:
        self.losses: defaultdict[str, float] = defaultdict(float)
        self.tokens: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.waited = 0.0
        self.started = time.perf_counter()

    def record(self, source: str, result: StepResult, waited: float) -> None:
        """Count a step; ``waited`` is the time in seconds that its data took to arrive."""
        if result.outcome in ("ok", "overflow"):
            self.losses[source] += result.loss * result.tokens
            self.tokens[source] += result.tokens
        self.counts.update(samples=result.samples, tokens=result.tokens, skipped=result.skipped)
        self.waited += waited

    def summary(self) -> dict[str, float]:
        """Mean losses per token, samples and target tokens per second, the share of time spent waiting for data."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        stats: dict[str, float] = {}
        if total := self.tokens.total():
            stats["loss"] = sum(self.losses.values()) / total
        stats |= {f"loss_{name}": self.losses[name] / tokens for name, tokens in self.tokens.items() if tokens}
        stats["samples_per_second"] = self.counts["samples"] / seconds
        stats["tokens_per_second"] = self.counts["tokens"] / seconds
        stats["data_wait_share"] = min(1.0, self.waited / seconds)
        stats["memory_mb"] = memory_mb()
        if self.counts["skipped"]:
            stats["skipped"] = self.counts["skipped"]
        return stats


class Sink(ABC):
    """A destination of metrics."""

    @abstractmethod
    def write(self, split: str, stats: Mapping[str, Any], step: int) -> None:
        """Write the metrics of a split (``train``, ``val``) at a step; all but the log file write only numbers."""

    def close(self) -> None:  # noqa: B027
        """Flush what is held open."""


class LogFile(Sink):
    """LAVIS's ``log.txt``: one JSON object per line, keys prefixed with the split."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def drop_after(self, state: TrainState, validated: bool) -> None:
        """Drop the lines of later steps than a resumed run's, and of a validation that it repeats."""
        if self.path.exists():
            last = {True: state.step, False: state.step if validated else state.step - 1}
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
            kept = [line for line in lines if _step_of(line) <= last[line.startswith('{"train_')]]
            write_text(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, split: str, stats: Mapping[str, Any], step: int) -> None:
        self.append({f"{split}_{key}": value for key, value in {"step": step, **stats}.items()})

    def append(self, record: Mapping[str, Any]) -> None:
        """Append any object as a line."""
        append_lines(self.path, [json.dumps(record, default=str)])


class TensorBoard(Sink):
    """TensorBoard events in a folder; a resumed run hides the events of steps that it repeats."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "tensorboard", "run.tensorboard") from error
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, split: str, stats: Mapping[str, Any], step: int) -> None:
        for key, value in _numbers(stats).items():
            self.writer.add_scalar(f"{split}/{key}", value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases(Sink):
    """A Weights & Biases run, on disk only unless ``wandb_mode`` is ``online``."""

    def __init__(self, run: RunSettings, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError("wandb", "wandb", "run.wandb") from error
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.run = wandb.init(project=run.wandb_project, mode=run.wandb_mode, dir=str(folder), config=dict(config))
        except Exception as error:  # wandb raises errors of many classes: server, settings, disk
            raise ConfigError(
                f"run.wandb: Weights & Biases cannot start a run ({one_line(error)}): log in (wandb login), or set "
                "run.wandb_mode=offline or run.wandb=false"
            ) from error

    def write(self, split: str, stats: Mapping[str, Any], step: int) -> None:
        self.run.log({f"{split}/{key}": value for key, value in _numbers(stats).items()}, step=step)

    def close(self) -> None:
        self.run.finish()


class Console(Sink):
    """A line per split, with the time that the remaining steps will take."""

    def __init__(self, steps: int, done: int) -> None:
        self.steps, self.first, self.started = steps, done, time.perf_counter()

    def write(self, split: str, stats: Mapping[str, Any], step: int) -> None:
        shown = (f"{k} {v}" if isinstance(v, int) else f"{k} {v:.4g}" for k, v in _numbers(stats).items())
        pace = (time.perf_counter() - self.started) / max(1, step - self.first)
        eta = datetime.timedelta(seconds=int(pace * (self.steps - step)))
        _log.info("%s step %d/%d %s eta %s", split, step, self.steps, " ".join(shown), eta)


class Reporter:
    """Sends metrics to console, log file, TensorBoard and W&B; on ranks other than 0 to none of them.

    Args:
        run: Which of them to use.
        folder: The run's folder.
        steps: Steps of the whole run.
        state: The progress that the run starts or resumes with.
        validated: Whether the validation due at that step is finished.
        config: The configuration, which is written first.
    """

    def __init__(
        self, run: RunSettings, folder: Path, steps: int, state: TrainState, validated: bool, config: Mapping[str, Any]
    ) -> None:
        self.log_every, self.steps, self.state = run.log_every, steps, state
        self.meter = Meter()
        self.sinks: list[Sink] = []
        if not distributed.is_main():
            return
        log = LogFile(folder / LOG)
        try:
            log.drop_after(state, validated)
            log.append({"config": config, "from_step": state.step})
        except OSError as error:
            raise TrainingError(f"cannot write {log.path}: {error.strerror or error}") from error
        self.sinks = [log, Console(steps, state.step)]
        self.sinks += [TensorBoard(folder / "tensorboard", state.step)] if run.tensorboard else []
        self.sinks += [WeightsAndBiases(run, folder / "wandb", config)] if run.wandb else []

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_fault: object) -> None:
        for sink in self.sinks:
            sink.close()

    def step(self, source: str, result: StepResult, waited: float) -> None:
        """Count a step; every ``log_every`` steps, and at the end, write means and rates."""
        self.meter.record(source, result, waited)
        if self.state.step % self.log_every == 0 or self.state.step == self.steps:
            stats = {"lr": result.rate, "grad_norm": result.grad_norm, **self.meter.summary()}
            self.write("train", stats | {"nonfinite_steps": self.state.nonfinite_steps})
            self.meter = Meter()

    def write(self, split: str, stats: Mapping[str, Any]) -> None:
        """Write the metrics of a split at the current step. A log that fails is closed; the training continues."""
        for sink in list(self.sinks):
            try:
                sink.write(split, stats, self.state.step)
            except Exception as error:  # TensorBoard and W&B raise errors of any class
                _log.warning("%s failed, training continues without it: %s", type(sink).__name__, one_line(error))
                self.sinks.remove(sink)


def memory_mb() -> float:
    """Peak memory so far in MiB: of the CUDA device if one is used, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _numbers(stats: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in stats.items() if isinstance(value, (int, float))}


def _step_of(line: str) -> int:
    """The step of a line of the log; 0 for the configuration and for foreign lines."""
    try:
        key, step = next(iter(json.loads(line).items()))
    except (ValueError, AttributeError, StopIteration):
        return 0
    return step if key.endswith("_step") and isinstance(step, int) else 0
