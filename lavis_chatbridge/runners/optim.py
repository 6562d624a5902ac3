"""The optimiser: AdamW with its weight decay, learning-rate schedules, and the fp16 loss scaler."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import nn

from lavis_chatbridge.errors import TrainingError
from lavis_chatbridge.runners.settings import RunSettings

_log = logging.getLogger(__name__)

Schedule: TypeAlias = Callable[[int], float]
"""Step (from 0) -> learning rate."""

_FIRST_FP16_SCALE = 2.0**6
"""Initial loss scale. GradScaler's default 2**16 is for a mean loss; here it is a sum over thousands of tokens."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def build_optimizer(model: nn.Module, run: RunSettings) -> torch.optim.AdamW:
    """AdamW over the trainable parameters: matrices decay, biases and norms do not unless ``run.decay_all``."""
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (run.weight_decay, 0.0)]
    for parameter in trainable(model).values():
        groups[parameter.ndim < 2 and not run.decay_all]["params"].append(parameter)
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not parameters:
        raise TrainingError("the model has no trainable parameters")
    total, trained = (sum(p.numel() for p in some) / 1e6 for some in (model.parameters(), parameters))
    _log.info("training %.1f M of %.1f M parameters", trained, total)
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=run.init_lr, betas=run.betas, fused=parameters[0].is_cuda or None)


def build_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler; enabled only in fp16."""
    return torch.amp.GradScaler(device.type, init_scale=_FIRST_FP16_SCALE, enabled=precision == "fp16")


def learning_rate(step: int, steps: int, init_lr: float, min_lr: float, warmup_steps: int, warmup_lr: float) -> float:
    """The rate of step ``step`` (from 0) of ``steps``: linear warm-up, then a cosine over the remaining steps."""
    if step < warmup_steps:
        return warmup_lr + (init_lr - warmup_lr) * step / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return min_lr + (init_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def original_rate(
    step: int, steps: int, init_lr: float, min_lr: float, warmup_steps: int, warmup_lr: float, epoch: int
) -> float:
    """The original ChatBridge's rate at step ``step`` (from 0) of ``steps``, with epochs of ``epoch`` steps.

    Its warm-up restarts at every epoch that begins within the warm-up, and its cosine starts at step 0.
    """
    if step < warmup_steps:
        return warmup_lr + (init_lr - warmup_lr) * (step % epoch) / warmup_steps
    return min_lr + (init_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / steps)))


def schedule(run: RunSettings, steps: int, epoch: int | None = None) -> Schedule:
    """The learning rate per step of a run of ``steps`` steps; ``epoch`` is the steps per epoch of ``original``.

    LAVIS's ``linear_warmup_cosine_lr`` differs: its cosine changes once per epoch, and its warm-up ends with the first
    epoch.
    """
    shape = (steps, run.init_lr, run.min_lr, run.warmup_steps, run.warmup_lr)
    if run.lr_sched == "original":
        return lambda step: original_rate(step, *shape, epoch or steps)
    return lambda step: learning_rate(step, *shape)


def keep_in_fp32(parameters: Iterable[nn.Parameter]) -> int:
    """Convert half-precision parameters to fp32, in place, and return their number.

    A bf16 weight would not change in training: an update of 1e-4 is rounded off.
    """
    halves = [parameter for parameter in parameters if parameter.dtype in (torch.float16, torch.bfloat16)]
    for parameter in halves:
        parameter.data = parameter.data.float()
    return len(halves)
