"""Estimates the device memory of one training process from a model on the meta device.

Weights, gradients and optimiser state are exact; activations are those of a LLaMA-like language model.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lavis_chatbridge import hub
from lavis_chatbridge.models import state_dicts
from lavis_chatbridge.models.encoders import build_audio, build_vision
from lavis_chatbridge.models.encoding import build_perceiver
from lavis_chatbridge.models.settings import EncoderSettings, LanguageModelSettings, ModelSettings, Weights, torch_dtype

_BYTES = {"8bit": 1.01, "4bit": 0.52}
"""Bytes per quantised parameter, scales included."""


def training_memory(settings: ModelSettings, batch: int, checkpointing: bool = False) -> dict[str, int]:
    """Bytes by part, for micro-batches of ``batch`` samples with one medium and ``max_text_length`` text tokens.

    With ``checkpointing`` the language model's activations are recomputed.
    """
    own, perceiver = settings.language_model, settings.perceiver
    with state_dicts.on_meta():
        llm = _language_model(own)
        vision, audio = build_vision(_bare(settings.vision)), build_audio(_bare(settings.audio))
        trained = _count(build_perceiver(perceiver, vision.width))
    config, half = llm.config, torch_dtype(own.dtype).itemsize
    embeddings = llm.get_input_embeddings().weight.numel() * (1 if config.tie_word_embeddings else 2)
    trained += audio.width * vision.width + perceiver.width * (config.hidden_size + 2 * perceiver.queries)
    blocks = (_count(llm) - embeddings) * _BYTES.get(own.quantization or "", half)
    positions = batch * (perceiver.queries + settings.max_text_length)
    layer = positions * (8 * config.hidden_size + 3 * config.intermediate_size) * half
    kept = positions * config.hidden_size * half
    layers = config.num_hidden_layers
    parts = {
        "vision encoder": _count(vision) * torch_dtype(settings.vision.dtype).itemsize,
        "audio encoder": _count(audio) * torch_dtype(settings.audio.dtype).itemsize,
        "language model": int(blocks) + embeddings * half,
        "trained weights, gradients, AdamW": trained * 16,
        "activations": layers * kept + layer if checkpointing else layers * layer,
        "logits": min(positions, 1024) * config.vocab_size * 8,
        "CUDA": 600 << 20,
    }
    return parts | {"slack": sum(parts.values()) // 10}


def _language_model(own: LanguageModelSettings) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    described = _config_of(own.weights) if own.weights is not None else dict(own.config or {})
    config = AutoConfig.for_model(described.pop("model_type", "llama"), **described)
    return AutoModelForCausalLM.from_config(config.get_text_config())


def _bare(own: EncoderSettings) -> Any:
    """An encoder's settings without weights; its sizes are read from the weights' folder."""
    if own.weights is None or own.encoder not in ("timm", "transformers"):
        return own.model_copy(update={"weights": None})
    config = _config_of(own.weights)
    return own.model_copy(update={"weights": None, "config": config, "name": own.name or config.get("architecture")})


def _config_of(weights: Weights) -> dict[str, Any]:
    return hub.read_config(hub.find(weights, "weights", "processor"))


def _count(module: nn.Module | Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
