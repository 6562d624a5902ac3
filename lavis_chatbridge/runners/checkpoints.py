"""Checkpoints: written atomically; when resuming, read, checked against the run, then loaded.

A checkpoint is a folder ``step_NNNNNNNN`` of

- ``model.safetensors``: the bridge, under the model's own parameter names;
- ``optimizer.safetensors``: AdamW's tensors, as ``PARAMETER|STATE``;
- ``state.json``: progress, position in the data, loss scaler, hashes of the frozen parts.

No pickle is read or written. Frozen weights are not saved; their hashes ensure that a run resumes with the same ones.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pydantic import NonNegativeInt
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lavis_chatbridge.config import Settings, parse
from lavis_chatbridge.datasets.plan import MixturePlan
from lavis_chatbridge.errors import CheckpointError, TrainingError, one_line
from lavis_chatbridge.files import hash_of, sync, write_json
from lavis_chatbridge.models import lora, state_dicts
from lavis_chatbridge.runners.step import StepResult, trainable

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_ADAMW = ("step", "exp_avg", "exp_avg_sq")
_PROBES = 1024
"""Number of evenly spaced values of a frozen tensor in its hash; hashing all 26 GB would take half a minute."""


@dataclass
class Count:
    """Numbers of samples and target tokens of one data set, over all processes."""

    samples: NonNegativeInt = 0
    skipped: NonNegativeInt = 0
    tokens: NonNegativeInt = 0


@dataclass
class TrainState:
    """The progress of a run."""

    step: NonNegativeInt = 0  # finished steps
    counts: dict[str, Count] = field(default_factory=dict)  # by data set
    nonfinite_steps: NonNegativeInt = 0  # steps skipped because of a non-finite loss or gradient
    best_metric: float | None = None  # highest `agg_metrics` of the first validation split
    best_step: NonNegativeInt | None = None  # the step of `best_metric`
    validated: NonNegativeInt = 0  # the last step whose validation is finished

    def record(self, dataset: str, result: StepResult) -> None:
        """Count a finished step."""
        count = self.counts.setdefault(dataset, Count())
        count.samples += result.samples
        count.skipped += result.skipped
        count.tokens += result.tokens
        self.step += 1
        self.nonfinite_steps += result.outcome == "nonfinite"

    def improves(self, metric: float) -> bool:
        """Return whether ``metric`` is the best so far, and if so, record it for the current step."""
        if self.best_metric is not None and not metric > self.best_metric:
            return False
        self.best_metric, self.best_step = metric, self.step
        return True


Position: TypeAlias = tuple[NonNegativeInt, dict[str, NonNegativeInt]]
"""A step, and each data set's number of samples before it."""


class SavedPlan(Settings):
    """A run's training data, and its position in them."""

    data: dict[str, Any]
    """Sizes, ratios and seed; they must be the same when resuming."""
    layout: dict[str, Any]
    """The other settings that determine the samples of a step (batch sizes, number of ranks)."""
    origin: Position
    """Where this plan began. With the same batch sizes, every later step follows from it."""
    resume: Position
    """The position at which a plan of another layout resumes."""

    @classmethod
    def of(cls, plan: MixturePlan, step: int) -> SavedPlan:
        """The plan before ``step``."""
        data = {"sizes": plan.sizes, "ratios": plan.ratios, "seed": plan.seed}
        layout = {"batches": plan.batch_sizes, "processes": plan.world_size, "grouped": bool(plan.lengths)}
        return cls(data=data, layout=layout, origin=plan.origin, resume=(step, plan.positions(step)))

    def position_for(self, plan: MixturePlan) -> Position:
        """The position at which ``plan`` (with the same data) resumes."""
        return self.origin if self.layout == SavedPlan.of(plan, 0).layout else self.resume


class SavedState(Settings):
    """The content of ``state.json``."""

    progress: TrainState
    plan: SavedPlan
    scaler: dict[str, int | float]
    """State of the fp16 loss scaler; empty in other precisions."""
    frozen: dict[str, str]
    adapters: str | None
    """See `lora.describe`."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: the bridge by parameter name, AdamW's tensors by ``PARAMETER|STATE``, and the rest."""

    folder: Path
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: SavedState


# ---- read, check, load


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint; a `CheckpointError` if a file is missing or damaged."""
    try:
        state = parse(SavedState, json.loads((folder / STATE).read_text(encoding="utf-8")), STATE)
        return Checkpoint(folder, load_file(folder / MODEL), load_file(folder / OPTIMIZER), state)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint {folder} cannot be read: {one_line(error)}; delete it, or set run.resume to an earlier one"
        ) from error


def check(
    checkpoint: Checkpoint,
    model: nn.Module,
    bridge: Sequence[str],
    frozen: Mapping[str, str],
    plan: MixturePlan,
    steps: int,
) -> None:
    """Raise if a checkpoint does not fit the model, its frozen parts, the data, or a run of ``steps``."""
    folder, state = checkpoint.folder, checkpoint.state
    if difference := lora.difference(state.adapters, model):
        raise CheckpointError(f"{folder} is for another model: {difference}")
    expected = {name: model.get_parameter(name).detach() for name in bridge}
    state_dicts.check_fit(expected, checkpoint.weights, expected, folder, "this model")
    expected = {}
    for name, parameter in trainable(model).items():
        if f"{name}|step" in checkpoint.optimizer:  # a parameter that never had a gradient has no state
            expected |= {f"{name}|{part}": torch.empty(()) if part == "step" else parameter for part in _ADAMW}
    state_dicts.check_fit(expected, checkpoint.optimizer, expected, folder, "this run's optimiser")
    if differences := _differences(state.frozen, frozen):
        raise CheckpointError(f"{folder} was trained with other frozen parts: {differences}")
    if differences := _differences(state.plan.data, SavedPlan.of(plan, 0).data):
        raise CheckpointError(f"{folder} was trained on other data: {differences}")
    if state.progress.step > steps:
        raise CheckpointError(
            f"{folder} is of step {state.progress.step}, but this run ends at step {steps}: raise run.max_iters (or "
            "run.max_epoch), or set run.resume to a checkpoint of an earlier step"
        )


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    changed = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
    return "; ".join(f"{key} is {found.get(key)}, expected {expected.get(key)}" for key in changed)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy checked weights into a model."""
    with torch.no_grad():
        for name, tensor in weights.items():
            model.get_parameter(name).copy_(tensor)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load checked tensors into an optimiser; learning rates and decay stay as configured."""
    names = {parameter: name for name, parameter in trainable(model).items()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        i: {part: tensors[f"{name}|{part}"] for part in _ADAMW}
        for i, name in enumerate(order)
        if f"{name}|step" in tensors
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


# ---- write


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by ``PARAMETER|STATE``; a parameter that never had a gradient has none."""
    states = ((name, optimizer.state.get(parameter, {})) for name, parameter in trainable(model).items())
    return {f"{name}|{part}": torch.as_tensor(value) for name, state in states for part, value in state.items()}


def save(checkpoint: Checkpoint, keep_last: int) -> None:
    """Write a checkpoint, then delete all but the ``keep_last`` newest beside it."""
    target, state = checkpoint.folder, checkpoint.state
    partial = target.with_name(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        with _written(target):
            partial.mkdir(parents=True)
            write_weights(partial / MODEL, checkpoint.weights, state.progress.step, state.adapters)
            state_dicts.save(partial / OPTIMIZER, checkpoint.optimizer)
            write_json(partial / STATE, state.model_dump(mode="json"))
            shutil.rmtree(target, ignore_errors=True)
            os.rename(partial, target)
            sync(target.parent)
    finally:  # after a failed write, a partial checkpoint would fill the disk
        shutil.rmtree(partial, ignore_errors=True)
    for old in saved(target.parent)[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)


def write_weights(path: Path, weights: Mapping[str, Tensor], step: int, adapters: str | None) -> None:
    """Write weights as one file; the LoRA alpha is not a tensor, so it is in the metadata."""
    with _written(path):
        state_dicts.save(path, weights, {"step": step} | ({"lora": adapters} if adapters else {}))


@contextmanager
def _written(target: Path) -> Iterator[None]:
    """Raise a `TrainingError` if the file or folder cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"cannot write {target}: {one_line(error)}; older checkpoints are intact") from error


# ---- find


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder of checkpoints, the newest last."""
    return sorted(folder.glob("step_" + 8 * "[0-9]"))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a run's folder of checkpoints."""
    return max(saved(folder), default=None)


def step_of(weights: Path) -> int | None:
    """The step of a file from `write_weights`; None if it does not exist."""
    return (state_dicts.read(weights).cfg or {}).get("step") if weights.is_file() else None


# ---- hashes of the frozen parts


def frozen_hashes(model: nn.Module, bridge: Sequence[str]) -> dict[str, str]:
    """A hash of each top-level part's weights except the ``bridge``, and of the tokenizer's vocabulary.

    Values are rounded to bfloat16 first, so that the same weights in another precision have the same hash.
    """
    kept = set(bridge)
    parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        if name not in kept:
            key, values = f"{lora.without_base(name)} {tuple(parameter.shape)}", parameter.detach().flatten()
            if len(values) > _PROBES:
                probes = torch.linspace(0, len(values) - 1, _PROBES, dtype=torch.float64).long()
                values = values[probes.to(values.device)]
            values = values.to(torch.bfloat16) if values.is_floating_point() else values
            parts[name.split(".")[0]][key] = values
    found = {part: state_dicts.hash_of(probes) for part, probes in parts.items()}
    if (tokenizer := getattr(model, "llama_tokenizer", None)) is not None:
        size = len(tokenizer)
        some = sorted({number * max(1, size - 1) // 256 for number in range(256)} | {size - 1})
        found["tokenizer"] = hash_of(size, [tokenizer.decode([number]) for number in some])[:16]
    return found
