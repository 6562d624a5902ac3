"""Differences between families of language models, and the check that a family is supported.

Shapes: ``B`` rows, ``L`` positions, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lavis_chatbridge.errors import ConfigError, PromptError, one_line

TESTED = frozenset((
    "bloom", "cohere2", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "granite", "llama", "mistral",
    "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
))  # fmt: skip
"""Families (``model_type``) that pass every stage in tests/models/test_families.py; others are checked when loaded."""

_TOLERANCE = {torch.float32: 0.01, torch.float16: 0.1}
"""Largest accepted difference between a row's logits alone and in a padded batch, in standard deviations."""


class LanguageModel(nn.Module):
    """The part of transformers' ``PreTrainedModel`` that this package uses; such models are cast to it."""

    config: Any
    embedding_scale: float
    """See :func:`embedding_scale`; set when a model is loaded."""

    get_output_embeddings: Callable[[], nn.Module]
    generate: Callable[..., Tensor]
    """transformers' own generation, which does the beam search."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the embedding table."""
        return self.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the embedding table."""
        return self.get_input_embeddings().weight.device

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding table."""
        raise NotImplementedError


def positions_of(config: Any) -> float:
    """The number of positions of a language model; infinity if its configuration has no limit.

    If rotary factors depend on the length (Phi-3's longrope, dynamic NTK), this is the length at which they change:
    cached keys of one set of factors are wrong together with keys of another.
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


def cache_name(model: nn.Module) -> str:
    """The name of the cache among a model's arguments and in its result; it depends on the version of transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def check_family(model: LanguageModel) -> None:
    """Raise if the bridge cannot use a language model: compares logits of a row alone and in a padded batch.

    Raises:
        ConfigError: If it does not accept embeddings, the rows of its cache cannot be selected or affect each other.
    """
    try:
        stateful = getattr(model, "_is_stateful", False)  # without its kernels, such a model can take gigabytes to run
        fault = "it keeps a recurrent state, not keys and values" if stateful else _difference(model)
    except Exception as error:  # an unsupported model fails in its own way
        fault = f"{type(error).__name__}: {one_line(error, 150)}"
    if fault:
        family = getattr(model.config, "model_type", type(model).__name__)
        raise ConfigError(
            f"language models of family {family!r} are not supported ({fault}); docs/weights.md lists supported ones"
        )


@torch.no_grad()
def _difference(model: LanguageModel) -> str:
    """Error text for an unsupported model, or "".

    A row of a padded batch, continued from a selection of its cache, must get the same logits as alone.
    """
    table = model.get_input_embeddings()
    ids = torch.arange(3, 11, device=table.weight.device) * 7 % model.config.vocab_size
    count = len(ids)
    alone = table(ids[None])
    padded = torch.cat([alone.flip(1), torch.cat([torch.zeros_like(alone[:, :2]), alone[:, :-2]], 1)])
    mask = torch.ones(padded.shape[:2], dtype=torch.long, device=padded.device)
    mask[1, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(inputs_embeds=alone, use_cache=False, return_dict=True).logits[0, -2:].float()
    read = model(inputs_embeds=padded, attention_mask=mask, position_ids=positions, use_cache=True, return_dict=True)
    cache = read.get(name := cache_name(model))
    if cache is None or not hasattr(cache, "batch_select_indices"):
        return "the rows of its cache cannot be selected"
    cache.batch_select_indices(torch.tensor([1], device=padded.device))
    behind = model(
        inputs_embeds=alone[:, -2:],
        attention_mask=torch.cat([mask[1:], mask.new_ones(1, 2)], 1),
        position_ids=torch.tensor([[count - 2, count - 1]], device=padded.device),
        use_cache=True,
        return_dict=True,
        **{name: cache},
    )
    allowed = _TOLERANCE.get(model.dtype, 0.3) * float(expected.std().clamp(min=1e-6))
    difference = float((behind.logits[0].float() - expected).abs().max())
    quantised = getattr(model.config, "quantization_config", None) is not None
    return "" if quantised or difference <= allowed else "a row's logits depend on the padding, the batch or the cache"
