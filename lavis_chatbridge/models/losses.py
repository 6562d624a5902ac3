"""Cross-entropy at chosen positions of a frozen language model, without keeping their logits.

With a vocabulary of 32,000, the logits of a batch and their gradients are its largest tensors. A position's gradient
depends on its own logits only, so it is computed together with the loss, a few positions at a time.

Shapes: ``K`` positions, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lavis_chatbridge.models.families import LanguageModel

CHUNK = 256
"""Positions whose logits are in memory at once."""

PLAIN_HEADS = frozenset(("llama", "mistral", "qwen2", "qwen3"))
"""Model types of transformers whose logits are the output layer's results; others may scale or cap them."""


def losses_at(model: LanguageModel, rows: Tensor, columns: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
    """Negative log-likelihoods of targets at chosen positions; the output layer sees no others.

    Args:
        model: The language model.
        rows: ``[K]`` rows of the positions.
        columns: ``[K]`` columns of the positions.
        targets: ``[K]`` ids.
        **inputs: The model's inputs.

    Returns:
        ``[K]`` in fp32.
    """
    head: Any = model.get_output_embeddings()
    plain = getattr(model.config, "model_type", None) in PLAIN_HEADS and _is_frozen_linear(head)
    chosen: list[Tensor] = []

    def choose(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        chosen.append(arguments[0][rows, columns])
        return (arguments[0][:0],) if plain else (chosen[0],)

    handle = head.register_forward_pre_hook(choose)
    try:
        logits = model(**inputs, use_cache=False, return_dict=True).logits
    finally:
        handle.remove()
    if not plain:
        return functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
    hidden = chosen[0].to(head.weight.device)
    return chunked_cross_entropy(hidden, head.weight, head.bias, targets.to(hidden.device))


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int = CHUNK
) -> Tensor:
    """``cross_entropy(linear(hidden, weight, bias).float(), targets, reduction="none")`` for a frozen layer.

    Only ``hidden`` (``[K, D]``) gets a gradient; ``chunk`` positions are computed at once.
    """
    result: Any = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, chunk)
    return result


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> Tensor:
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = functional.linear(hidden[part], weight, bias)
            dtype, logits = logits.dtype, logits.float()
            wanted = targets[part].unsqueeze(1)
            total = logits.logsumexp(1, keepdim=True)
            losses[part] = (total - logits.gather(1, wanted)).squeeze(1)
            if slopes is not None:
                shares = logits.sub_(total).exp_()
                shares.scatter_add_(1, wanted, shares.new_full(wanted.shape, -1.0))
                slopes[part] = shares.to(dtype) @ weight.to(dtype)
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (gradients[0].unsqueeze(1) * slopes).to(slopes.dtype), None, None, None, None


def _is_frozen_linear(head: nn.Module) -> bool:
    """Whether an output layer is torch's own, neither trained nor wrapped by LoRA, quantisation or offloading."""
    return type(head) is nn.Linear and not any(p.requires_grad or p.is_meta for p in head.parameters())
