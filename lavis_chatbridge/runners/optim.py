"""The optimiser: which parameters decay, how the learning rate runs, how fp16 losses are scaled."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from lavis.common.registry import registry
from torch import nn

from lavis_chatbridge.errors import TrainingError
from lavis_chatbridge.runners.settings import RunSettings

_log = logging.getLogger(__name__)

SCHEDULER_NAME = "linear_warmup_cosine_iter_lr"
_FIRST_FP16_SCALE = 2.0**6
"""GradScaler's usual 2**16 suits a mean loss; this engine back-propagates the sum over some thousand tokens."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(model: nn.Module, weight_decay: float, decay_all: bool) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, biases and norms do not; one group for all with ``decay_all``."""
    named = trainable(model)
    if decay_all:
        return [{"params": list(named.values()), "weight_decay": weight_decay}]
    matrices = [parameter for parameter in named.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in named.values() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, run: RunSettings) -> torch.optim.AdamW:
    """AdamW over the trainable parameters.

    Raises:
        TrainingError: If the model has nothing to train.
    """
    groups = parameter_groups(model, run.weight_decay, run.decay_all)
    if not groups:
        raise TrainingError("the model has no trainable parameters")
    on_cuda = next(iter(trainable(model).values())).is_cuda
    return torch.optim.AdamW(groups, lr=run.init_lr, betas=(run.betas[0], run.betas[1]), fused=on_cuda or None)


def build_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler; it does nothing except in fp16."""
    return torch.amp.GradScaler(device.type, init_scale=_FIRST_FP16_SCALE, enabled=precision == "fp16")


def learning_rate(step: int, steps: int, init_lr: float, min_lr: float, warmup_steps: int, warmup_lr: float) -> float:
    """The rate of step ``step`` (from 0) of ``steps``: linear warm-up, then a cosine over all that is left."""
    if step < warmup_steps:
        return warmup_lr + (init_lr - warmup_lr) * step / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return min_lr + (init_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def original_rate(
    step: int, steps: int, init_lr: float, min_lr: float, warmup_steps: int, warmup_lr: float, epoch: int
) -> float:
    """The original ChatBridge's rate of step ``step`` (from 0) of ``steps``, with epochs of ``epoch`` steps.

    Its ramp begins again with every epoch that starts within the warm-up, and its cosine counts the warm-up's steps.
    """
    if step < warmup_steps:
        return warmup_lr + (init_lr - warmup_lr) * (step % epoch) / warmup_steps
    return min_lr + (init_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / steps)))


@registry.register_lr_scheduler(SCHEDULER_NAME)
class WarmupCosine:
    """Linear warm-up and cosine per step over the whole run, with the signature of LAVIS's schedulers.

    LAVIS's own ``linear_warmup_cosine_lr`` steps the cosine per epoch and restarts the warm-up with every epoch's
    count.

    Args:
        optimizer: Whose learning rate is set.
        max_epoch: Number of (inner) epochs.
        min_lr: Rate at the end.
        init_lr: Rate after warm-up.
        warmup_steps: Length of the warm-up in steps.
        warmup_start_lr: Rate at the first step; negative means ``init_lr`` (LAVIS's convention).
        iters_per_epoch: Steps of one epoch.
        original_epoch: Follow `original_rate`, with epochs of so many steps.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_epoch: int,
        min_lr: float,
        init_lr: float,
        warmup_steps: int = 0,
        warmup_start_lr: float = -1.0,
        iters_per_epoch: int = 1,
        original_epoch: int | None = None,
        **_unused: Any,
    ) -> None:
        self.optimizer = optimizer
        self.iters_per_epoch, self.original_epoch = iters_per_epoch, original_epoch
        self.steps = max_epoch * iters_per_epoch
        self.init_lr, self.min_lr = init_lr, min_lr
        self.warmup_steps = warmup_steps
        self.warmup_lr = warmup_start_lr if warmup_start_lr >= 0 else init_lr

    def step(self, cur_epoch: int, cur_step: int) -> float:
        """Set the rate for step ``cur_step`` of epoch ``cur_epoch`` (both from 0) and return it."""
        step = cur_epoch * self.iters_per_epoch + cur_step
        shape = (step, self.steps, self.init_lr, self.min_lr, self.warmup_steps, self.warmup_lr)
        rate = original_rate(*shape, self.original_epoch) if self.original_epoch else learning_rate(*shape)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint records: the schedule itself; its position is the step."""
        names = ("steps", "iters_per_epoch", "init_lr", "min_lr", "warmup_steps", "warmup_lr", "original_epoch")
        return {name: getattr(self, name) for name in names}


def schedule(optimizer: torch.optim.Optimizer, run: RunSettings, steps: int, epoch: int | None = None) -> WarmupCosine:
    """The schedule of a run of ``steps`` optimiser steps; ``epoch`` is the original's number of steps between two
    validations, which its warm-up depends on."""
    return WarmupCosine(
        optimizer,
        max_epoch=1,
        min_lr=run.min_lr,
        init_lr=run.init_lr,
        warmup_steps=run.warmup_steps,
        warmup_start_lr=run.warmup_lr,
        iters_per_epoch=steps,
        original_epoch=(epoch or steps) if run.lr_sched == "original" else None,
    )


def keep_in_fp32(parameters: Iterable[nn.Parameter]) -> int:
    """Raise half-precision trainable parameters to fp32, in place; how many there were.

    A step of 1e-4 of a bf16 weight is below its rounding, so training it in bf16 would stand still.
    """
    raised = 0
    for parameter in parameters:
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
            raised += 1
    return raised


def log_sizes(model: nn.Module) -> None:
    """Say how many values are trained, and beside how many frozen ones."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in trainable(model).values())
    _log.info("training %.1f M values beside %.1f M frozen ones", trained / 1e6, (total - trained) / 1e6)
