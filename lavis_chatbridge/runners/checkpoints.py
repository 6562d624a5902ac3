"""Checkpoints: folders that are written aside and renamed, read into a value, checked against the run, then applied.

A checkpoint is a folder ``step_NNNNNNNN`` of

- ``model.safetensors``: the bridge, under the model's own parameter names;
- ``optimizer.safetensors``: AdamW's tensors, as ``PARAMETER|STATE``;
- ``state.json``: progress, position in the data, loss scaler, hashes of the frozen parts, configuration.

No pickle is read or written. Frozen weights are not saved; their hashes make sure that a run resumes on the same ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pydantic import NonNegativeInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lavis_chatbridge.config import Settings, parse
from lavis_chatbridge.datasets.plan import MixturePlan
from lavis_chatbridge.errors import CheckpointError, TrainingError
from lavis_chatbridge.files import atomic_file, hash_of, share, sync, write_json
from lavis_chatbridge.models import lora
from lavis_chatbridge.runners import optim
from lavis_chatbridge.runners.step import TrainState

_log = logging.getLogger(__name__)

MODEL, OPTIMIZER, STATE, BEST = "model.safetensors", "optimizer.safetensors", "state.json", "best.safetensors"
_STEP = re.compile(r"step_(\d{8,})")
_ADAMW = ("step", "exp_avg", "exp_avg_sq")
_PROBES = 1024
"""Values of a frozen tensor that its hash reads, evenly spread: 26 GB would take half a minute to hash entirely."""


Position: TypeAlias = tuple[NonNegativeInt, dict[str, NonNegativeInt]]
"""A step, and the number of samples that each source has given before it."""


class SavedPlan(Settings):
    """The data of a run and its position in them."""

    sizes: dict[str, int]
    ratios: dict[str, float]
    seed: int
    batch_sizes: dict[str, int]
    world_size: int
    grouped: bool
    origin: Position
    """The position that the plan was started or resumed at; the same plan computes every later step from it."""
    resume: Position
    """The position at which a plan of other batch sizes resumes."""

    @classmethod
    def of(cls, plan: MixturePlan, step: int) -> SavedPlan:
        """What a plan is before ``step``."""
        return cls(
            sizes=plan.sizes,
            ratios=plan.ratios,
            seed=plan.seed,
            batch_sizes=plan.batch_sizes,
            world_size=plan.world_size,
            grouped=bool(plan.lengths),
            origin=plan.origin,
            resume=(step, plan.positions(step)),
        )

    def position_for(self, plan: MixturePlan) -> Position:
        """Where ``plan``, which has the same data, resumes."""
        same = (self.batch_sizes, self.world_size, self.grouped)
        return self.origin if same == (plan.batch_sizes, plan.world_size, bool(plan.lengths)) else self.resume


class SavedState(Settings):
    """The content of ``state.json``."""

    progress: TrainState
    plan: SavedPlan
    scaler: dict[str, int | float]
    """The fp16 loss scaler's; empty in other precisions."""
    frozen: dict[str, str]
    adapters: dict[str, Any] | None
    config: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A run at one moment: its folder, the bridge by parameter name, AdamW's tensors by ``PARAMETER|STATE``."""

    path: Path
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: SavedState


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    try:
        values = json.loads((folder / STATE).read_text(encoding="utf-8"))
        state = parse(SavedState, values, STATE)
        return Checkpoint(folder, load_file(folder / MODEL), load_file(folder / OPTIMIZER), state)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the checkpoint {folder} cannot be read: {one_line(error)}") from error


def check_weights(
    weights: Mapping[str, Tensor],
    model: nn.Module,
    names: list[str],
    where: Path,
    adapters: Mapping[str, Any] | None = None,
) -> None:
    """Compare weights with the parameters ``names`` of a model, and their LoRA adapters with the model's.

    Without ``adapters`` those are deduced from the weights, except the alpha.

    Raises:
        CheckpointError: If names, shapes, dtypes or adapters differ, or a value is not finite.
    """
    if misfit := lora.misfit(adapters or lora.described_by(weights), lora.describe(model)):
        raise CheckpointError(f"{where} is for another model: {misfit}")
    expected = {name: list(model.get_parameter(name).shape) for name in names}
    faults = differences({name: list(tensor.shape) for name, tensor in weights.items()}, expected)
    faults += [f"{name} is not finite" for name, tensor in weights.items() if not _is_finite(tensor)]
    if faults:
        raise CheckpointError(f"{where} is for another model, or damaged: {'; '.join(faults[:5])}")


def check_optimizer(tensors: Mapping[str, Tensor], model: nn.Module, where: Path) -> None:
    """Compare the optimiser's tensors with the trainable parameters of a model.

    Raises:
        CheckpointError: If a parameter's state is incomplete, of another shape, or not finite.
    """
    faults = [f"{key} is not finite" for key, tensor in tensors.items() if not _is_finite(tensor)]
    for name, parameter in optim.trainable(model).items():
        found = {part: list(tensors[f"{name}|{part}"].shape) for part in _ADAMW if f"{name}|{part}" in tensors}
        expected = {part: [] if part == "step" else list(parameter.shape) for part in _ADAMW}
        faults += [f"{name}: {fault}" for fault in differences(found, expected)] if found else []
    if faults:
        raise CheckpointError(f"{where} has an optimiser state that does not fit: {'; '.join(faults[:5])}")


def check_state(state: SavedState, plan: MixturePlan, steps: int, frozen: Mapping[str, str], where: Path) -> None:
    """Compare a checkpoint's state with a run of ``steps`` steps.

    Raises:
        CheckpointError: If the frozen parts or the data differ, or the checkpoint is from beyond the end of the run.
    """
    if faults := differences(state.frozen, frozen):
        raise CheckpointError(f"{where} was trained with other frozen parts: {'; '.join(faults)}")
    saved, own = state.plan, SavedPlan.of(plan, 0)
    if faults := differences(*(one.model_dump(include={"sizes", "ratios", "seed"}) for one in (saved, own))):
        raise CheckpointError(f"{where} was trained on other data: {'; '.join(faults)}")
    if any(set(positions) != set(plan.sizes) for _, positions in (saved.origin, saved.resume)):
        raise CheckpointError(f"{where} has no position for some of {', '.join(plan.sizes)}")
    if state.progress.step > steps:
        raise CheckpointError(
            f"{where} is of step {state.progress.step}, but this run ends at step {steps}: raise run.max_iters (or "
            "run.max_epoch), or set run.resume to a checkpoint of an earlier step"
        )


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy checked weights into a model."""
    with torch.no_grad():
        for name, tensor in weights.items():
            model.get_parameter(name).copy_(tensor)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load checked tensors into an optimiser; its learning rates and decay stay those of the configuration."""
    names = {parameter: name for name, parameter in optim.trainable(model).items()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        i: {part: tensors[f"{name}|{part}"] for part in _ADAMW}
        for i, name in enumerate(order)
        if f"{name}|step" in tensors
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by ``PARAMETER|STATE``, on the CPU; a parameter that never had a gradient has none."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in optim.trainable(model).items()}
    return {
        f"{names[parameter]}|{part}": torch.as_tensor(value).detach().cpu().clone()
        for parameter, state in optimizer.state.items()
        for part, value in state.items()
    }


def write_weights(path: Path, weights: Mapping[str, Tensor], step: int, adapters: Mapping[str, Any] | None) -> None:
    """Write weights as one file; the LoRA alpha is in no tensor, so the metadata keep it.

    Raises:
        TrainingError: If the file cannot be written.
    """
    about = {"step": str(step)} | ({"cfg": json.dumps({"lora": dict(adapters)})} if adapters else {})
    with _written(path), atomic_file(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial, metadata=about)


@contextmanager
def _written(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        raise TrainingError(f"cannot write {target}: {one_line(error)}; older checkpoints are intact") from error


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        path: Their folder; created by the first save.
        keep_last: Number of newest checkpoints to keep.
        keep_every: Checkpoints at multiples of this step are kept as well.
    """

    def __init__(self, path: Path, keep_last: int = 2, keep_every: int | None = None) -> None:
        self.path, self.keep_last, self.keep_every = path, keep_last, keep_every

    def steps(self) -> dict[int, Path]:
        """Step -> its checkpoint."""
        found = {step_of(path): path for path in self.path.glob("step_*") if path.is_dir()}
        return {step: path for step, path in found.items() if step is not None}

    def newest(self) -> Path | None:
        """The newest checkpoint that can be read; the log names the others."""
        for _, path in sorted(self.steps().items(), reverse=True):
            try:
                return read(path).path
            except CheckpointError as error:
                _log.warning("skipped: %s", error)
        return None

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint of its step, then remove those that need not be kept.

        Raises:
            TrainingError: If it cannot be written.
        """
        step = checkpoint.state.progress.step
        target = self.path / f"step_{step:08d}"
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with _written(target):
                partial.mkdir(parents=True)
                write_weights(partial / MODEL, checkpoint.weights, step, checkpoint.state.adapters)
                save_file(checkpoint.optimizer, partial / OPTIMIZER)
                share(partial / OPTIMIZER)
                sync(partial / OPTIMIZER)
                write_json(partial / STATE, checkpoint.state.model_dump(mode="json"))
                shutil.rmtree(target, ignore_errors=True)
                os.rename(partial, target)
                sync(self.path)
        except TrainingError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        steps = self.steps()
        for old in sorted(steps)[: -self.keep_last]:
            if self.keep_every is None or old % self.keep_every:
                shutil.rmtree(steps[old], ignore_errors=True)

    def add_validation(self, progress: TrainState) -> None:
        """Put a finished validation's result into the checkpoint of its step; without it, resuming repeats it."""
        path = self.path / f"step_{progress.step:08d}" / STATE
        if path.is_file():  # the checkpoint of a resumed run's first step may be in another folder
            with _written(path):
                write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "progress": asdict(progress)})


def best(folder: Path, step: int) -> Path | None:
    """The file with the weights of the best step, as such or in that step's checkpoint; None if it is gone."""
    if (path := folder / BEST).is_file():
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("step") == str(step):
                return path
    path = folder / f"step_{step:08d}" / MODEL
    return path if path.is_file() else None


def step_of(path: Path) -> int | None:
    """The step of a checkpoint's folder by its name."""
    match = _STEP.fullmatch(path.name)
    return int(match.group(1)) if match else None


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The differences between two mappings, as sentences."""
    lines = [f"{key} is missing" for key in expected if key not in found]
    lines += [f"{str(key)[:200]} is not expected" for key in found if key not in expected]
    both = [key for key in expected if key in found and found[key] != expected[key]]
    return lines + [f"{key} is {str(found[key])[:200]}, expected {expected[key]}" for key in both]


def frozen_hashes(model: nn.Module, bridge: list[str]) -> dict[str, str]:
    """A hash of each top-level part's weights except the ``bridge``, and of the tokenizer's vocabulary.

    Values are rounded to bfloat16 first, so that the same weights in another precision have the same hash.
    """
    kept, hashes = set(bridge), dict[str, Any]()
    for name, parameter in model.named_parameters():
        if name not in kept:
            digest = hashes.setdefault(name.split(".")[0], hashlib.sha256())
            digest.update(f"{lora.without_base(name)} {tuple(parameter.shape)}".encode())
            digest.update(_probe(parameter))
    found = {name: digest.hexdigest()[:32] for name, digest in hashes.items()}
    for name in ("llama_tokenizer", "tokenizer", "llm_tokenizer"):
        if (tokenizer := getattr(model, name, None)) is not None:
            size = len(tokenizer)
            some = sorted({number * max(1, size - 1) // 256 for number in range(256)} | {size - 1})
            found["tokenizer"] = hash_of(size, [tokenizer.decode([number]) for number in some])[:32]
            break
    return found


def _probe(parameter: Tensor) -> bytes:
    flat = parameter.detach().reshape(-1)
    if flat.numel() > _PROBES:
        flat = flat[torch.linspace(0, flat.numel() - 1, _PROBES, dtype=torch.float64).long().to(flat.device)]
    if flat.is_floating_point():
        flat = flat.to(torch.bfloat16).view(torch.int16)
    return flat.cpu().numpy().tobytes()


def one_line(error: Exception) -> str:
    """An error's text in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(torch.isfinite(tensor).all())
