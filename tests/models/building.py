"""Small real models for the tests of ``models/``: random weights, the real code path, a sentencepiece tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lavis_chatbridge.models.encoders.beats import BeatsConfig
from lavis_chatbridge.models.settings import (
    AudioSettings,
    LanguageModelSettings,
    ModelSettings,
    PerceiverSettings,
    TemporalSettings,
    VisionSettings,
)

SMALL_BEATS = BeatsConfig(
    embed_dim=24,
    encoder_embed_dim=32,
    encoder_layers=2,
    encoder_ffn_embed_dim=48,
    encoder_attention_heads=4,
    conv_pos=8,
    conv_pos_groups=4,
    num_buckets=16,
    max_distance=40,
)
SMALL_LLM = {
    "model_type": "llama", "vocab_size": 640, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


def small_settings(tokenizer: Path, vocabulary: int = 640, **changes: Any) -> ModelSettings:
    """A model with 28-pixel images and 32 mel bins or any other number of them."""
    values: dict[str, Any] = {
        "vision": VisionSettings(image_size=28, patch_size=14, width=32, depth=2, heads=4),
        "audio": AudioSettings(config=SMALL_BEATS.model_dump()),
        "perceiver": PerceiverSettings(
            width=32, layers=2, heads=4, feed_forward=48, queries=3, dropout=0.0, initializer_range=0.5
        ),
        "language_model": LanguageModelSettings(
            tokenizer=str(tokenizer), config={**SMALL_LLM, "vocab_size": vocabulary, "initializer_range": 0.3}
        ),
        "temporal_positions": TemporalSettings(frames=3, clips=2),
        "max_text_length": 100,
    }
    return ModelSettings(**{**values, **changes})


def small_model(tokenizer: Path, seed: int = 0, **changes: Any) -> Any:
    """The model of :func:`small_settings`, in evaluation mode."""
    from lavis_chatbridge.models.chatbridge import ChatBridge

    torch.manual_seed(seed)
    return ChatBridge(small_settings(tokenizer, **changes)).eval()


def golden_settings(golden: Path, **changes: Any) -> ModelSettings:
    """The model of a folder of golden numbers, all sizes from its ``config.json``."""
    sizes = json.loads((golden / "config.json").read_text())
    vit, qformer = sizes["vit"], sizes["qformer"]
    values: dict[str, Any] = {
        "vision": VisionSettings(
            image_size=vit["img_size"],
            patch_size=vit["patch_size"],
            width=vit["embed_dim"],
            depth=vit["depth"],
            heads=vit["num_heads"],
            mlp_ratio=vit["mlp_ratio"],
        ),
        "audio": AudioSettings(config=BeatsConfig.from_dict(sizes["beats"]).model_dump()),
        "perceiver": PerceiverSettings(
            width=qformer["hidden_size"],
            layers=qformer["num_hidden_layers"],
            heads=qformer["num_attention_heads"],
            feed_forward=qformer["intermediate_size"],
            cross_attention_every=qformer["cross_attention_freq"],
            queries=qformer["num_query_token"],
            norm_eps=qformer["layer_norm_eps"],
            dropout=0.0,
        ),
        "language_model": LanguageModelSettings(
            tokenizer=str(golden / "tokenizer"), config={"model_type": "llama", **sizes["llama"]}
        ),
        "prompt_layout": "original",
    }
    return ModelSettings(**{**values, **changes})
