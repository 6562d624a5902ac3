"""Names and shapes of a ChatBridge's tensors, worked out from its settings: no module is built, LAVIS is not imported.

The tensors are on the meta device: they have shapes and take no memory. Tests hold them against the real modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.models import lora
from lavis_chatbridge.models.beats import Beats, BeatsConfig
from lavis_chatbridge.models.settings import LoraSettings, ModelSettings, PerceiverConfig
from lavis_chatbridge.models.vision import VisionConfig

Shapes = dict[str, Tensor]

_OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LARGEST, _MOST_LAYERS = 10_000_000, 1000


def vision_shapes(config: VisionConfig) -> Shapes:
    """An EVA-ViT's tensors by name."""
    width, patch = config.width, config.patch_size
    inner = int(width * config.mlp_ratio)
    block: dict[str, tuple[int, ...]] = {
        **_norm("norm1", width),
        "attn.q_bias": (width,),
        "attn.v_bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        **_linear("attn.proj", width, width),
        **_norm("norm2", width),
        **_linear("mlp.fc1", width, inner),
        **_linear("mlp.fc2", inner, width),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, config.tokens, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(config.depth):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return _on_meta(shapes)


def beats_shapes(config: BeatsConfig) -> Shapes:
    """A BEATs' tensors by name."""
    with torch.device("meta"):
        return dict(Beats(config).state_dict())


def perceiver_shapes(config: PerceiverConfig, encoder_width: int) -> Shapes:
    """The perceiver's tensors by name, without its constants.

    Args:
        config: Its sizes.
        encoder_width: Width of the tokens that the cross-attention reads.
    """
    width = config.width
    shapes = _norm("bert.embeddings.LayerNorm", width)
    for i in range(config.layers):
        layer = _attention("attention", width, width)
        if i % config.cross_attention_every == 0:
            layer |= _attention("crossattention", width, encoder_width)
        layer |= _linear("intermediate_query.dense", width, config.feed_forward)
        layer |= _linear("output_query.dense", config.feed_forward, width)
        layer |= _norm("output_query.LayerNorm", width)
        shapes |= {f"bert.encoder.layer.{i}.{name}": shape for name, shape in layer.items()}
    return _on_meta(shapes)


def bridge_shapes(settings: ModelSettings, audio_width: int, llm_width: int) -> Shapes:
    """All tensors between the encoders and the language model: what is trained, and the encoders' layer norms.

    Args:
        settings: Of the model.
        audio_width: Width of BEATs' tokens.
        llm_width: Width of the language model's embeddings.
    """
    own, width = settings.perceiver, settings.vision.width
    shapes = {
        **_norm("ln_vision", width),
        **_norm("ln_audio", audio_width),
        **_linear("audio_trans", audio_width, width),
        **_linear("llama_proj", own.width, llm_width),
        "image_query_tokens": (1, own.queries, own.width),
        "audio_query_tokens": (1, own.queries, own.width),
    }
    if (times := settings.temporal_positions) is not None:
        shapes["visual_temporal_pos_embeds"] = (1, times.frames, 1, width)
        shapes["audio_temporal_pos_embeds"] = (1, times.clips, 1, width)
    perceiver = perceiver_shapes(own, width)
    return _on_meta(shapes) | {f"Qformer.{name}": tensor for name, tensor in perceiver.items()}


def llama_shapes(config: Mapping[str, Any]) -> Shapes:
    """A LLaMA's tensors by name, from its ``config.json``.

    Raises:
        CheckpointError: If the configuration lacks a size.
    """
    try:
        width, vocabulary, layers = (int(config[name]) for name in ("hidden_size", "vocab_size", "num_hidden_layers"))
        sizes = {name: (int(inputs), int(outputs)) for name, (inputs, outputs) in lora.layer_sizes(config).items()}
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"a LLaMA's config.json lacks a size, or holds what is none: {error}") from error
    every = (width, vocabulary, *(size for pair in sizes.values() for size in pair))
    if min(every) < 1 or max(every) > _LARGEST or not 1 <= layers <= _MOST_LAYERS:
        raise CheckpointError(f"a LLaMA's config.json holds sizes that no model has: {layers} layers, width {width}")
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    for name, (inputs, outputs) in sizes.items():
        part, biased = ("self_attn", "attention_bias") if name in _OF_ATTENTION else ("mlp", "mlp_bias")
        block[f"{part}.{name}.weight"] = (outputs, inputs)
        if config.get(biased):
            block[f"{part}.{name}.bias"] = (outputs,)
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    for i in range(layers):
        found |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    if not config.get("tie_word_embeddings"):
        found["lm_head.weight"] = (vocabulary, width)
    return _on_meta(found)


def adapter_shapes(config: Mapping[str, Any], adapters: LoraSettings) -> Shapes:
    """The adapters' tensors of a LLaMA by name, as far as they lie on its blocks' linear layers."""
    sizes = lora.layer_sizes(config)
    found: dict[str, tuple[int, ...]] = {}
    for i in range(config["num_hidden_layers"]):
        for name in (name for name in sizes if name in adapters.target_modules):
            layer = f"model.layers.{i}.{'self_attn' if name in _OF_ATTENTION else 'mlp'}.{name}"
            found[f"{layer}.lora_A.default.weight"] = (adapters.rank, sizes[name][0])
            found[f"{layer}.lora_B.default.weight"] = (sizes[name][1], adapters.rank)
    return _on_meta(found)


def _attention(name: str, width: int, read: int) -> dict[str, tuple[int, ...]]:
    return {
        **_linear(f"{name}.self.query", width, width),
        **_linear(f"{name}.self.key", read, width),
        **_linear(f"{name}.self.value", read, width),
        **_linear(f"{name}.output.dense", width, width),
        **_norm(f"{name}.output.LayerNorm", width),
    }


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _on_meta(shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
