"""Small real models for the tests of ``models/``: random weights, the real code path, a sentencepiece tokenizer."""

from __future__ import annotations

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
    embed_dim=24, encoder_embed_dim=32, encoder_layers=2, encoder_ffn_embed_dim=48, encoder_attention_heads=4,
    conv_pos=8, conv_pos_groups=4, num_buckets=16, max_distance=40,
)  # fmt: skip
SMALL_LLM = {
    "model_type": "llama", "vocab_size": 640, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


TOKENIZER = Path(__file__).resolve().parents[1] / "golden" / "tokenizer"
"""A sentencepiece tokenizer of 640 tokens."""


def small_settings(tokenizer: Path = TOKENIZER, **changes: Any) -> ModelSettings:
    """A model with 28-pixel images and any number of mel bins that is a multiple of 16."""
    values: dict[str, Any] = {
        "vision": VisionSettings(image_size=28, patch_size=14, width=32, depth=2, heads=4),
        "audio": AudioSettings(config=SMALL_BEATS.model_dump()),
        "perceiver": PerceiverSettings(
            width=32, layers=2, heads=4, feed_forward=48, queries=3, dropout=0.0, initializer_range=0.5
        ),
        "language_model": LanguageModelSettings(
            tokenizer=str(tokenizer), config={**SMALL_LLM, "initializer_range": 0.3}
        ),
        "temporal_positions": TemporalSettings(frames=3, clips=2),
        "max_text_length": 100,
    }
    return ModelSettings(**{**values, **changes})


def small_model(tokenizer: Path = TOKENIZER, seed: int = 0, **changes: Any) -> Any:
    """The model of :func:`small_settings`, in evaluation mode."""
    from lavis_chatbridge.models.chatbridge import ChatBridge

    torch.manual_seed(seed)
    return ChatBridge(small_settings(tokenizer, **changes)).eval()
