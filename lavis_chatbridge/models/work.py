"""How many floating-point operations the products of a training step take, by arithmetic from sizes.

Counted are matrix products alone, two operations for each multiplication: forward for the frozen encoders, forward and
input gradients for the frozen language model, forward and both gradients for what is trained.

Shapes: ``B`` samples, ``L`` positions, ``N`` tokens, ``Q`` query tokens, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lavis_chatbridge.models import lora
from lavis_chatbridge.models.beats import BeatsConfig
from lavis_chatbridge.models.settings import ModelSettings
from lavis_chatbridge.prompting.pieces import Modality

FRAMES = 4
"""Of a video."""
CLIP = 1024
"""Frames of a sound of about 10 s."""
MEL_BINS = 64


@dataclass(frozen=True)
class Work:
    """Floating-point operations of the products of one training step."""

    encoder: float
    bridge: float
    language_model: float

    @property
    def all(self) -> float:
        """Of the whole step."""
        return self.encoder + self.bridge + self.language_model


def work(
    settings: ModelSettings,
    llm: Mapping[str, Any],
    kind: Modality,
    batch: int,
    positions: int,
    targets: int,
    clip: int = CLIP,
) -> Work:
    """What one step computes.

    Args:
        settings: Of the model; positions in time are not counted.
        llm: The language model's ``config.json``.
        kind: Of the media, one for each sample.
        batch: ``B``.
        positions: ``L``, of a row of the language model.
        targets: Supervised positions of the whole batch.
        clip: Frames of a sound.

    Raises:
        KeyError: If the language model is not LLaMA-like.
    """
    own = settings.perceiver
    audio = settings.audio.config or BeatsConfig()
    if kind == "audio":
        tokens = clip // audio.input_patch_size * (MEL_BINS // audio.input_patch_size)
        encoder = _beats(audio, tokens)
    else:
        frames = FRAMES if kind == "video" else 1
        tokens = frames * settings.vision.tokens
        encoder = frames * _vision(settings)
    width, inner = own.width, own.feed_forward
    crossings = -(-own.layers // own.cross_attention_every)
    queries = own.layers * (
        _attention(own.queries, own.queries, width) + 2 * own.queries * (4 * width + 2 * inner) * width
    )
    queries += crossings * (_attention(own.queries, tokens, width) + 2 * own.queries * 2 * width * width)
    queries += 2 * own.queries * width * llm["hidden_size"]
    read = crossings * 2 * tokens * settings.vision.width * 2 * width  # keys and values of frozen tokens
    bridge = 3 * queries + 2 * read
    if kind == "audio":  # whose tokens pass a trained layer first
        bridge += read + 2 * 2 * tokens * audio.encoder_embed_dim * settings.vision.width
    return Work(batch * encoder, batch * bridge, _language_model(llm, batch, positions, targets))


def _attention(queries: int, keys: int, width: int) -> float:
    return 2 * 2 * queries * keys * width


def _vision(settings: ModelSettings) -> float:
    own = settings.vision
    layer = 2 * own.tokens * (4 + 2 * own.mlp_ratio) * own.width**2 + _attention(own.tokens, own.tokens, own.width)
    return own.depth * layer + 2 * (own.tokens - 1) * 3 * own.patch_size**2 * own.width


def _beats(own: BeatsConfig, tokens: int) -> float:
    width, inner = own.encoder_embed_dim, own.encoder_ffn_embed_dim
    layer = 2 * tokens * (4 * width + 2 * inner) * width + _attention(tokens, tokens, width)
    patches = 2 * tokens * own.embed_dim * (own.input_patch_size**2 + width)
    positions = 2 * tokens * width * (width // own.conv_pos_groups) * own.conv_pos
    return own.encoder_layers * (layer + 2 * tokens * width * 8) + patches + positions


def _language_model(llm: Mapping[str, Any], batch: int, positions: int, targets: int) -> float:
    """Forward and gradients of inputs; the attention's backward pass has twice its forward's products."""
    width, layers = llm["hidden_size"], llm["num_hidden_layers"]
    sizes = lora.layer_sizes(llm)
    linear = layers * sum(inputs * outputs for inputs, outputs in sizes.values())
    attention = batch * layers * _attention(positions, positions, sizes["o_proj"][0])
    return 2 * 2 * batch * positions * linear + 3 * attention + 2 * 2 * targets * width * llm["vocab_size"]
