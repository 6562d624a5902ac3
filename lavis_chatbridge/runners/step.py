"""One optimiser step: micro-batches in, changed weights out, the same for one process as for several.

The loss of a step is the mean over all target tokens of all micro-batches of all processes. Each process therefore runs
backward on the *sum* over its tokens; gradients are summed over processes and divided by the total number of tokens.
This module knows no data set, no file and no log.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lavis_chatbridge.models.settings import slow_on_cpu
from lavis_chatbridge.runners import distributed, optim
from lavis_chatbridge.runners.contracts import Loss, Samples
from lavis_chatbridge.runners.settings import RunSettings

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Requests:
    """What a signal or the clock requests of all processes at the end of a step."""

    save: bool = False
    stop: bool = False


@dataclass
class StepResult:
    """What one step did, over all processes.

    Attributes:
        outcome: ``ok``, or why no weight changed: ``empty`` (no target token), ``nonfinite`` (loss or gradient),
            ``overflow`` (fp16 only: the loss scale was too large and has been lowered).
        loss: Mean over the target tokens.
        tokens: Target tokens.
        samples: Samples that were trained on.
        skipped: Samples that could not be read.
        rate: Learning rate.
        grad_norm: Norm before clipping.
        suspects: Ids of the samples of non-finite micro-batches.
        requests: What any process requests.
    """

    outcome: Literal["ok", "empty", "nonfinite", "overflow"]
    loss: float
    tokens: int
    samples: int
    skipped: int
    rate: float
    grad_norm: float = 0.0
    suspects: list[str] = field(default_factory=list)
    requests: Requests = field(default_factory=Requests)


@dataclass
class _Share:
    """One process's share of a step; the tensors stay on the device until the step ends."""

    losses: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    ids: list[Sequence[str]] = field(default_factory=list)

    def suspects(self) -> list[str]:
        """Ids of the micro-batches with a non-finite loss; all ids if every loss is finite."""
        bad = [ids for ids, loss in zip(self.ids, self.losses, strict=True) if not torch.isfinite(loss)]
        return [name for ids in bad or self.ids for name in ids]


class TrainStep:
    """Turns micro-batches into one optimiser step.

    Args:
        model: The model.
        loss: Computes the loss of a micro-batch.
        optimizer: Over the model's trainable parameters.
        scaler: For fp16; disabled otherwise.
        schedule: The learning rate of a step.
        run: Precision, clipping, seed.
        device: The model's device.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        schedule: optim.Schedule,
        run: RunSettings,
        device: torch.device,
    ) -> None:
        self.model, self.loss, self.optimizer, self.scaler, self.schedule = model, loss, optimizer, scaler, schedule
        self.run, self.device = run, device
        self.parameters = list(optim.trainable(model).values())

    def __call__(
        self, step: int, batch: Sequence[Samples], skipped: int = 0, requests: Requests | None = None
    ) -> StepResult:
        """Take step ``step`` (from 0) on this process's micro-batches.

        Args:
            step: The step.
            batch: Micro-batches, none of them empty.
            skipped: Number of this step's samples that could not be read.
            requests: What this process requests of all.
        """
        seed_all(self.run.seed, step, distributed.rank())
        rate = self.schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        share = _Share()
        for samples in self._runnable(batch):
            self._backward(samples, share)
        result = self._exchange(share, skipped, requests or Requests(), rate)
        if result.outcome == "ok":
            sum_gradients(self.parameters)
            self._update(result)
        if result.outcome == "nonfinite":
            result.suspects = [name for names in distributed.gather_everywhere(share.suspects()) for name in names]
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _runnable(self, batch: Sequence[Samples]) -> Sequence[Samples]:
        """The micro-batches to run: under FSDP the same number on every rank, since each forward gathers weights."""
        if self.run.parallel != "fsdp" or not distributed.in_group():
            return batch
        return batch[: min(distributed.gather_everywhere(len(batch)))]

    def _backward(self, samples: Samples, share: _Share) -> None:
        with autocast(self.run.precision, self.device):
            loss, tokens = self.loss(self.model, samples)
        loss_sum = loss.float() * tokens
        if loss_sum.requires_grad:  # a batch may pass none of the parts that `run.train` chooses
            self.scaler.scale(loss_sum).backward()
        share.losses.append(loss_sum.detach().double())
        share.tokens.append(tokens.detach().double())
        share.ids.append(sample_ids(samples))

    def _exchange(self, share: _Share, skipped: int, requests: Requests, rate: float) -> StepResult:
        """Sum losses, counts and requests over processes, and decide the outcome alike on all of them."""
        zero = torch.zeros((), device=self.device, dtype=torch.float64)
        counts = [sum(map(len, share.ids)), skipped, requests.save, requests.stop]
        own = [sum(share.losses, zero), sum(share.tokens, zero), *(zero + count for count in counts)]
        loss, tokens, samples, unread, save, stop = distributed.sum_over_ranks(torch.stack(own)).tolist()
        outcome: Literal["ok", "empty", "nonfinite"] = "ok" if tokens else "empty"
        if not math.isfinite(loss):
            outcome = "nonfinite"
        return StepResult(
            outcome,
            loss / max(tokens, 1.0),
            int(tokens),
            int(samples),
            int(unread),
            rate,
            requests=Requests(save > 0, stop > 0),
        )

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


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over all processes, in place; a parameter without a gradient on every process keeps none.

    The trained part is small (110 M parameters at the paper's size), so all gradients travel in one flat fp32 buffer.
    """
    if not distributed.in_group():
        return
    has = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=parameters[0].device)
    grads = [parameter.grad if parameter.grad is not None else torch.zeros_like(parameter) for parameter in parameters]
    flat = distributed.sum_over_ranks(torch.cat([has, *(grad.reshape(-1).float() for grad in grads)]))
    counts, values = flat[: len(parameters)].tolist(), flat[len(parameters) :]
    for parameter, count, part in zip(parameters, counts, values.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype) if count else None


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The precision of a forward; a CPU without half-precision instructions computes in fp32."""
    dtype = _AUTOCAST.get(precision)
    slow = dtype is not None and device.type == "cpu" and slow_on_cpu(dtype)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None and not slow)


def seed_all(*numbers: int) -> None:
    """Seed all random generators from numbers.

    What a step draws is a function of seed, step and rank: neither a validation between two steps nor resuming changes
    it, and a checkpoint needs no generator's state.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # where CUDA is never used, torch.manual_seed would queue a call per step
        torch.cuda.manual_seed(seed)


def sample_ids(samples: Samples) -> Sequence[str]:
    """The ids of a batch's samples, under the name that its data set uses."""
    for key in ("sample_id", "image_id", "question_id", "instance_id"):
        if key in samples:
            return [str(name) for name in samples[key]]
    lengths = [len(value) for value in samples.values() if isinstance(value, (list, Tensor)) and len(value)]
    return ["?"] * (lengths[0] if lengths else 0)
