"""How far a run has come: the step, what each source gave, what went wrong, the best score; kept in checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lavis_chatbridge.datasets.loader import too_many_unreadable
from lavis_chatbridge.errors import DataError, TrainingError
from lavis_chatbridge.runners.settings import RunSettings
from lavis_chatbridge.runners.step import StepResult


@dataclass
class SourceCount:
    """What one source gave, over all processes."""

    samples: int = 0
    skipped: int = 0
    tokens: int = 0
    steps: int = 0


@dataclass
class TrainState:
    """How far a run has come.

    Attributes:
        step: Steps that are done.
        sources: Per source, what it gave.
        nonfinite_steps: Steps that were skipped for a non-finite loss or gradient.
        best_metric: Highest ``agg_metrics`` of the first validation split; None before the first validation.
        best_step: The step of it.
        validated: The last step whose validation is done.
    """

    step: int = 0
    sources: dict[str, SourceCount] = field(default_factory=dict)
    nonfinite_steps: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    validated: int = 0

    def record(self, source: str, result: StepResult) -> None:
        """Count a step that was taken."""
        count = self.sources.setdefault(source, SourceCount())
        count.samples += result.samples
        count.skipped += result.skipped
        count.tokens += result.tokens
        count.steps += 1
        self.step += 1
        self.nonfinite_steps += result.outcome == "nonfinite"

    def unreadable(self, source: str, run: RunSettings) -> str:
        """Why a source lacks too many samples to go on, over all processes; an empty text if it does not."""
        count = self.sources[source]
        return too_many_unreadable(source, count.skipped, count.samples + count.skipped, run.max_bad_share)

    def check(self, run: RunSettings) -> None:
        """Stop a run that cannot end well.

        Raises:
            TrainingError: If too many steps were not finite.
        """
        if self.nonfinite_steps >= max(1, run.max_nonfinite_steps):
            raise TrainingError(
                f"{self.nonfinite_steps} steps had a non-finite loss or gradient (run.max_nonfinite_steps "
                f"{run.max_nonfinite_steps}): lower run.init_lr, use precision bf16 or fp32, or look at the samples "
                "that the log names"
            )

    def check_end(self) -> None:
        """Fail a training that has learnt nothing although it came to its end.

        Raises:
            DataError: If none of its samples could be read, or none had a target.
            TrainingError: If no step was finite.
        """
        samples, skipped, tokens, steps = (
            sum(getattr(count, name) for count in self.sources.values())
            for name in ("samples", "skipped", "tokens", "steps")
        )
        if steps and not samples:
            raise DataError(
                f"nothing was trained on: none of {skipped} samples could be read. Mend them (chatbridge check-data "
                "--decode lists them), then start anew (run.anew=true)"
            )
        if steps and not tokens:
            raise DataError(f"nothing was trained on: none of {samples} samples had a target that was left to learn")
        if steps and self.nonfinite_steps >= steps:
            raise TrainingError(f"nothing was trained: none of {steps} steps had a finite loss and gradient")

    def validation(self) -> dict[str, Any]:
        """What a validation changes of the progress."""
        return {"best_metric": self.best_metric, "best_step": self.best_step, "validated": self.validated}

    def take_validation(self, found: Mapping[str, Any]) -> None:
        """Take over what `validation` gave, if it was of this step."""
        if found.get("validated") == self.step:
            self.best_metric, self.best_step = found["best_metric"], found["best_step"]
            self.validated = self.step

    def improves(self, metric: float) -> bool:
        """Whether ``metric`` is the best so far; if so it is recorded for the current step."""
        if self.best_metric is not None and not metric > self.best_metric:
            return False
        self.best_metric, self.best_step = metric, self.step
        return True

    def to_dict(self) -> dict[str, Any]:
        """As JSON's types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """From what `to_dict` gave."""
        sources = {name: SourceCount(**count) for name, count in values["sources"].items()}
        whole = [
            values["step"],
            values["nonfinite_steps"],
            values.get("validated", 0),
            *(n for one in values["sources"].values() for n in one.values()),
        ]
        if not all(isinstance(number, int) and number >= 0 for number in whole):
            raise ValueError(f"progress is counted in whole numbers, found {str(whole)[:100]}")
        return cls(**{**values, "sources": sources})
