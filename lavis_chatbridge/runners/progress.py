"""What a run tells while it runs: a bar or lines for people, ``log.txt``, TensorBoard and Weights & Biases for later.

Only the main process has these; the numbers are already those of all processes.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

from lavis_chatbridge.errors import ConfigError, MissingExtraError, TrainingError
from lavis_chatbridge.files import append_lines, write_text
from lavis_chatbridge.runners import checkpoints
from lavis_chatbridge.runners.settings import RunSettings
from lavis_chatbridge.runners.state import TrainState
from lavis_chatbridge.runners.step import StepResult

_log = logging.getLogger(__name__)
LOG = "log.txt"
_MEGABYTE = 1024**2


@dataclass
class _Sum:
    """Loss and tokens of one source since the last line."""

    loss: float = 0.0
    tokens: int = 0


@dataclass
class Meter:
    """Rates and means since the last line of the log."""

    sources: dict[str, _Sum] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    steps: int = 0
    waited: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def record(self, source: str, result: StepResult, waited: float) -> None:
        """Count a step; ``waited`` is how long its data took to arrive, in seconds."""
        if result.outcome in ("ok", "overflow"):
            part = self.sources.setdefault(source, _Sum())
            part.loss += result.loss * result.tokens
            part.tokens += result.tokens
        self.samples += result.samples
        self.tokens += result.tokens
        self.skipped += result.skipped
        self.steps += 1
        self.waited += waited

    def summary(self) -> dict[str, float]:
        """Mean losses per token, samples and target tokens per second, the share of time spent waiting for data."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        tokens = sum(part.tokens for part in self.sources.values())
        stats: dict[str, float] = {}
        if tokens:
            stats["loss"] = sum(part.loss for part in self.sources.values()) / tokens
        stats |= {f"loss_{name}": part.loss / part.tokens for name, part in self.sources.items() if part.tokens}
        stats["samples_per_second"] = self.samples / seconds
        stats["tokens_per_second"] = self.tokens / seconds
        stats["data_wait_share"] = min(1.0, self.waited / seconds)
        stats["memory_mb"] = memory_mb()
        if self.skipped:
            stats["skipped"] = self.skipped
        return stats


class Sink(Protocol):
    """Somewhere that numbers go."""

    def write(self, split: str, stats: Mapping[str, Any], step: int) -> None:
        """Take the numbers of a split (``train``, ``val``) at a step."""

    def close(self) -> None:
        """Finish."""


class LogFile:
    """LAVIS's ``log.txt``: one JSON object a line, keys prefixed with the split.

    Args:
        path: The file.
        step: Where the run goes on; lines of later steps, from a run that was cut off, are dropped.
        validated: Whether that step's validation is done; the lines of one that was cut off are dropped too.

    Raises:
        TrainingError: If it cannot be read or written.
    """

    def __init__(self, path: Path, step: int = 0, validated: bool = True) -> None:
        self.path = path
        if not path.exists():
            return
        before = {True: step, False: step if validated else step - 1}
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # the last one was cut off
            kept = [line for line in lines if _step_of(line) <= before[line.startswith('{"train_')]]
            write_text(path, "".join(f"{line}\n" for line in kept))
        except OSError as error:
            raise TrainingError(f"cannot write {path}: {checkpoints.cause(error)}") from error

    def write(self, split: str, stats: Mapping[str, Any], step: int) -> None:
        """Append a line."""
        append_stats(self.path, split, stats, step)

    def close(self) -> None:
        """Nothing is held open."""


def append_stats(path: Path, split: str, stats: Mapping[str, Any], step: int) -> None:
    """Append a split's numbers to a log as `LogFile` does, keeping all that it holds."""
    append_record(path, {f"{split}_{key}": value for key, value in {"step": step, **stats}.items()})


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append any object to a log as a line.

    Raises:
        TrainingError: If it cannot be written.
    """
    try:
        append_lines(path, [json.dumps(record, default=str)])
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {checkpoints.cause(error)}") from error


class TensorBoard:
    """TensorBoard events in a folder; a resumed run hides the events of steps that it takes again."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "tensorboard", "run.tensorboard") from error
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, split: str, stats: Mapping[str, Any], step: int) -> None:
        """Write the numbers among ``stats``."""
        for key, value in stats.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(f"{split}/{key}", value, step)

    def close(self) -> None:
        """Flush the events."""
        self.writer.close()


class WeightsAndBiases:
    """A Weights & Biases run, on disk only unless ``wandb_mode`` is ``online``."""

    def __init__(self, run: RunSettings, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError("wandb", "wandb", "run.wandb") from error
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.run = wandb.init(project=run.wandb_project, mode=run.wandb_mode, dir=str(folder), config=dict(config))
        except Exception as error:  # of its server, its settings or the disk, of many classes
            cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            remedy = "log in (wandb login), or set run.wandb_mode=offline or run.wandb=false"
            raise ConfigError(f"run.wandb: Weights & Biases does not begin a run ({cause}): {remedy}") from error

    def write(self, split: str, stats: Mapping[str, Any], step: int) -> None:
        """Write the numbers among ``stats``."""
        numbers = {f"{split}/{key}": value for key, value in stats.items() if isinstance(value, (int, float))}
        self.run.log(numbers, step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


class Console:
    """A bar on a terminal, plain lines elsewhere.

    Args:
        steps: Steps of the whole run.
        done: Steps that are done already.
        stream: Where to write; stderr by default.
    """

    def __init__(self, steps: int, done: int, stream: TextIO | None = None) -> None:
        self.steps, self.first = steps, done
        self.started = time.perf_counter()
        self.bar = None
        stream = stream or sys.stderr
        if stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, file=stream)

    def advance(self, source: str, result: StepResult) -> None:
        """Move the bar by a step."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {result.loss:.4f} lr {result.rate:.2e} {source}", refresh=False)
            self.bar.update()

    def write(self, split: str, stats: Mapping[str, Any], step: int) -> None:
        """A line of a split's numbers; the bar shows the training's itself."""
        if self.bar is None or split != "train":
            numbers = " ".join(
                f"{key} {_short(value)}" for key, value in stats.items() if isinstance(value, (int, float))
            )
            self.say(f"{split} step {step}/{self.steps} {numbers} eta {self.eta(step)}")

    def say(self, line: str) -> None:
        """A line that does not break the bar."""
        if self.bar is None:
            _log.info("%s", line)
        else:
            self.bar.write(line)

    def eta(self, step: int) -> str:
        """The time that is left at the rate so far, as hours:minutes:seconds."""
        pace = (time.perf_counter() - self.started) / max(1, step - self.first)
        return str(datetime.timedelta(seconds=int(pace * (self.steps - step))))

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()


class Reporter:
    """All that a run tells, on the main process; on the others it takes everything and says nothing.

    Args:
        run: What is wanted.
        folder: The run's folder.
        steps: Steps of the whole run.
        done: Steps that are done already.
        config: The configuration, written first.
        active: Whether this is the main process.
        validated: Whether the last of those steps has been validated, if it is to be.
    """

    def __init__(
        self,
        run: RunSettings,
        folder: Path,
        steps: int,
        done: int,
        config: Mapping[str, Any],
        active: bool,
        validated: bool = True,
    ) -> None:
        self.log_every, self.steps = run.log_every, steps
        self.meter = Meter()
        self._failed: set[int] = set()
        self.console = Console(steps, done) if active else None
        self.sinks: list[Sink] = []
        if active:
            log = LogFile(folder / LOG, done, validated)
            append_record(log.path, {"config": config, "from_step": done})
            self.sinks = [log, *([TensorBoard(folder / "tensorboard", done)] if run.tensorboard else [])]
            self.sinks += [WeightsAndBiases(run, folder / "wandb", config)] if run.wandb else []

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_fault: object) -> None:
        for sink in [*self.sinks, *([self.console] if self.console else [])]:
            self._unless_it_fails(sink, sink.close)

    def step(self, source: str, result: StepResult, waited: float, state: TrainState) -> None:
        """A step was taken; every ``log_every`` of them, and at the end, the means and rates are written."""
        self.meter.record(source, result, waited)
        if self.console is not None:
            self.console.advance(source, result)
        if state.step % self.log_every == 0 or state.step == self.steps:
            stats = {"lr": result.rate, "grad_norm": result.grad_norm, **self.meter.summary()}
            self.write("train", stats | {"nonfinite_steps": state.nonfinite_steps}, state.step)
            self.meter = Meter()

    def write(self, split: str, stats: Mapping[str, Any], step: int) -> None:
        """The numbers of a split at a step. A training outlives a log that cannot take them, and says so once."""
        for sink in [*self.sinks, *([self.console] if self.console else [])]:
            self._unless_it_fails(sink, lambda sink=sink: sink.write(split, stats, step))  # type: ignore[misc]

    def _unless_it_fails(self, sink: Sink, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # TensorBoard and W&B raise whatever they like
            if id(sink) not in self._failed:
                cause = " ".join(str(error).split())[:300]
                _log.warning("%s does not take numbers, training goes on: %s", type(sink).__name__, cause)
            self._failed.add(id(sink))

    def say(self, line: str) -> None:
        """A line for people."""
        if self.console is not None:
            self.console.say(line)


def memory_mb() -> float:
    """Peak memory so far: of the CUDA device if one is used, else of this process; in MiB."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / _MEGABYTE
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MEGABYTE if sys.platform == "darwin" else peak / 1024


def _step_of(line: str) -> int:
    """The step that a line of the log speaks of; 0 for the configuration and for what is no line of ours."""
    try:
        record = json.loads(line)
    except ValueError:
        return 0
    key, step = next(iter(record.items()), ("", 0)) if isinstance(record, dict) else ("", 0)
    return step if key.endswith("_step") and isinstance(step, int) else 0


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
