"""How much memory a training step takes, by arithmetic from sizes: nothing is built or run.

It is an estimate: weights, gradients and optimiser are exact, activations count the tensors that the backward pass of a
LLaMA-like model keeps, and the allocator's slack is a flat share.

Shapes: ``L`` positions, ``Q`` query tokens, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavis_chatbridge.models import lora, losses, shapes
from lavis_chatbridge.models.beats import BeatsConfig
from lavis_chatbridge.models.settings import ModelSettings, Quantization, torch_dtype

SLACK = 0.08
"""Fragments and the libraries' own buffers, as a share of the rest."""

_CONTEXT = 600 << 20  # what CUDA itself takes of a device
_FP32 = 4
_BLOCK, _SCALES = 64, 256
"""Weights that share a scale in NF4, and scales that share one of their own (QLoRA, arXiv 2305.14314, section 3)."""
_CODE_BOOKS = (16 + 256) * _FP32
"""What the codes of a layer's weights and of its scales stand for."""


def llm_parameters(config: Mapping[str, Any]) -> int:
    """Numbers of a LLaMA-like language model, from its ``config.json``.

    Raises:
        KeyError: If it is no such model.
    """
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    keys = (config.get("num_key_value_heads") or heads) * head
    layer = 2 * width * heads * head + 2 * width * keys + 3 * width * inner + 2 * width
    ends = 1 if config.get("tie_word_embeddings") else 2
    return layers * layer + ends * config["vocab_size"] * width + width


def training_memory(
    settings: ModelSettings,
    llm: Mapping[str, Any],
    batch: int,
    beats: BeatsConfig | None = None,
    checkpointing: bool = False,
    cached: bool = False,
) -> dict[str, int]:
    """Bytes of device memory of one training process, by part.

    Args:
        settings: Of the model.
        llm: The language model's ``config.json``.
        batch: Samples of a micro-batch, each with one medium and the most text.
        beats: Sizes of the audio encoder; those of the settings, or the published ones, without.
        checkpointing: The language model's activations are recomputed.
        cached: The encoders' outputs are read from a cache.

    Raises:
        KeyError: If the language model is not LLaMA-like.
    """
    audio = beats or settings.audio.config or BeatsConfig()
    bridge = shapes.bridge_shapes(settings, audio.encoder_embed_dim, llm["hidden_size"])
    trained = sum(tensor.numel() for name, tensor in bridge.items() if not name.startswith("ln_"))
    if (adapters := settings.language_model.lora) is not None:
        trained += lora.parameter_count(llm, adapters)
    half = torch_dtype(settings.language_model.dtype).itemsize
    parts = {
        "vision encoder": _numbers(shapes.vision_shapes(settings.vision)) * torch_dtype(settings.vision.dtype).itemsize,
        "audio encoder": _numbers(shapes.beats_shapes(audio)) * torch_dtype(settings.audio.dtype).itemsize,
        "language model": _llm_weights(settings, llm, half),
        "trained weights": trained * _FP32,
        "their gradients": trained * _FP32,
        "AdamW": trained * 2 * _FP32,
        "activations of the language model": _llm_activations(settings, llm, batch, half, checkpointing),
        "loss": _loss_buffers(settings, llm, batch, half),
        "activations of the perceiver": _perceiver_activations(settings, batch),
        "encoders at work": 0 if cached else _encoder_buffers(settings, batch),
        "CUDA itself": _CONTEXT,
    }
    parts["slack"] = int(SLACK * sum(parts.values()))
    return parts


def _llm_weights(settings: ModelSettings, llm: Mapping[str, Any], half: int) -> int:
    """Quantised are the linear layers of the blocks; embeddings, norms and the output layer are not."""
    whole = llm_parameters(llm)
    if (how := settings.language_model.quantization) is None:
        return whole * half
    sizes = lora.layer_sizes(llm).values()
    linear = llm["num_hidden_layers"] * sum(inputs * outputs for inputs, outputs in sizes)
    return llm["num_hidden_layers"] * sum(_quantised(how, *size) for size in sizes) + (whole - linear) * half


def _quantised(how: Quantization, inputs: int, outputs: int) -> int:
    """Bytes of a linear layer with all that is needed to read it."""
    weights = inputs * outputs
    if how == "8bit":  # and a scale for each output
        return weights + outputs * _FP32
    scales = -(-weights // _BLOCK)  # one byte each, and their mean
    return -(-weights // 2) + scales + -(-scales // _SCALES) * _FP32 + _FP32 + _CODE_BOOKS


def _llm_activations(
    settings: ModelSettings, llm: Mapping[str, Any], batch: int, half: int, checkpointing: bool
) -> int:
    """Frozen products keep nothing for the backward pass, except those in 8 bits, which keep their input.

    Norms keep their input in fp32, attention its queries, keys, values and output, the feed-forward part the gate
    before and after its activation and what it gates.
    """
    width, inner, layers = llm["hidden_size"], llm["intermediate_size"], llm["num_hidden_layers"]
    positions = batch * (settings.perceiver.queries + settings.max_text_length)
    norms = 2 * width * _FP32
    attention = 4 * width * half
    feed_forward = 3 * inner * half
    layer = norms + attention + feed_forward
    if settings.language_model.quantization == "8bit":  # queries, keys and values have one input, gate and values too
        layer += (2 * width + lora.layer_sizes(llm)["o_proj"][0] + inner) * half
    if (adapters := settings.language_model.lora) is not None:  # each keeps its own input
        sizes = lora.layer_sizes(llm)
        layer += sum(sizes[name][0] for name in adapters.target_modules if name in sizes) * _FP32
    kept = layers * width * half + layer if checkpointing else layers * layer
    return positions * kept


def _loss_buffers(settings: ModelSettings, llm: Mapping[str, Any], batch: int, half: int) -> int:
    """Logits and their gradients at the targets: of all targets at once, or of a chunk where :mod:`losses` can.

    A chunk holds logits in the model's precision and in fp32, which become the gradients; kept for the backward pass
    is one row of the model's width for each target.
    """
    targets, vocabulary = batch * settings.max_text_length, llm["vocab_size"]
    adapters = settings.language_model.lora
    trained = adapters is not None and "lm_head" in adapters.target_modules
    if trained or llm.get("model_type", "llama") not in losses.PLAIN_HEADS:
        return targets * vocabulary * (half + 2 * _FP32)
    rounded = 2 * half if half < _FP32 else 0
    chunk = min(targets, losses.CHUNK) * vocabulary * (_FP32 + rounded)
    return chunk + targets * llm["hidden_size"] * half


def _perceiver_activations(settings: ModelSettings, batch: int) -> int:
    """In fp32: what the trained layers keep of the queries, and keys and values of every encoder token."""
    own = settings.perceiver
    frames = settings.temporal_positions.frames if settings.temporal_positions else 4
    tokens = frames * settings.vision.tokens
    crossings = -(-own.layers // own.cross_attention_every)
    of_queries = own.layers * own.queries * (16 * own.width + 3 * own.feed_forward)
    of_tokens = tokens * (crossings * (2 * own.width + own.heads * own.queries) + 2 * settings.vision.width)
    return batch * (of_queries + of_tokens) * _FP32


def _encoder_buffers(settings: ModelSettings, batch: int) -> int:
    """The largest tensors that live at once in one block, without gradients, and the tokens of all frames."""
    own = settings.vision
    frames = batch * (settings.temporal_positions.frames if settings.temporal_positions else 4)
    half = torch_dtype(own.dtype).itemsize
    at_once = min(frames, settings.encoder_batch) * own.tokens * own.width * (2 + 2 * own.mlp_ratio) * half
    return int(at_once) + frames * own.tokens * own.width * _FP32


def _numbers(tensors: shapes.Shapes) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
