"""One optimiser step: micro-batches in, changed weights out, the same for one process as for many.

The loss of a step is the mean over all target tokens of all micro-batches of all processes. Every process therefore
back-propagates *sums* over its tokens; the gradients are added up over processes and divided by the common number of
tokens. This module knows no data set, no file and no log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lavis_chatbridge.models.settings import slow_on_cpu
from lavis_chatbridge.runners import distributed, gradients, optim
from lavis_chatbridge.runners.settings import RunSettings

Samples = Mapping[str, Any]
Loss = Callable[[nn.Module, Samples], tuple[Tensor, Tensor]]
"""(model, samples) -> (mean loss, number of target tokens), both 0-dimensional."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SMALLEST_SCALE = 1.0


@dataclass
class Wishes:
    """What a signal or the clock asks of all processes at the end of this step."""

    save: bool = False
    stop: bool = False


@dataclass
class StepResult:
    """What one step did, over all processes.

    Attributes:
        outcome: ``ok``, or why no weight changed: ``empty`` (no readable sample), ``nonfinite`` (loss or gradient),
            ``overflow`` (fp16 only: the loss scale was too large and has been lowered).
        loss: Mean over the target tokens.
        tokens: Target tokens.
        samples: Samples that were trained on.
        skipped: Samples that could not be read.
        grad_norm: Norm before clipping.
        rate: Learning rate.
        suspects: Ids of the samples of non-finite micro-batches.
        wishes: What any process asks for.
    """

    outcome: Literal["ok", "empty", "nonfinite", "overflow"]
    loss: float
    tokens: int
    samples: int
    skipped: int
    rate: float
    grad_norm: float = 0.0
    suspects: list[str] = field(default_factory=list)
    wishes: Wishes = field(default_factory=Wishes)


@dataclass
class _Tally:
    """One process's share of a step; the tensors stay on the device until the step ends."""

    losses: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    ids: list[Sequence[str]] = field(default_factory=list)

    def add(self, loss_sum: Tensor, tokens: Tensor, ids: Sequence[str]) -> None:
        self.losses.append(loss_sum.detach().double())
        self.tokens.append(tokens.detach().double())
        self.ids.append(ids)

    def suspects(self) -> list[str]:
        """Ids of the micro-batches whose loss is not finite."""
        finite = [bool(torch.isfinite(loss)) for loss in self.losses]
        return [name for ids, fine in zip(self.ids, finite, strict=True) if not fine for name in ids]


class TrainStep:
    """Turns micro-batches into one optimiser step.

    Args:
        model: What is trained.
        loss: How a micro-batch becomes a loss.
        optimizer: Over the model's trainable parameters.
        scaler: For fp16; disabled otherwise.
        schedule: Sets the learning rate of a step.
        run: Precision, clipping, seed.
        device: Where the model is.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        schedule: optim.WarmupCosine,
        run: RunSettings,
        device: torch.device,
    ) -> None:
        self.model, self.loss, self.optimizer, self.scaler, self.schedule = model, loss, optimizer, scaler, schedule
        self.run, self.device = run, device
        self.parameters = list(optim.trainable(model).values())

    def __call__(self, step: int, batch: Sequence[Samples], skipped: int, wishes: Wishes) -> StepResult:
        """Take step ``step`` (from 0) on this process's micro-batches; ``skipped`` samples of it could not be read."""
        seed_all(self.run.seed, step, distributed.rank())
        rate = self.schedule.step(0, step)
        tally = _Tally()
        for samples in self._runnable(batch):
            self._backward(samples, tally)
        result = self._exchange(tally, skipped, wishes, rate)
        if result.outcome == "ok":
            gradients.share(self.parameters)
            self._update(result)
        if result.outcome == "nonfinite":
            own = tally.suspects() or [name for ids in tally.ids for name in ids]
            result.suspects = [name for names in distributed.gather_everywhere(own) for name in names]
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _runnable(self, batch: Sequence[Samples]) -> Sequence[Samples]:
        """The micro-batches to run; under FSDP every process must run as many, since each pass gathers weights."""
        if self.run.parallel != "fsdp" or not distributed.in_group():
            return batch
        return batch[: min(distributed.gather_everywhere(len(batch)))]

    def _backward(self, samples: Samples, tally: _Tally) -> None:
        with autocast(self.run.precision, self.device):
            loss, tokens = self.loss(self.model, samples)
        loss_sum = loss.float() * tokens
        self.scaler.scale(loss_sum).backward()
        tally.add(loss_sum, tokens, sample_ids(samples))

    def _exchange(self, tally: _Tally, skipped: int, wishes: Wishes, rate: float) -> StepResult:
        """Add up over processes what each one found, and decide alike on all of them."""
        losses = torch.stack(tally.losses).sum() if tally.losses else torch.zeros((), device=self.device)
        tokens = torch.stack(tally.tokens).sum() if tally.tokens else torch.zeros((), device=self.device)
        counts = [sum(map(len, tally.ids)), skipped, float(wishes.save), float(wishes.stop)]
        mine = torch.cat([torch.stack([losses, tokens]).double(), losses.new_tensor(counts, dtype=torch.float64)])
        loss_sum, count, samples, skipped_, save, stop = distributed.sum_over_ranks(mine).tolist()
        result = StepResult("ok", loss_sum / max(count, 1.0), int(count), int(samples), int(skipped_), rate)
        result.wishes = Wishes(save > 0, stop > 0)
        if not math.isfinite(loss_sum):
            result.outcome = "nonfinite"
        elif count == 0:
            result.outcome = "empty"
        return result

    def _update(self, result: StepResult) -> None:
        """Divide the gradients by the number of tokens, clip, step; or say why not."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        grads = gradients.of(self.parameters)
        gradients.scale(grads, 1.0 / result.tokens)
        result.grad_norm = gradients.norm(grads)
        if math.isfinite(result.grad_norm):
            gradients.clip(grads, result.grad_norm, self.run.clip_grad_norm)
            self.scaler.step(self.optimizer)
        else:
            recoverable = self.scaler.is_enabled() and self.scaler.get_scale() > _SMALLEST_SCALE
            result.outcome = "overflow" if recoverable else "nonfinite"
        self.scaler.update()


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The arithmetic of forward passes; that of fp32 on a processor that is slow in a half precision."""
    dtype = _AUTOCAST.get(precision)
    slow = dtype is not None and device.type == "cpu" and slow_on_cpu(dtype)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None and not slow)


def seed_all(*numbers: int) -> None:
    """Seed torch's generators from some numbers.

    Dropout of a step is thus a function of seed, step and rank: an evaluation between two steps, or a resumed run,
    changes nothing.
    """
    seed = int(np.random.SeedSequence([abs(number) for number in numbers]).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # torch.manual_seed would queue a call per step where CUDA is never used
        torch.cuda.manual_seed(seed)


def sample_ids(samples: Samples) -> Sequence[str]:
    """The ids of a batch's samples; LAVIS's own data sets have other names for them."""
    for key in ("sample_id", "image_id", "question_id", "instance_id"):
        if key in samples:
            return [str(name) for name in samples[key]]
    lengths = [len(value) for value in samples.values() if isinstance(value, (list, Tensor)) and len(value)]
    return ["?"] * (lengths[0] if lengths else 0)
