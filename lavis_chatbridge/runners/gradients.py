"""Gradients of several processes as those of one: exchange, norm, scaling.

The trained part is small (110 M values at the paper's size) beside what is frozen, so all its gradients travel in
one flat buffer. That is exact, needs no wrapper around the model, and treats a query set that no process used as
what it is: a parameter without a gradient, which the optimiser leaves alone on every process alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lavis_chatbridge.runners import distributed


def share(parameters: Sequence[nn.Parameter]) -> None:
    """Add up gradients over all processes, in place; what has none anywhere keeps none."""
    if not distributed.in_group():
        return
    has = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=parameters[0].device)
    grads = [parameter.grad if parameter.grad is not None else torch.zeros_like(parameter) for parameter in parameters]
    flat = distributed.sum_over_ranks(torch.cat([has, *(grad.reshape(-1).float() for grad in grads)]))
    counts, values = flat[: len(parameters)].tolist(), flat[len(parameters) :]
    for parameter, count, part in zip(parameters, counts, values.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype) if count else None


def of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients that exist."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def norm(grads: Sequence[Tensor]) -> float:
    """The Euclidean norm of all gradients together; infinite or not a number if one of them is."""
    if not grads:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads)))))


def scale(grads: Sequence[Tensor], factor: float) -> None:
    """Multiply all gradients in place."""
    if grads and factor != 1.0:
        torch._foreach_mul_(list(grads), factor)


def clip(grads: Sequence[Tensor], total: float, limit: float | None) -> None:
    """Scale gradients of norm ``total`` down to ``limit``, where they exceed it."""
    if limit is not None and math.isfinite(total) and total > limit:
        scale(grads, limit / total)
