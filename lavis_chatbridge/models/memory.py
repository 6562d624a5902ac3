"""Device memory of one training process, estimated: the model is built without memory and its parameters are counted.

Weights, gradients and optimiser state are exact; activations are those of a LLaMA-like language model.
"""

from __future__ import annotations

from typing import Any

from lavis_chatbridge import hub
from lavis_chatbridge.models import state_dicts
from lavis_chatbridge.models.encoders import build_audio, build_vision
from lavis_chatbridge.models.perceiver import build_perceiver
from lavis_chatbridge.models.settings import EncoderSettings, ModelSettings, torch_dtype

_CUDA = 600 << 20
_BYTES = {"8bit": 1.01, "4bit": 0.52}
"""Bytes of a quantised parameter with its scales."""


def training_memory(settings: ModelSettings, batch: int, checkpointing: bool = False) -> dict[str, int]:
    """Bytes by part, for micro-batches of samples with one medium and the longest text.

    Args:
        settings: The model's settings.
        batch: Samples of a micro-batch.
        checkpointing: Whether the language model's activations are recomputed.

    Raises:
        CheckpointError: If a part's ``config.json`` is neither on this disk nor can be fetched.
    """
    with state_dicts.on_meta():
        config, llm = _language_model(settings)
        vision, audio = build_vision(_bare(settings.vision)), build_audio(_bare(settings.audio))
        perceiver = build_perceiver(settings.perceiver, vision.width)
    own = settings.language_model
    half = torch_dtype(own.dtype).itemsize
    embeddings = llm.get_input_embeddings().weight.numel() * (1 if config.tie_word_embeddings else 2)
    bridge = _count(perceiver) + audio.width * vision.width + settings.perceiver.width * config.hidden_size
    bridge += 2 * settings.perceiver.queries * settings.perceiver.width
    blocks = (_count(llm) - embeddings) * _BYTES.get(own.quantization or "", half)
    positions = batch * (settings.perceiver.queries + settings.max_text_length)
    layer = positions * (8 * config.hidden_size + 3 * config.intermediate_size) * half
    kept = positions * config.hidden_size * half
    layers = config.num_hidden_layers
    parts = {
        "vision encoder": _count(vision) * torch_dtype(settings.vision.dtype).itemsize,
        "audio encoder": _count(audio) * torch_dtype(settings.audio.dtype).itemsize,
        "language model": int(blocks) + embeddings * half,
        "trained weights, gradients, AdamW": bridge * 16,
        "activations": layers * kept + layer if checkpointing else layers * layer,
        "logits": min(positions, 1024) * config.vocab_size * 8,
        "CUDA": _CUDA,
    }
    return parts | {"slack": sum(parts.values()) // 10}


def _language_model(settings: ModelSettings) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    own = settings.language_model
    if own.weights is None:
        values = dict(own.config or {})
        config = AutoConfig.for_model(values.pop("model_type", "llama"), **values)
    else:
        place = hub.find(own.weights, "model.language_model.weights", "processor")
        config = AutoConfig.from_pretrained(str(place), local_files_only=True)
    config = config.get_text_config()
    return config, AutoModelForCausalLM.from_config(config)


def _bare(settings: EncoderSettings) -> Any:
    """The settings of an encoder without its weights; the configuration in their folder takes their place."""
    if settings.weights is None or settings.encoder not in ("timm", "transformers"):
        return settings.model_copy(update={"weights": None})
    config = hub.read_config(hub.find(settings.weights, "weights", "processor"))
    changes = {"weights": None, "config": config, "name": settings.name or config.get("architecture")}
    return settings.model_copy(update=changes)


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
