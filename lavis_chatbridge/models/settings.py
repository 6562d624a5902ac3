"""The ``model`` section of a configuration. This module builds nothing and opens no file."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from lavis_chatbridge.config import Settings

log = logging.getLogger(__name__)

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]
Layout: TypeAlias = Literal["text", "original"]
Name: TypeAlias = Annotated[str, Field(min_length=1)]
Weights: TypeAlias = Name | tuple[Name, ...]
"""A path, a hub id, a URL, or a list of alternatives: see :mod:`lavis_chatbridge.hub`."""

Share: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


class EncoderSettings(Settings):
    encoder: str
    """``eva``, ``beats``, ``timm``, ``transformers``, or your own ``MODULE:FUNCTION``."""
    weights: Weights | None = None
    """The file or folder of the weights. Null: randomly initialised."""
    config: dict[str, Any] | None = None
    """Sizes for random weights (transformers: with ``model_type``), or for a BEATs file without a configuration."""
    dtype: Precision = "float32"
    """The precision that the frozen encoder runs in."""
    name: str | None = None
    """timm: the architecture (``vit_base_patch16_siglip_224``); null reads it from the folder's config.json."""
    layer: int = -1
    """timm and transformers: use the output of this block; -1 is the last one (after the final norm)."""
    class_token: bool = True
    """timm and transformers: keep the tokens before the patches (class and register tokens)."""
    pool: PositiveInt = 1
    """timm and transformers: average this many neighbouring tokens (in a grid: along each axis)."""

    def check(self) -> Iterable[str]:
        if self.encoder in ("eva", "beats") and (self.pool > 1 or self.layer != -1 or not self.class_token):
            yield f"layer, class_token and pool are for timm and transformers, not for encoder {self.encoder}"


class VisionSettings(EncoderSettings):
    """The image and video encoder. The sizes are only for EVA, by default those of EVA-ViT-G."""

    encoder: str = "eva"
    image_size: int = 224
    patch_size: PositiveInt = 14
    width: int = 1408
    depth: int = 39
    heads: PositiveInt = 16
    mlp_ratio: float = 4.3637

    def check(self) -> Iterable[str]:
        yield from super().check()
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            yield f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
        if self.width % self.heads:
            yield f"width {self.width} is not a multiple of heads {self.heads}"


class AudioSettings(EncoderSettings):
    encoder: str = "beats"
    mask_padding: bool = True
    """Mask the padding of clips that are not full. The original does not mask it."""


class PerceiverSettings(Settings):
    """The shared perceiver; the default sizes are those of BLIP-2's Q-Former."""

    weights: Weights | None = None
    """A BLIP-2 file for query tokens, perceiver and ``ln_vision``. Null: randomly initialised."""
    width: int = 768
    layers: int = 12
    heads: PositiveInt = 12
    feed_forward: int = 3072
    cross_attention_every: int = 2
    """Every n-th layer, from layer 0, has a cross-attention."""
    queries: int = 32
    """Number of query tokens per medium."""
    dropout: Share = 0.1
    norm_eps: float = 1e-12
    initializer_range: float = 0.02
    """Standard deviation of randomly initialised weights and query tokens."""
    video_queries: Literal["joint", "per_frame"] = "joint"
    """``joint``: the queries read all frames of a video at once; ``per_frame``: each frame (the original's stage 3)."""

    def check(self) -> Iterable[str]:
        if self.width % self.heads:
            yield f"width {self.width} is not a multiple of heads {self.heads}"


class LoraSettings(Settings):
    """LoRA adapters in the language model, trained together with the bridge (extra ``lora``)."""

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: Share = 0.05
    target_modules: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)
    """Name endings of the layers that get an adapter; LLaMA's are ``q_proj``, ``k_proj``, ``v_proj``,
    ``o_proj``, ``gate_proj``, ``up_proj``, ``down_proj``."""


class LanguageModelSettings(Settings):
    weights: Weights | None = None
    """A folder in Hugging Face's layout. Null: randomly initialised."""
    tokenizer: Weights | None = None
    """The tokenizer's folder; null: the folder of the weights."""
    config: dict[str, Any] | None = None
    """The model's configuration (``model_type`` and sizes), for random weights only."""
    dtype: Precision = "float32"
    """The precision that the frozen model runs in."""
    quantization: Literal["8bit", "4bit"] | None = None
    """``8bit`` (LLM.int8) or ``4bit`` (NF4, double quantisation) for the linear layers of the frozen blocks; the rest
    stays in ``dtype``. Uses bitsandbytes (extra ``quantize``), on a CPU or a CUDA device."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """How accelerate (extra ``device-map``) distributes the layers over this process's devices; inference only."""
    lora: LoraSettings | None = None
    """Adapters that are trained together with the bridge; null: none."""
    engine: str | None = None
    """The address of a vLLM server that runs the blocks, as ``http://HOST:PORT/v1``; only the embedding table is loaded
    in this process. Inference only."""

    def check(self) -> Iterable[str]:
        if self.weights is None and (self.config is None or self.tokenizer is None):
            yield "weights is null, so both config (model_type and sizes) and tokenizer (a folder) must be given"
        for name in ("quantization", "device_map", "engine"):
            if self.weights is None and getattr(self, name) is not None:
                yield f"{name} is {getattr(self, name)}, but weights is null: it needs the weights of a folder"
        if self.engine is not None and self.lora is not None:
            yield "engine is set with lora, but vLLM has no LoRA for embeddings: merge the adapters into the folder"
        if self.engine is not None and (self.quantization is not None or self.device_map is not None):
            yield "engine is set with quantization or device_map: use the options of the engine instead"


class TemporalSettings(Settings):
    """Sizes of the tables of learnt temporal positions; positions of longer inputs are interpolated."""

    frames: PositiveInt = 4
    """Number of video frames in the table."""
    clips: PositiveInt = 2
    """Number of audio clips in the table."""
    initializer_range: float = 0.02
    """Standard deviation of new positions; the encoder tokens have 1. A small value hardly affects a pretrained
    perceiver; with a large one, a new perceiver can distinguish frames from the start."""


class ModelSettings(Settings):
    """All settings of a ChatBridge."""

    language_model: LanguageModelSettings
    arch: str = "chatbridge"
    """The name registered with LAVIS."""
    model_type: str = "tiny"
    """The shipped YAML with the defaults."""
    vision: VisionSettings = VisionSettings()
    audio: AudioSettings = AudioSettings()
    perceiver: PerceiverSettings = PerceiverSettings()
    temporal_positions: TemporalSettings | None = None
    """Learnt temporal positions of frames and clips; null: none, as in the released checkpoints."""
    template: Literal["human_assistant", "vicuna_v1", "tokenizer"] = "human_assistant"
    """Prompt format of conversations in training, evaluation, chat and server: ``human_assistant`` (the paper's),
    ``vicuna_v1``, or ``tokenizer`` (the language model's own chat template)."""
    prompt_layout: Layout = "text"
    """``text``: BOS first, padding on the right; ``original``: exactly the original's batches."""
    max_text_length: PositiveInt = 150
    """Most text tokens of a training sample; in the original's stage 2, most positions of any type."""
    reply_end: str = "###"
    """The text that ends a reply."""
    encoder_batch: PositiveInt = 64
    """Most frames or clips to encode at once."""
    checkpoint: Weights | None = None
    """Weights of a trained ChatBridge; null: the bridge is untrained."""

    def check(self) -> Iterable[str]:
        if self.prompt_layout == "original" and self.template != "human_assistant":
            yield f"prompt_layout original needs template human_assistant, found {self.template}"


def torch_dtype(name: Precision) -> torch.dtype:
    """The dtype of frozen parts: the named one, or fp32 if there is only a CPU without instructions for it."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if torch.cuda.is_available() or not slow_on_cpu(dtype):
        return dtype
    _log_fp32(name)
    return torch.float32


@functools.cache
def slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU has no instructions for ``dtype``, so that matmuls in it are slower than in fp32."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if not torch.backends.mkldnn.is_available():
        return True
    ops = torch.ops.mkldnn
    return not (ops._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported())


@functools.cache
def _log_fp32(name: str) -> None:
    log.warning(
        "this CPU has no instructions for %s: frozen parts are loaded in float32, which takes twice the memory", name
    )
