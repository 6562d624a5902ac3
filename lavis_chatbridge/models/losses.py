"""Cross-entropy at chosen positions of a frozen language model, without keeping their logits.

With a vocabulary of 32,000, logits and their gradients are the largest tensors of a batch. If there are many, they are
computed in chunks of positions, and again in backward. Shapes: ``K`` positions, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lavis_chatbridge.models.families import LanguageModel

LOGITS = 1 << 24
"""The most logits in memory at once: 64 MB in fp32."""

PLAIN_HEADS = frozenset(("llama", "mistral", "qwen2", "qwen3"))
"""Model types in transformers that return the output layer's results as logits; others may scale or cap them."""


def losses_at(model: LanguageModel, rows: Tensor, columns: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
    """``[K]`` negative log-likelihoods in fp32 of targets; the output layer runs on their positions only.

    Args:
        model: The language model.
        rows: ``[K]`` rows of the positions.
        columns: ``[K]`` columns of the positions.
        targets: ``[K]`` ids.
        **inputs: The model's inputs.
    """
    head = model.get_output_embeddings()
    plain = model.config.model_type in PLAIN_HEADS
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
        return _cross_entropy(nn.Identity(), logits, targets)
    chunk = max(1, LOGITS // model.config.vocab_size)
    if len(targets) <= chunk:
        return _cross_entropy(head, chosen[0], targets)
    parts = zip(chosen[0].split(chunk), targets.split(chunk), strict=True)
    each = [checkpoint(_cross_entropy, head, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(each)


def _cross_entropy(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden).float()
    return functional.cross_entropy(logits, targets.to(logits.device), reduction="none")
