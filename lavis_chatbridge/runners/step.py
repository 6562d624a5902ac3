"""One optimiser step, with the same result for one process and several.

The loss of a step is the mean over all target tokens of all micro-batches of all processes. Each process therefore runs
backward on the *sum* over its tokens; gradients are summed over processes and divided by the total number of tokens.
This module uses no data sets, files or logs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lavis_chatbridge.models.settings import slow_on_cpu
from lavis_chatbridge.runners.settings import RunSettings

Samples: TypeAlias = Mapping[str, Any]
"""One batch as a loader collates it."""
Loss: TypeAlias = Callable[[nn.Module, Samples], tuple[Tensor, Tensor]]
"""(model, batch) -> (mean loss, number of target tokens), both 0-dimensional."""

_FIRST_FP16_SCALE = 2.0**6
"""Initial loss scale. GradScaler's default 2**16 is for a mean loss; here it is a sum over thousands of tokens."""


@dataclass
class StepResult:
    """The result of one step, summed over all processes."""

    outcome: Literal["ok", "empty", "nonfinite", "overflow"]
    """``ok``, or why no weight changed: ``empty`` (no target token), ``nonfinite`` (loss or gradient), ``overflow``
    (fp16 only: the loss scale was too large and is lowered)."""
    loss: float  # mean over the target tokens
    tokens: int  # target tokens
    samples: int  # samples trained on
    skipped: int  # unreadable samples
    rate: float  # learning rate
    save: bool = False  # a process requests a checkpoint
    stop: bool = False  # a process requests the end of the training
    grad_norm: float = 0.0  # before clipping
    suspects: list[str] = field(default_factory=list)  # ids of this process's samples in non-finite micro-batches


class TrainStep:
    """Makes one optimiser step from micro-batches, for a model with trainable parameters on ``device``.

    Attributes:
        optimizer: AdamW over the trainable parameters.
        scaler: The fp16 loss scaler; disabled in other precisions.
    """

    def __init__(self, model: nn.Module, loss: Loss, run: RunSettings, device: torch.device) -> None:
        self.model, self.loss, self.run, self.device = model, loss, run, device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.parameters = list(trainable(model).values())
        self.optimizer = adamw(self.parameters, run)
        fp16 = run.precision == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, init_scale=_FIRST_FP16_SCALE, enabled=fp16)

    def __call__(
        self, step: int, rate: float, batch: Sequence[Samples], save: bool = False, stop: bool = False
    ) -> StepResult:
        """Take step ``step`` (from 0) on this process's micro-batches; empty ones (no readable sample) are skipped.

        ``save`` and ``stop``: this process requests a checkpoint, or the end of training.
        """
        seed_all(self.run.seed, step, self.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        skipped = sum(len(samples.get("skipped", ())) for samples in batch)
        batch = [samples for samples in batch if samples.get("sample_id", True)]
        if self.run.parallel == "fsdp" and dist.is_initialized():  # each forward gathers weights from all ranks
            fewest = torch.tensor(len(batch), device=self.device)
            dist.all_reduce(fewest, dist.ReduceOp.MIN)
            batch = batch[: int(fewest)]
        ids = [sample_ids(samples) for samples in batch]
        own = torch.zeros(len(batch), 2, dtype=torch.float64, device=self.device)  # read at the end
        for number, samples in enumerate(batch):
            own[number] = self._backward(samples)
        counts = own.new_tensor([sum(map(len, ids)), skipped, save, stop])
        result = _summed(torch.cat([own.sum(0), counts]), rate)
        if result.outcome == "ok":
            sum_gradients(self.parameters)
            self._update(result)
        if result.outcome == "nonfinite":
            bad = [names for names, (loss, _) in zip(ids, own.tolist(), strict=True) if not math.isfinite(loss)]
            result.suspects = [name for names in bad or ids for name in names]  # all if only a gradient is not finite
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _backward(self, samples: Samples) -> Tensor:
        """Add a micro-batch's gradients; returns the loss summed over its tokens, and their number."""
        with autocast(self.run.precision, self.device):
            loss, tokens = self.loss(self.model, samples)
        loss_sum = loss.float() * tokens
        if loss_sum.requires_grad:  # a batch may use no trained part (`run.train`)
            self.scaler.scale(loss_sum).backward()
        return torch.stack([loss_sum.detach().double(), tokens.detach().to(loss_sum.device, torch.float64)])

    def _update(self, result: StepResult) -> None:
        """Divide the gradients by the number of tokens, clip them, and step; skip the step if they are not finite."""
        trained = [parameter for parameter in self.parameters if parameter.grad is not None]
        grads = [parameter.grad for parameter in trained if parameter.grad is not None]
        if not grads:
            return
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        torch._foreach_mul_(grads, 1.0 / result.tokens)
        norm = torch.nn.utils.get_total_norm(grads)
        result.grad_norm = float(norm)
        if math.isfinite(result.grad_norm):
            if self.run.clip_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(trained, self.run.clip_grad_norm, norm)
            self.scaler.step(self.optimizer)
        else:
            recoverable = self.scaler.is_enabled() and self.scaler.get_scale() > 1.0
            result.outcome = "overflow" if recoverable else "nonfinite"
        self.scaler.update()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adamw(parameters: Sequence[nn.Parameter], run: RunSettings) -> torch.optim.AdamW:
    """AdamW: matrices decay, biases and norms only with ``run.decay_all``."""
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (run.weight_decay, 0.0)]
    for parameter in parameters:
        groups[parameter.ndim < 2 and not run.decay_all]["params"].append(parameter)
    return torch.optim.AdamW(groups, lr=run.init_lr, betas=run.betas, fused=parameters[0].is_cuda or None)


def learning_rate(run: RunSettings, step: int, steps: int, epoch: int | None = None) -> float:
    """The learning rate of step ``step`` (from 0) of ``steps``: linear warm-up, then a cosine over the remaining steps.

    The original's warm-up restarts at every epoch (of ``epoch`` steps) that begins within the warm-up, and its cosine
    starts at step 0. LAVIS's own cosine changes once per epoch, and its warm-up ends with the first epoch.
    """
    original = run.lr_sched == "original"
    if step < run.warmup_steps:
        done = step % (epoch or steps) if original else step
        return run.warmup_lr + (run.init_lr - run.warmup_lr) * done / run.warmup_steps
    first = 0 if original else run.warmup_steps
    share = (step - first) / max(1, steps - first)
    return run.min_lr + (run.init_lr - run.min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))


def _summed(own: Tensor, rate: float) -> StepResult:
    """Sum loss, counts and requests over processes; the outcome is then the same on all of them."""
    if dist.is_initialized():
        dist.all_reduce(own)
    loss, tokens, samples, skipped, save, stop = own.tolist()
    outcome: Literal["ok", "empty", "nonfinite"] = "ok" if tokens else "empty"
    if not math.isfinite(loss):
        outcome = "nonfinite"
    mean = loss / max(tokens, 1.0)
    return StepResult(outcome, mean, int(tokens), int(samples), int(skipped), rate, save > 0, stop > 0)


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over all processes, in place; a parameter that has a gradient on no process keeps None.

    The trained part is small (110 M parameters at the paper's size), so all gradients are sent in one flat fp32 buffer.
    """
    if not dist.is_initialized():
        return
    has = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=parameters[0].device)
    grads = [parameter.grad if parameter.grad is not None else torch.zeros_like(parameter) for parameter in parameters]
    flat = torch.cat([has, *(grad.reshape(-1).float() for grad in grads)])
    dist.all_reduce(flat)
    counts, values = flat[: len(parameters)].tolist(), flat[len(parameters) :]
    for parameter, count, part in zip(parameters, counts, values.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype) if count else None


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The autocast context of a forward; a CPU without half-precision instructions computes in fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    slow = dtype is not None and device.type == "cpu" and slow_on_cpu(dtype)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None and not slow)


def seed_all(*numbers: int) -> None:
    """Seed all random generators.

    Called with seed, step and rank before each step, so that validations and resuming do not change its random numbers,
    and checkpoints need no generator state.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # without CUDA, torch.manual_seed would queue one more call per step
        torch.cuda.manual_seed(seed)


def sample_ids(samples: Samples) -> Sequence[str]:
    """The ids of a batch's samples; the key depends on the data set."""
    for key in ("sample_id", "image_id", "question_id", "instance_id"):
        if key in samples:
            return [str(name) for name in samples[key]]
    lengths = [len(value) for value in samples.values() if isinstance(value, (list, Tensor)) and len(value)]
    return ["?"] * (lengths[0] if lengths else 0)
