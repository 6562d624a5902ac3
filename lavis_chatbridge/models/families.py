"""transformers' language models: the type for them in this package, their number of positions and embedding scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lavis_chatbridge.errors import PromptError


class LanguageModel(nn.Module):
    """The part of transformers' ``PreTrainedModel`` that this package uses; such models are cast to it."""

    config: Any
    dtype: torch.dtype
    device: torch.device
    embedding_scale: float
    """See :func:`embedding_scale`; set when a model is loaded."""
    get_input_embeddings: Callable[[], nn.Embedding]
    get_output_embeddings: Callable[[], nn.Module]
    generate: Callable[..., Tensor]
    """transformers' own generation, which does the beam search."""


def positions_of(config: Any) -> float:
    """The number of positions of a language model; infinity if its configuration has no limit.

    Some models change their rotary factors at a length (Phi-3's longrope, dynamic NTK); the number is then that length.
    Beyond this length the model rotates keys differently, so keys cached before it cannot be used after it.
    """
    own = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not own:
        return math.inf
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if nested := [one for one in rope.values() if isinstance(one, dict)]:  # one for each type of layer
        rope = next((one for one in nested if one.get("factor")), nested[0])
    variant, factor = rope.get("rope_type", rope.get("type")), rope.get("factor", 1)
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if variant in ("longrope", "dynamic", "su"):
        return original or own
    if variant == "yarn":
        return max(own, factor * (original or own))
    return own * factor if variant == "linear" else own  # Vicuna 1.5 16k: 4096 positions of LLaMA, stretched by 4


def free_positions(config: Any, length: int) -> float:
    """The number of tokens that can follow ``length`` positions; the last token needs no position.

    Raises:
        PromptError: If there are fewer than ``length`` positions.
    """
    most = positions_of(config)
    if length > most:
        raise PromptError(
            f"a prompt has {length} positions with its media, the language model at most {most:g}: shorten it"
        )
    return most - length + 1


def embedding_scale(model: LanguageModel) -> float:
    """The factor by which a model's forward pass multiplies its input embeddings.

    Soft tokens are divided by it, so that the first block reads the same values in every version of
    transformers: since 5.4, Gemma's factor is inside the embedding layer.
    """
    if model.config.model_type in ("gemma", "gemma2") and not hasattr(model.get_input_embeddings(), "embed_scale"):
        return math.sqrt(model.config.hidden_size)
    return float(getattr(model.config, "embedding_multiplier", 1.0))  # Granite
