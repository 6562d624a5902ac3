"""The estimate of memory: published parameter counts at real sizes, and its order of magnitude."""

from __future__ import annotations

from typing import Any

import pytest

from lavis_chatbridge.config import parse
from lavis_chatbridge.models.memory import training_memory
from lavis_chatbridge.models.settings import ModelSettings
from lavis_chatbridge.models.weights import model_settings


def sizes(model_type: str, names: str, *numbers: int, **more: Any) -> dict[str, Any]:
    """A configuration of transformers; ``names`` are those of the numbers."""
    return {"model_type": model_type, **dict(zip(names.split(), numbers, strict=True)), **more}


LLM = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
VIT = "hidden_size num_hidden_layers num_attention_heads intermediate_size image_size patch_size"
WHISPER = "d_model encoder_layers encoder_attention_heads encoder_ffn_dim num_mel_bins decoder_layers"
SIZES = {
    "13b": sizes("llama", LLM, 32_000, 5120, 13_824, 40, 40, 40),
    "SmolLM2-360M": sizes("llama", LLM, 49_152, 960, 2560, 32, 15, 5, tie_word_embeddings=True),
    "Qwen3-8B": sizes("qwen3", LLM, 151_936, 4096, 12_288, 36, 32, 8, head_dim=128),
    "siglip2-base": sizes("siglip_vision_model", VIT, 768, 12, 12, 3072, 224, 16),
    "siglip2-so400m": sizes("siglip_vision_model", VIT, 1152, 27, 16, 4304, 384, 14),
    "whisper-small": sizes("whisper", WHISPER, 768, 12, 12, 3072, 80, 1, decoder_attention_heads=12),
    "whisper-large-v3": sizes("whisper", WHISPER, 1280, 32, 20, 5120, 128, 1, decoder_attention_heads=20),
}
TYPES = {
    "vicuna13b": ("13b", None, None),
    "small": ("SmolLM2-360M", "siglip2-base", "whisper-small"),
    "qwen3_8b": ("Qwen3-8B", "siglip2-so400m", "whisper-large-v3"),
}


def shipped(model_type: str) -> ModelSettings:
    """A shipped type with the published sizes in place of its files."""
    values = model_settings(model_type).model_dump()
    llm, vision, audio = TYPES[model_type]
    values["language_model"] |= {"weights": None, "config": SIZES[llm], "tokenizer": "t"}
    values["vision"] |= {"weights": None} | ({"config": SIZES[vision]} if vision else {})
    values["audio"] |= {"weights": None} | ({"config": SIZES[audio]} if audio else {})
    return parse(ModelSettings, values, "model")


@pytest.fixture(autouse=True)
def _a_cpu_with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lavis_chatbridge.models.settings.slow_on_cpu", lambda dtype: False)


@pytest.mark.parametrize(
    ("model_type", "batch", "checkpointing", "gib", "millions"),
    [
        ("small", 8, False, 7, (361.8, 92.9, 88.2)),
        ("qwen3_8b", 16, True, 32, (8190.7, 428.2, 637.0)),
        ("vicuna13b", 32, False, 80, (13015.9, 985.9, 90.3)),
    ],
)
def test_shipped_types_have_published_sizes_and_fit(
    model_type: str, batch: int, checkpointing: bool, gib: int, millions: tuple[float, ...]
) -> None:
    """The batches are those of projects/chatbridge/TYPE/align.yaml."""
    parts = training_memory(shipped(model_type), batch, checkpointing)
    found = [parts[part] / 2e6 for part in ("language model", "vision encoder", "audio encoder")]
    assert found == pytest.approx(millions, abs=0.1)
    assert (gib - 10) * 2**30 < sum(parts.values()) < gib * 2**30
