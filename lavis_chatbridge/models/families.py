"""What differs between families of language models, and the one check whether a family is supported.

Shapes: ``B`` rows, ``L`` positions, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lavis_chatbridge.errors import ConfigError, PromptError

TESTED = frozenset((
    "bloom", "cohere2", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "granite", "llama", "mistral",
    "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
))  # fmt: skip
"""Families (``model_type``) that pass every stage in tests/models/test_families.py; others are checked when loaded."""

_TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.3, torch.float16: 0.1}
"""How far logits of the same row may differ between two ways to read it, as a share of their standard deviation."""


class LanguageModel(Protocol):
    """The part of transformers' ``PreTrainedModel`` that this package uses."""

    config: Any
    generation_config: Any
    embedding_scale: float
    """See :func:`embedding_scale`; set when a model is loaded."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def __call__(self, **inputs: Any) -> Any: ...
    def get_input_embeddings(self) -> nn.Embedding: ...
    def get_output_embeddings(self) -> nn.Module: ...
    def generate(self, **inputs: Any) -> Tensor: ...


def positions_of(config: Any) -> float:
    """The positions that a language model was made for; infinity where its configuration names none."""
    own = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not own:
        return math.inf
    rope = _rope(config)
    if rope.get("rope_type", rope.get("type")) == "yarn":
        return max(own, rope.get("factor", 1) * (rope.get("original_max_position_embeddings") or own))
    # Vicuna 1.5 16k: 4096 positions of LLaMA, stretched by 4
    return own * rope.get("factor", 1) if rope.get("rope_type", rope.get("type")) in ("linear", "dynamic") else own


def room_behind(config: Any, mask: Tensor) -> float:
    """How many new tokens a language model has positions for behind the longest row; the last one needs none.

    Args:
        config: Its configuration.
        mask: ``[B, L]``, one where a position counts.

    Raises:
        PromptError: If the row itself is too long.
    """
    longest, most = int(mask.sum(1).max()), positions_of(config)
    if longest > most:
        raise PromptError(
            f"a prompt has {longest} positions with its media, the language model at most {most:g}: shorten it"
        )
    return most - longest + 1


def switch_of(config: Any) -> float:
    """The length beyond which rotary factors change (Phi-3's longrope, dynamic NTK); infinity where they never do.

    Keys that were read on one side of it are wrong on the other.
    """
    rope = _rope(config)
    if rope.get("rope_type", rope.get("type")) not in ("longrope", "dynamic", "su"):
        return math.inf
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return original or config.max_position_embeddings


def _rope(config: Any) -> dict[str, Any]:
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [one for one in found.values() if isinstance(one, dict)]  # one for each type of layer
    return next((one for one in nested if one.get("factor")), nested[0]) if nested else dict(found)


def keys_and_values(result: Any) -> Any:
    """The cache in a language model's result: ``cache``, in older transformers ``past_key_values``."""
    return result.cache if "cache" in result else getattr(result, "past_key_values", None)


def cache_argument(model: LanguageModel, cache: Any) -> dict[str, Any]:
    """The argument that continues from a cache, whose name depends on the version of transformers."""
    if cache is None:
        return {}
    names = inspect.signature(model.forward).parameters  # type: ignore[attr-defined]
    return {"cache" if "cache" in names else "past_key_values": cache}


def own_precision(part: LanguageModel | Tensor) -> AbstractContextManager:
    """Switches autocast off around a frozen part in half precision, which runs in it; fp32 follows autocast."""
    if part.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(part.device.type, enabled=False)


@torch.no_grad()
def embedding_scale(model: LanguageModel) -> float:
    """The factor by which a model's forward pass multiplies its input embeddings.

    Gemma's is sqrt(D) in transformers before 5.4 and 1 afterwards, when it moved into the embedding layer. Soft tokens
    are divided by it, so that the first block reads the same ones under every version.
    """
    table = model.get_input_embeddings()
    embeds = table(torch.arange(1, 5, device=table.weight.device))[None]
    blocks = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)), None)  # type: ignore[attr-defined]
    if blocks is None:
        return 1.0
    handle = blocks[0].register_forward_pre_hook(_capture, with_kwargs=True)
    try:
        with own_precision(model):
            model(inputs_embeds=embeds, use_cache=False, return_dict=True)
        return 1.0
    except _Captured as captured:
        found = captured.states
    finally:
        handle.remove()
    if not isinstance(found, Tensor) or found.shape != embeds.shape:
        return 1.0
    first, embeds = found.float().cpu(), embeds.float().cpu()
    scale = float((first * embeds).sum() / embeds.square().sum().clamp(min=1e-30))
    proportional = torch.allclose(first, embeds * scale, rtol=0.02, atol=1e-3 * float(first.abs().max()))
    return scale if proportional and abs(scale - 1) > 0.01 else 1.0


class _Captured(Exception):
    """Ends a forward pass at the first block, whose input it holds."""

    def __init__(self, states: Any) -> None:
        super().__init__()
        self.states = states


def _capture(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    raise _Captured(inputs[0] if inputs else named.get("hidden_states"))


@torch.no_grad()
def check_family(model: LanguageModel) -> None:
    """Refuse a language model that the bridge cannot drive, by reading a few positions in two ways.

    A row of a padded batch, continued from a selection of its cache, must get the logits that the row gets alone.

    Raises:
        ConfigError: If it cannot read embeddings, keeps no cache of which rows can be selected, or its rows depend on
            one another.
    """
    family = getattr(model.config, "model_type", type(model).__name__)
    try:
        fault = _difference(model)
    except Exception as error:  # an unsupported model fails in its own way
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    if fault:
        raise ConfigError(
            f"language models of family {family!r} are not supported ({fault}); docs/weights.md lists those that are"
        )


def _difference(model: LanguageModel) -> str:
    """What is wrong with a model, or an empty text."""
    table = model.get_input_embeddings()
    vocabulary = table.weight.shape[0] if table.weight.dim() == 2 else model.config.vocab_size
    ids = torch.arange(3, 11, device=table.weight.device) * 7 % vocabulary
    alone = table(ids[None])
    padded = torch.cat([alone.flip(1), torch.cat([torch.zeros_like(alone[:, :2]), alone[:, :-2]], 1)])
    mask = torch.ones(padded.shape[:2], dtype=torch.long, device=padded.device)
    mask[1, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with own_precision(model):
        expected = model(inputs_embeds=alone, use_cache=False, return_dict=True).logits[0, -2:].float()
        read = model(
            inputs_embeds=padded, attention_mask=mask, position_ids=positions, use_cache=True, return_dict=True
        )
        cache = copy.deepcopy(keys_and_values(read))
        if cache is None or not hasattr(cache, "batch_select_indices"):
            return "it keeps no keys and values of which rows can be selected"
        cache.batch_select_indices(torch.tensor([1], device=padded.device))
        count = alone.shape[1]
        behind = model(
            inputs_embeds=alone[:, -2:],
            attention_mask=torch.cat([mask[1:], mask.new_ones(1, 2)], 1),
            position_ids=torch.tensor([[count - 2, count - 1]], device=padded.device),
            use_cache=True,
            return_dict=True,
            **cache_argument(model, cache),
        )
    found = behind.logits[0].float()
    allowed = _TOLERANCE.get(model.dtype, 0.3) * max(float(expected.std()), 1e-6)
    if getattr(model.config, "quantization_config", None) is not None or bool(
        (found - expected).abs().max() <= allowed
    ):
        return ""
    return "a row's logits depend on the padding, the batch or the cache"
