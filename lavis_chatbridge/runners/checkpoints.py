"""Checkpoints: written atomically; when resuming, read, checked against the run, then loaded.

A checkpoint is a folder ``step_NNNNNNNN`` of

- ``model.safetensors``: the bridge, under the model's own parameter names;
- ``optimizer.safetensors``: AdamW's tensors, as ``PARAMETER|STATE``;
- ``state.json``: progress, position in the data, loss scaler, hashes of the frozen parts.

No pickle is read or written. Frozen weights are not saved; their hashes ensure that a run resumes with the same ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pydantic import NonNegativeInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lavis_chatbridge.config import Settings, parse
from lavis_chatbridge.datasets.plan import MixturePlan
from lavis_chatbridge.errors import CheckpointError, TrainingError, one_line
from lavis_chatbridge.files import atomic_file, hash_of, sync, write_json
from lavis_chatbridge.models import lora
from lavis_chatbridge.runners import optim
from lavis_chatbridge.runners.settings import RunSettings
from lavis_chatbridge.runners.step import TrainState

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_ADAMW = ("step", "exp_avg", "exp_avg_sq")
_PROBES = 1024
"""Number of evenly spaced values of a frozen tensor in its hash; hashing all 26 GB would take half a minute."""


Position: TypeAlias = tuple[NonNegativeInt, dict[str, NonNegativeInt]]
"""A step, and each data set's number of samples before it."""


class SavedPlan(Settings):
    """A run's training data, and its position in them."""

    data: dict[str, Any]
    """Sizes, ratios and seed; they must be the same when resuming."""
    layout: dict[str, Any]
    """The other settings that determine the samples of a step (batch sizes, number of ranks)."""
    origin: Position
    """The position at which the plan started or resumed; a plan of the same layout computes every step from it."""
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
    adapters: dict[str, Any] | None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: the bridge by parameter name, AdamW's tensors by ``PARAMETER|STATE``, and the rest."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: SavedState


# ---- read, check, apply


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint; a `CheckpointError` if a file is missing or damaged."""
    try:
        state = parse(SavedState, json.loads((folder / STATE).read_text(encoding="utf-8")), STATE)
        return Checkpoint(load_file(folder / MODEL), load_file(folder / OPTIMIZER), state)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the checkpoint {folder} cannot be read: {one_line(error)}; delete it, or set run.resume to an earlier one"
        ) from error


def check(
    checkpoint: Checkpoint,
    where: Path,
    model: nn.Module,
    bridge: Sequence[str],
    frozen: Mapping[str, str],
    plan: MixturePlan,
    steps: int,
) -> None:
    """Raise if a checkpoint does not fit the model, its frozen parts, the data, or a run of ``steps``."""
    state = checkpoint.state
    check_weights(checkpoint.weights, where, model, bridge, state.adapters)
    expected: dict[str, torch.Size] = {}
    for name, parameter in optim.trainable(model).items():
        if f"{name}|step" in checkpoint.optimizer:  # a parameter that never had a gradient has no state
            expected |= {f"{name}|{part}": torch.Size() if part == "step" else parameter.shape for part in _ADAMW}
    for faults, text in (
        (_misfits(checkpoint.optimizer, expected), "has an optimiser state that does not fit"),
        (_differences(state.frozen, frozen), "was trained with other frozen parts"),
        (_differences(state.plan.data, SavedPlan.of(plan, 0).data), "was trained on other data"),
    ):
        if faults:
            raise CheckpointError(f"{where} {text}: {'; '.join(faults[:5])}")
    if state.progress.step > steps:
        raise CheckpointError(
            f"{where} is of step {state.progress.step}, but this run ends at step {steps}: raise run.max_iters (or "
            "run.max_epoch), or set run.resume to a checkpoint of an earlier step"
        )


def check_weights(
    weights: Mapping[str, Tensor],
    where: Path,
    model: nn.Module,
    bridge: Sequence[str],
    adapters: Mapping[str, Any] | None = None,
) -> None:
    """Raise if weights do not fit a model's ``bridge``; ``adapters`` describes their LoRA, if the alpha is known."""
    if misfit := lora.misfit(adapters or lora.described_by(weights), lora.describe(model)):
        raise CheckpointError(f"{where} is for another model: {misfit}")
    if faults := _misfits(weights, {name: model.get_parameter(name).shape for name in bridge}):
        raise CheckpointError(f"{where} is for another model, or damaged: {'; '.join(faults[:5])}")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy checked weights into a model."""
    with torch.no_grad():
        for name, tensor in weights.items():
            model.get_parameter(name).copy_(tensor)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load checked tensors into an optimiser; learning rates and decay stay as configured."""
    names = {parameter: name for name, parameter in optim.trainable(model).items()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        i: {part: tensors[f"{name}|{part}"] for part in _ADAMW}
        for i, name in enumerate(order)
        if f"{name}|step" in tensors
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def _misfits(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> list[str]:
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    faults = _differences(found, {name: list(shape) for name, shape in shapes.items()})
    return faults + [f"{name} is not finite" for name, tensor in tensors.items() if not tensor.isfinite().all()]


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The differences between two mappings, as sentences."""
    lines = [f"{key} is missing" for key in expected if key not in found]
    lines += [f"{key} is not expected" for key in found if key not in expected]
    both = [key for key in expected if key in found and found[key] != expected[key]]
    return lines + [f"{key} is {found[key]}, expected {expected[key]}" for key in both]


# ---- write


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by ``PARAMETER|STATE``, on the CPU; a parameter that never had a gradient has none."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in optim.trainable(model).items()}
    return {
        f"{names[parameter]}|{part}": torch.as_tensor(value).detach().cpu().clone()
        for parameter, state in optimizer.state.items()
        for part, value in state.items()
    }


def save(folder: Path, checkpoint: Checkpoint, run: RunSettings) -> None:
    """Write a checkpoint into the run's folder of checkpoints, then delete old ones."""
    step = checkpoint.state.progress.step
    target = folder / f"step_{step:08d}"
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _written(target):
            partial.mkdir(parents=True)
            write_weights(partial / MODEL, checkpoint.weights, step, checkpoint.state.adapters)
            with atomic_file(partial / OPTIMIZER) as file:
                save_file(checkpoint.optimizer, file)
            write_json(partial / STATE, checkpoint.state.model_dump(mode="json"))
            shutil.rmtree(target, ignore_errors=True)
            os.rename(partial, target)
            sync(folder)
    except TrainingError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    kept = steps(folder)
    for old in sorted(kept)[: -run.keep_last]:
        if run.keep_every is None or old % run.keep_every:
            shutil.rmtree(kept[old], ignore_errors=True)


def write_weights(path: Path, weights: Mapping[str, Tensor], step: int, adapters: Mapping[str, Any] | None) -> None:
    """Write weights as one file; the LoRA alpha is not a tensor, so it is in the metadata."""
    about = {"step": str(step)} | ({"cfg": json.dumps({"lora": dict(adapters)})} if adapters else {})
    with _written(path), atomic_file(path) as file:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file, metadata=about)


@contextmanager
def _written(target: Path) -> Iterator[None]:
    """Raise a `TrainingError` if the file or folder cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"cannot write {target}: {one_line(error)}; older checkpoints are intact") from error


# ---- find


def steps(folder: Path) -> dict[int, Path]:
    """Step -> its checkpoint in a run's folder of checkpoints."""
    return {int(path.name.removeprefix("step_")): path for path in folder.glob("step_" + 8 * "[0-9]")}


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a run's folder of checkpoints."""
    return max(steps(folder).items(), default=(0, None))[1]


def step_of(weights: Path) -> int | None:
    """The step of a file from `write_weights`; None if it does not exist."""
    if not weights.is_file():
        return None
    with safe_open(weights, "pt") as file:
        return int((file.metadata() or {}).get("step", -1))


# ---- hashes of the frozen parts


def frozen_hashes(model: nn.Module, bridge: Sequence[str]) -> dict[str, str]:
    """A hash of each top-level part's weights except the ``bridge``, and of the tokenizer's vocabulary.

    Values are rounded to bfloat16 first, so that the same weights in another precision have the same hash.
    """
    kept, hashes = set(bridge), dict[str, Any]()
    for name, parameter in model.named_parameters():
        if name not in kept:
            part = hashes.setdefault(name.split(".")[0], hashlib.sha256())
            part.update(f"{lora.without_base(name)} {tuple(parameter.shape)}".encode())
            part.update(_some_bytes(parameter))
    found = {name: part.hexdigest()[:32] for name, part in hashes.items()}
    if (tokenizer := getattr(model, "llama_tokenizer", None)) is not None:
        size = len(tokenizer)
        some = sorted({number * max(1, size - 1) // 256 for number in range(256)} | {size - 1})
        found["tokenizer"] = hash_of(size, [tokenizer.decode([number]) for number in some])[:32]
    return found


def _some_bytes(parameter: Tensor) -> bytes:
    flat = parameter.detach().reshape(-1)
    if flat.numel() > _PROBES:
        flat = flat[torch.linspace(0, flat.numel() - 1, _PROBES, dtype=torch.float64).long().to(flat.device)]
    if flat.is_floating_point():
        flat = flat.to(torch.bfloat16).view(torch.int16)
    return flat.cpu().numpy().tobytes()
