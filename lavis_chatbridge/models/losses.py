"""Cross-entropy of a frozen output layer at chosen positions, a few positions at a time: no logits are kept.

At a vocabulary of 32,000 the logits of a batch and their gradients are its largest tensors. Each position's gradient
needs its own logits only, so it is worked out together with the loss, and the logits are thrown away.

Shapes: ``K`` positions, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lavis_chatbridge.models.language_model import hidden_at, logits_at

CHUNK = 256
"""Positions whose logits live at once."""

PLAIN_HEADS = frozenset(("llama", "mistral", "qwen2", "qwen3"))
"""Model types (of transformers) whose logits are the output layer's results; others scale or cap them afterwards."""


def losses_at(model: Any, rows: Tensor, columns: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
    """Negative log-likelihoods of targets at chosen positions.

    Args:
        model: A causal language model.
        rows: ``[K]`` rows of the positions.
        columns: ``[K]`` columns of the positions.
        targets: ``[K]`` ids.
        **inputs: What the model is given.

    Returns:
        ``[K]`` in fp32.
    """
    head = model.get_output_embeddings()
    if getattr(model.config, "model_type", None) not in PLAIN_HEADS or not _is_frozen_linear(head):
        logits = logits_at(model, rows, columns, **inputs)
        return functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
    hidden = hidden_at(model, rows, columns, **inputs).to(head.weight.device)
    return chunked_cross_entropy(hidden, head.weight, head.bias, targets.to(hidden.device))


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int = CHUNK
) -> Tensor:
    """``cross_entropy(linear(hidden, weight, bias).float(), targets, reduction="none")`` for a frozen layer.

    Args:
        hidden: ``[K, D]``; gradients reach it.
        weight: ``[V, D]``; has no gradient.
        bias: ``[V]`` or none; has no gradient.
        targets: ``[K]``.
        chunk: Positions at once.

    Returns:
        ``[K]`` in fp32.
    """
    result: Any = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, chunk)
    return result


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> Tensor:
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        wanted = ctx.needs_input_grad[0]
        slopes = torch.empty_like(hidden) if wanted else None
        parts = zip(hidden.split(chunk), targets.split(chunk), losses.split(chunk), strict=True)
        for number, (some, their_targets, their_losses) in enumerate(parts):
            logits = functional.linear(some, weight, bias)
            dtype = logits.dtype
            logits = logits.float()
            chosen = their_targets.unsqueeze(1)
            total = logits.logsumexp(1, keepdim=True)
            torch.sub(total, logits.gather(1, chosen), out=their_losses.unsqueeze(1))
            if slopes is not None:
                shares = logits.sub_(total).exp_()
                shares.scatter_add_(1, chosen, shares.new_full(chosen.shape, -1.0))
                slopes[number * chunk : (number + 1) * chunk] = shares.to(dtype) @ weight.to(dtype)
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (gradients[0].unsqueeze(1) * slopes).to(slopes.dtype), None, None, None, None


def _is_frozen_linear(head: Any) -> bool:
    """Whether the output layer is torch's own, neither trained nor wrapped (LoRA, quantised, moved to a disk)."""
    return type(head) is nn.Linear and not any(
        parameter.requires_grad or parameter.is_meta for parameter in head.parameters()
    )
