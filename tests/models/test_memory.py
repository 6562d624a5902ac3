"""The arithmetic of memory: sizes of known models, and what settings change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lavis_chatbridge.models import losses
from lavis_chatbridge.models.memory import llm_parameters, training_memory
from lavis_chatbridge.models.settings import LoraSettings
from lavis_chatbridge.models.weights_command import model_settings

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}


def test_language_models_have_their_published_sizes() -> None:
    assert llm_parameters({**LLAMA_7B, "vocab_size": 32000}) == 6_738_415_616
    assert llm_parameters({**LLAMA_13B, "vocab_size": 32000}) == 13_015_864_320
    tied = {**LLAMA_7B, "vocab_size": 32000, "tie_word_embeddings": True}
    assert llm_parameters(tied) == 6_738_415_616 - 32000 * 4096
    grouped = {**LLAMA_7B, "vocab_size": 32000, "num_key_value_heads": 8}
    assert llm_parameters(grouped) == 6_738_415_616 - 32 * 2 * 4096 * 3072
    with pytest.raises(KeyError, match="vocab_size"):
        llm_parameters(LLAMA_7B)


def test_parts_at_the_papers_scale() -> None:
    settings = model_settings("vicuna13b")
    llm = {**LLAMA_13B, "vocab_size": 32000}
    parts = training_memory(settings, llm, batch=32)
    assert parts["language model"] == 2 * 13_015_864_320
    assert parts["vision encoder"] == 2 * 985_894_528
    assert parts["AdamW"] == 2 * parts["trained weights"] == 8 * (110_211_200 - 2 * (1408 + 768))
    activations = "activations of the language model"
    assert training_memory(settings, llm, batch=64)[activations] == 2 * parts[activations]
    assert training_memory(settings, llm, batch=32, checkpointing=True)[activations] < parts[activations] / 5
    assert training_memory(settings, llm, batch=32, cached=True)["encoders at work"] == 0
    assert sum(training_memory(settings, llm, batch=1).values()) < sum(parts.values())


def test_the_guide_says_what_fewer_bits_weigh() -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    for told, how in (("half precision", None), ("`8bit`", "8bit"), ("`4bit`", "4bit")):
        sizes = []
        for name, llm in (("vicuna7b", LLAMA_7B), ("vicuna13b", LLAMA_13B)):
            settings = model_settings(name)
            own = dataclasses.replace(settings.language_model, quantization=how)
            settings = dataclasses.replace(settings, language_model=own)
            sizes.append(training_memory(settings, {**llm, "vocab_size": 32000}, batch=1)["language model"] / 1e9)
        assert f"| {told} | {sizes[0]:.2f} GB | {sizes[1]:.2f} GB |" in guide


def test_the_loss_holds_the_logits_of_a_chunk_only() -> None:
    settings = model_settings("vicuna13b")
    llm = {**LLAMA_13B, "vocab_size": 32000}
    chunk = losses.CHUNK * 32000 * (2 + 4 + 2)  # in bf16, in fp32, and the gradients rounded to bf16
    rows = 150 * 5120 * 2  # a sample's gradients at the output layer's input
    assert settings.max_text_length == 150
    assert training_memory(settings, llm, batch=2)["loss"] == chunk + 2 * rows
    assert training_memory(settings, llm, batch=64)["loss"] == chunk + 64 * rows
    assert training_memory(settings, llm, batch=1)["loss"] == 150 * 32000 * 8 + rows

    whole = 64 * 150 * 32000 * (2 + 4 + 4)
    assert training_memory(settings, {**llm, "model_type": "gemma2"}, batch=64)["loss"] == whole
    adapters = LoraSettings(target_modules=("q_proj", "lm_head"))
    own = dataclasses.replace(settings.language_model, lora=adapters)
    assert training_memory(dataclasses.replace(settings, language_model=own), llm, batch=64)["loss"] == whole
