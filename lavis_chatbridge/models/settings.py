"""The ``model:`` section of a configuration as typed settings. This module builds nothing and opens no file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch

from lavis_chatbridge.models.beats import BeatsConfig
from lavis_chatbridge.models.vision import VisionConfig

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]
Layout: TypeAlias = Literal["text", "original"]
Quantization: TypeAlias = Literal["8bit", "4bit"]
DeviceMap: TypeAlias = Literal["auto", "balanced", "balanced_low_0", "sequential"]


@dataclass(frozen=True)
class VisionSettings(VisionConfig):
    """The image and video encoder.

    Args:
        weights: An EVA-ViT file, or none for random weights.
        dtype: The precision that the frozen encoder runs in.
    """

    weights: str | None = None
    dtype: Precision = "float32"


@dataclass(frozen=True)
class AudioSettings:
    """The audio encoder.

    Args:
        weights: A BEATs file, or none for random weights.
        config: Its sizes, where the file does not hold them (published files do, under ``cfg``).
        mask_padding: Hide the padding of clips that are not full. The original feeds zeros and hides nothing.
        dtype: The precision that the frozen encoder runs in.
    """

    weights: str | None = None
    config: BeatsConfig | None = None
    mask_padding: bool = True
    dtype: Precision = "float32"


@dataclass(frozen=True)
class PerceiverConfig:
    """Sizes of the perceiver; the defaults are those of BLIP-2's Q-Former.

    Args:
        width: Width of the query vectors.
        layers: Number of layers.
        heads: Attention heads.
        feed_forward: Width of the feed-forward part.
        cross_attention_every: A cross-attention stands in layers 0, this number, twice this number and so on.
        queries: Query tokens for each medium.
        dropout: Dropout probability in training.
        norm_eps: Epsilon of the layer norms.
        initializer_range: Standard deviation of random weights and query tokens.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    feed_forward: int = 3072
    cross_attention_every: int = 2
    queries: int = 32
    dropout: float = 0.1
    norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def check(self) -> Iterable[str]:
        """Sizes that do not fit together."""
        if self.heads < 1 or self.width % self.heads:
            yield f"width {self.width} is not a multiple of heads {self.heads}"
        if not 0 <= self.dropout < 1:
            yield f"dropout {self.dropout} is not in [0, 1)"


@dataclass(frozen=True)
class PerceiverSettings(PerceiverConfig):
    """The shared perceiver.

    Args:
        weights: A BLIP-2 file, from which queries, perceiver and ``ln_vision`` are taken, or none for random weights.
        frozen: Train the projection (and temporal positions) only.
        video_queries: ``"joint"`` looks at all frames of a video at once; ``"per_frame"`` looks at each frame alone and
            joins the queries of all (the original's stage 3).
    """

    weights: str | None = None
    frozen: bool = False
    video_queries: Literal["joint", "per_frame"] = "joint"


@dataclass(frozen=True)
class LoraSettings:
    """Adapters on the language model, trained beside the bridge (extra ``lora``).

    Args:
        rank: Rank of the update of a layer.
        alpha: An update is scaled by alpha over rank.
        dropout: Dropout probability of an adapter's input in training.
        target_modules: The last parts of the names of the layers that get one; LLaMA's are ``q_proj``, ``k_proj``,
            ``v_proj``, ``o_proj``, ``gate_proj``, ``up_proj``, ``down_proj``.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")

    def check(self) -> Iterable[str]:
        """Numbers out of range, and adapters on nothing."""
        if self.rank < 1:
            yield f"rank {self.rank} is not positive"
        if not self.alpha > 0:
            yield f"alpha {self.alpha:g} is not positive"
        if not 0 <= self.dropout < 1:
            yield f"dropout {self.dropout:g} is not in [0, 1)"
        if not self.target_modules:
            yield "target_modules is empty"


@dataclass(frozen=True)
class LanguageModelSettings:
    """The language model.

    Args:
        weights: A Hugging Face folder, or none for random weights.
        tokenizer: The tokenizer's folder, where it is not that of the weights.
        config: The model's configuration (``model_type`` and sizes), for random weights only.
        dtype: The precision that the frozen model runs in.
        quantization: ``"8bit"`` (LLM.int8) or ``"4bit"`` (NF4 with scales that are quantised too) holds the linear
            layers of the frozen blocks in fewer bits; what is not quantised, and what goes between layers, stays in
            ``dtype``. By bitsandbytes (extra ``quantize``), on a CPU or a CUDA device.
        device_map: How transformers and accelerate (extra ``device-map``) spread the layers over the devices of this
            process, for answering only; none keeps the model whole, on the device of the rest.
        lora: Adapters that are trained beside the bridge, or none.
    """

    weights: str | None = None
    tokenizer: str | None = None
    config: dict[str, Any] | None = None
    dtype: Precision = "float32"
    quantization: Quantization | None = None
    device_map: DeviceMap | None = None
    lora: LoraSettings | None = None

    def check(self) -> Iterable[str]:
        """Random weights need sizes and a tokenizer, and are neither quantised nor spread."""
        if self.weights is None and (self.config is None or self.tokenizer is None):
            yield "weights is null, so both config (model_type and sizes) and tokenizer (a folder) must be given"
        if self.weights is None and self.quantization is not None:
            yield f"quantization is {self.quantization}, but weights is null: random weights are not quantised"
        if self.weights is None and self.device_map is not None:
            yield f"device_map is {self.device_map}, but weights is null: random weights are not spread over devices"


@dataclass(frozen=True)
class TemporalSettings:
    """Lengths of the tables of learnt positions in time; longer inputs get interpolated positions.

    Args:
        frames: Frames of a video.
        clips: Clips of a sound.
        initializer_range: Standard deviation of the fresh positions. The tokens that they are added to have 1: a small
            value leaves a pretrained perceiver as it is, a large one lets a fresh one tell frames apart from the start.
    """

    frames: int = 4
    clips: int = 2
    initializer_range: float = 0.02

    def check(self) -> Iterable[str]:
        """Tables need an entry."""
        if min(self.frames, self.clips) < 1:
            yield "frames and clips must be at least 1"


@dataclass(frozen=True)
class ModelSettings:
    """A whole ChatBridge.

    Args:
        arch: The name registered with LAVIS.
        model_type: The YAML that these settings come from.
        vision: The image and video encoder.
        audio: The audio encoder.
        perceiver: The shared perceiver.
        language_model: The language model.
        temporal_positions: Positions of frames and clips in time; none as in the released checkpoints.
        prompt_layout: ``"text"`` lays BOS next to the text; ``"original"`` repeats the original's batches exactly.
        max_text_length: Text tokens of a training sample; in the original's stage 2, positions of any sort.
        reply_end: What closes a reply.
        encoder_batch: The most frames or clips that pass an encoder at once.
        checkpoint: A trained ChatBridge, or none.
        load_finetuned: LAVIS's switch: load ``finetuned`` instead of ``checkpoint``.
        finetuned: LAVIS's name for a checkpoint.
        load_pretrained: LAVIS's switch: load ``pretrained`` where ``checkpoint`` is none.
        pretrained: LAVIS's name for a checkpoint.
    """

    language_model: LanguageModelSettings
    arch: str = "chatbridge"
    model_type: str = "tiny"
    vision: VisionSettings = field(default_factory=VisionSettings)
    audio: AudioSettings = field(default_factory=AudioSettings)
    perceiver: PerceiverSettings = field(default_factory=PerceiverSettings)
    temporal_positions: TemporalSettings | None = None
    prompt_layout: Layout = "text"
    max_text_length: int = 150
    reply_end: str = "###"
    encoder_batch: int = 64
    checkpoint: str | None = None
    load_finetuned: bool = False
    finetuned: str | None = None
    load_pretrained: bool = True
    pretrained: str | None = None

    def check(self) -> Iterable[str]:
        """Numbers out of range, and LAVIS's switches without what they switch."""
        if self.max_text_length < 1:
            yield f"max_text_length {self.max_text_length} is not positive"
        if self.encoder_batch < 1:
            yield f"encoder_batch {self.encoder_batch} is not positive"
        if self.load_finetuned and self.finetuned is None:
            yield "load_finetuned is true, but finetuned names no checkpoint"

    @property
    def trained(self) -> str | None:
        """The trained ChatBridge to load, under whichever of the names it stands."""
        if self.load_finetuned:
            return self.finetuned
        return self.checkpoint or (self.pretrained if self.load_pretrained else None)


def torch_dtype(name: Precision) -> torch.dtype:
    """The torch type of a precision's name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
