"""Names and shapes of a ChatBridge's tensors, worked out from its settings: no module is built, LAVIS is not imported.

The tensors are on the meta device: they have shapes and take no memory. Tests hold them against the real modules.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lavis_chatbridge.models.beats import Beats, BeatsConfig
from lavis_chatbridge.models.settings import ModelSettings, PerceiverConfig
from lavis_chatbridge.models.vision import VisionConfig

Shapes = dict[str, Tensor]


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
