"""The progress of a run: steps, counts per source, the best score. Checkpoints keep it."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import NonNegativeInt

from lavis_chatbridge.datasets.loader import too_many_unreadable
from lavis_chatbridge.errors import DataError, TrainingError
from lavis_chatbridge.runners.settings import RunSettings
from lavis_chatbridge.runners.step import StepResult


@dataclass
class SourceCount:
    """Counts of one source, over all processes."""

    samples: NonNegativeInt = 0
    skipped: NonNegativeInt = 0
    tokens: NonNegativeInt = 0


@dataclass
class TrainState:
    """The progress of a run.

    Attributes:
        step: Finished steps.
        sources: Counts by source.
        nonfinite_steps: Steps that were skipped for a non-finite loss or gradient.
        best_metric: Highest ``agg_metrics`` of the first validation split; None before the first validation.
        best_step: The step of ``best_metric``.
        validated: The last step whose validation is finished.
    """

    step: NonNegativeInt = 0
    sources: dict[str, SourceCount] = field(default_factory=dict)
    nonfinite_steps: NonNegativeInt = 0
    best_metric: float | None = None
    best_step: NonNegativeInt | None = None
    validated: NonNegativeInt = 0

    def record(self, source: str, result: StepResult) -> None:
        """Count a finished step."""
        count = self.sources.setdefault(source, SourceCount())
        count.samples += result.samples
        count.skipped += result.skipped
        count.tokens += result.tokens
        self.step += 1
        self.nonfinite_steps += result.outcome == "nonfinite"

    def unreadable(self, source: str, run: RunSettings) -> str:
        """Error text if more than ``max_bad_share`` of a source is unreadable, else ""."""
        count = self.sources[source]
        return too_many_unreadable(source, count.skipped, count.samples + count.skipped, run.max_bad_share)

    def check(self, run: RunSettings) -> None:
        """Stop after too many non-finite steps.

        Raises:
            TrainingError: If there are ``max_nonfinite_steps`` of them.
        """
        if self.nonfinite_steps >= max(1, run.max_nonfinite_steps):
            raise TrainingError(
                f"{self.nonfinite_steps} steps had a non-finite loss or gradient (run.max_nonfinite_steps "
                f"{run.max_nonfinite_steps}): lower run.init_lr, use precision bf16 or fp32, or look at the samples "
                "that the log names"
            )

    def check_end(self) -> None:
        """Refuse to end a training that has learnt nothing.

        Raises:
            DataError: If none of its samples could be read, or none had a target.
            TrainingError: If no step was finite.
        """
        samples = sum(count.samples for count in self.sources.values())
        skipped = sum(count.skipped for count in self.sources.values())
        if self.step and not samples:
            raise DataError(
                f"nothing was trained on: none of {skipped} samples could be read. Mend them (chatbridge check-data "
                "--decode lists them), then train again with run.overwrite=true"
            )
        if self.step and not any(count.tokens for count in self.sources.values()):
            raise DataError(f"nothing was trained on: none of {samples} samples had a target token")
        if self.step and self.nonfinite_steps >= self.step:
            raise TrainingError(f"nothing was trained: none of {self.step} steps had a finite loss and gradient")

    def improves(self, metric: float) -> bool:
        """Whether ``metric`` is the best so far; if so it is recorded for the current step."""
        if self.best_metric is not None and not metric > self.best_metric:
            return False
        self.best_metric, self.best_step = metric, self.step
        return True
