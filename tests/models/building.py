"""Small real models with random weights: a ChatBridge, language models of any family and their replies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lavis_chatbridge.models.decoding import Decoder, Generation, Prefix
from lavis_chatbridge.models.encoders.beats import BeatsConfig
from lavis_chatbridge.models.families import embedding_scale
from lavis_chatbridge.models.layout import Element
from lavis_chatbridge.models.sampling import Sampling
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


SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def tiny(model_type: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **more})
    model: Any = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.embedding_scale = embedding_scale(model)
    return model


class Letters:
    """A tokenizer whose text is the ids, a word each."""

    bos_id, eos_id, pad_id = 1, 2, 0
    byte_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        return [3, 4, 5]

    def decode(self, ids: Any) -> str:
        return "".join(f"<{i}>" for i in ids)


def prompt(*lengths: int, seed: int = 0) -> tuple[list[Element], dict[str, torch.Tensor]]:
    """Text, a medium of three soft tokens, text."""
    chance = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 97, (length,), generator=chance).tolist() for length in lengths]
    elements: list[Element] = [*ids[0], *((f"m{seed}", i) for i in range(3)), *ids[1]]
    return elements, {f"m{seed}": torch.randn(3, 32, generator=chance) * 0.2}


def reply(elements: list[Element], media: Any, prefix: Prefix | None = None, tokens: int = 6, **how: Any) -> Generation:
    tokenizer: Any = Letters()
    sampling = Sampling(max_new_tokens=tokens, **how)
    return Generation(elements, media, tokenizer, sampling, end_ids=frozenset((2,)), prefix=prefix)


def answers(model: Any, replies: list[Generation]) -> list[list[int]]:
    Decoder(model).complete(replies)
    return [one.ids for one in replies]
