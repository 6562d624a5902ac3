"""The ``model`` section of a configuration. This module builds nothing and opens no file."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from pydantic import Field

from lavis_chatbridge.config import Settings, parse
from lavis_chatbridge.errors import ConfigError

log = logging.getLogger(__name__)

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]
Layout: TypeAlias = Literal["text", "original"]
TemplateName: TypeAlias = Literal["human_assistant", "vicuna_v1", "tokenizer"]
Quantization: TypeAlias = Literal["8bit", "4bit"]
DeviceMap: TypeAlias = Literal["auto", "balanced", "balanced_low_0", "sequential"]
Weights: TypeAlias = str | tuple[str, ...]
"""A path, a hub id, an address, or a list of alternatives: see :mod:`lavis_chatbridge.hub`."""

_LARGEST, _MOST_LAYERS = 65_536, 256


class EncoderSettings(Settings):
    """What the image and the audio encoder have in common."""

    encoder: str
    """The architecture: a key of :data:`lavis_chatbridge.models.encoders.VISION` or ``AUDIO``."""

    weights: Weights | None = None
    """The file or folder of the weights. Null: randomly initialised."""

    dtype: Precision = "float32"
    """The precision that the frozen encoder runs in."""

    name: str | None = None
    """timm: the architecture (``vit_base_patch16_siglip_224``); null reads it from the folder's config.json."""

    layer: int = -1
    """timm and transformers: the block whose output is taken; -1 is the last one (after its final norm)."""

    class_token: bool = True
    """timm and transformers: keep tokens before the patches (class and register tokens)."""

    pool: int = 1
    """timm and transformers: this many neighbouring tokens (in a grid: of each axis) become their mean."""

    def check(self) -> Iterable[str]:
        """Yield contradictions."""
        if self.pool < 1:
            yield f"pool {self.pool} is not positive"
        if self.encoder in ("eva", "beats") and (self.pool > 1 or self.layer != -1 or not self.class_token):
            yield f"layer, class_token and pool are for timm and transformers, not for encoder {self.encoder}"


class VisionSettings(EncoderSettings):
    """The image and video encoder. The sizes are EVA's, by default EVA-ViT-G's; other encoders bring their own."""

    encoder: str = "eva"
    config: dict[str, Any] | None = None
    """transformers: ``model_type`` and sizes, for random weights."""

    image_size: int = 224
    """Height and width of an image in pixels."""

    patch_size: int = 14
    """Height and width of a patch in pixels."""

    width: int = 1408
    depth: int = 39
    heads: int = 16
    mlp_ratio: float = 4.3637

    @property
    def tokens(self) -> int:
        """EVA's tokens of one image."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def check(self) -> Iterable[str]:
        """Yield contradictions."""
        yield from super().check()
        if self.patch_size < 1 or self.image_size < self.patch_size or self.image_size % self.patch_size:
            yield f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
        if self.heads < 1 or self.width % self.heads:
            yield f"width {self.width} is not a multiple of heads {self.heads}"


class BeatsConfig(Settings):
    """Sizes of a BEATs encoder; field names are those of ``cfg`` in published checkpoints, defaults BEATs_iter3+."""

    input_patch_size: int = 16
    embed_dim: int = 512
    encoder_layers: int = 12
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    conv_bias: bool = False
    conv_pos: int = 128
    conv_pos_groups: int = 16
    deep_norm: bool = True
    relative_position_embedding: bool = True
    gru_rel_pos: bool = True
    num_buckets: int = 320
    max_distance: int = 800

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any]) -> BeatsConfig:
        """The configuration in a published checkpoint; keys for training only are ignored.

        Raises:
            ConfigError: If the checkpoint uses a variant of the architecture that is not built here.
        """
        for key, built in (("layer_norm_first", False), ("activation_fn", "gelu")):
            if cfg.get(key, built) != built:
                raise ConfigError(f"BEATs with {key}={cfg[key]!r} is not supported, only {key}={built!r}")
        return parse(cls, {key: value for key, value in cfg.items() if key in cls.model_fields}, "BEATs")

    def check(self) -> Iterable[str]:
        """Yield contradictions."""
        names = ("input_patch_size", "embed_dim", "encoder_embed_dim", "encoder_ffn_embed_dim", "conv_pos")
        sizes = {name: getattr(self, name) for name in (*names, "num_buckets")}
        wrong = [f"{name} {size}" for name, size in sizes.items() if not 1 <= size <= _LARGEST]
        if wrong or not 1 <= self.encoder_layers <= _MOST_LAYERS:
            yield f"sizes from 1 to {_LARGEST} and up to {_MOST_LAYERS} layers are built, found " + ", ".join(
                [*wrong, f"encoder_layers {self.encoder_layers}"]
            )
        width, heads, groups = self.encoder_embed_dim, self.encoder_attention_heads, self.conv_pos_groups
        if heads < 1 or width % heads:
            yield f"encoder_embed_dim {width} is not a multiple of encoder_attention_heads {heads}"
        if groups < 1 or width % groups:
            yield f"encoder_embed_dim {width} is not a multiple of conv_pos_groups {groups}"
        if self.num_buckets < 4 or self.max_distance <= self.num_buckets // 4:
            yield f"max_distance {self.max_distance} must exceed a quarter of num_buckets {self.num_buckets} (4 up)"


class AudioSettings(EncoderSettings):
    """The audio encoder."""

    encoder: str = "beats"
    config: BeatsConfig | dict[str, Any] | None = Field(None, union_mode="left_to_right")
    """BEATs: its sizes, if the file does not hold them; transformers: ``model_type`` and sizes, for random weights."""

    mask_padding: bool = True
    """Hide the padding of clips that are not full. The original feeds zeros and hides nothing."""

    def check(self) -> Iterable[str]:
        """Yield contradictions."""
        yield from super().check()
        if self.encoder == "beats" and isinstance(self.config, dict):
            try:
                parse(BeatsConfig, self.config, "config")
            except ConfigError as error:
                yield str(error)


class PerceiverSettings(Settings):
    """The shared perceiver; the default sizes are those of BLIP-2's Q-Former."""

    weights: Weights | None = None
    """A BLIP-2 file for query tokens, perceiver and ``ln_vision``. Null: randomly initialised."""

    width: int = 768
    """Width of the query vectors."""

    layers: int = 12
    heads: int = 12
    feed_forward: int = 3072
    cross_attention_every: int = 2
    """Layers 0, this number, twice this number, ... have a cross-attention."""

    queries: int = 32
    """Query tokens for each medium."""

    dropout: float = 0.1
    norm_eps: float = 1e-12
    initializer_range: float = 0.02
    """Standard deviation of randomly initialised weights and query tokens."""

    frozen: bool = False
    """Train the projection (and temporal positions) only."""

    video_queries: Literal["joint", "per_frame"] = "joint"
    """``joint`` reads all frames of a video at once; ``per_frame`` each frame alone (the original's stage 3)."""

    def check(self) -> Iterable[str]:
        """Yield contradictions."""
        if self.heads < 1 or self.width % self.heads:
            yield f"width {self.width} is not a multiple of heads {self.heads}"
        if not 0 <= self.dropout < 1:
            yield f"dropout {self.dropout} is not in [0, 1)"


class LoraSettings(Settings):
    """Adapters on the language model, trained beside the bridge (extra ``lora``)."""

    rank: int = 8
    alpha: float = 16.0
    """An update is scaled by alpha over rank."""

    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """Last parts of the names of the layers that get an adapter; LLaMA's are ``q_proj``, ``k_proj``, ``v_proj``,
    ``o_proj``, ``gate_proj``, ``up_proj``, ``down_proj``."""

    def check(self) -> Iterable[str]:
        """Yield contradictions."""
        if self.rank < 1:
            yield f"rank {self.rank} is not positive"
        if not self.alpha > 0:
            yield f"alpha {self.alpha:g} is not positive"
        if not 0 <= self.dropout < 1:
            yield f"dropout {self.dropout:g} is not in [0, 1)"
        if not self.target_modules:
            yield "target_modules is empty"


class LanguageModelSettings(Settings):
    """The language model."""

    weights: Weights | None = None
    """A folder in Hugging Face's layout. Null: randomly initialised."""

    tokenizer: Weights | None = None
    """The tokenizer's folder, if it is not that of the weights."""

    config: dict[str, Any] | None = None
    """The model's configuration (``model_type`` and sizes), for random weights only."""

    dtype: Precision = "float32"
    """The precision that the frozen model runs in."""

    quantization: Quantization | None = None
    """``8bit`` (LLM.int8) or ``4bit`` (NF4, double quantisation) for the linear layers of the frozen blocks; the rest
    stays in ``dtype``. By bitsandbytes (extra ``quantize``), on a CPU or a CUDA device."""

    device_map: DeviceMap | None = None
    """How accelerate (extra ``device-map``) places the layers on this process's devices, for answering only."""

    lora: LoraSettings | None = None
    """Adapters that are trained beside the bridge."""

    engine: str | None = None
    """The address of a vLLM server that runs the blocks, as ``http://HOST:PORT/v1``; only the embedding table is loaded
    here. For answering only."""

    def check(self) -> Iterable[str]:
        """Yield contradictions."""
        if self.weights is None and (self.config is None or self.tokenizer is None):
            yield "weights is null, so both config (model_type and sizes) and tokenizer (a folder) must be given"
        if self.weights is None and self.quantization is not None:
            yield f"quantization is {self.quantization}, but weights is null: random weights are not quantised"
        if self.weights is None and self.device_map is not None:
            yield f"device_map is {self.device_map}, but weights is null: random weights are not placed on devices"
        if self.engine is None:
            return
        if self.weights is None:
            yield "engine is set, but weights is null: the embedding table comes from the folder that the engine serves"
        if self.lora is not None:
            yield "engine is set with lora: merge the adapters into the folder, vLLM takes none beside embeddings"
        if self.quantization is not None or self.device_map is not None:
            yield "engine is set with quantization or device_map: these are options of the engine then"


class TemporalSettings(Settings):
    """Lengths of the tables of learnt positions in time; longer inputs get interpolated positions."""

    frames: int = 4
    """Frames of a video."""

    clips: int = 2
    """Clips of a sound."""

    initializer_range: float = 0.02
    """Standard deviation of new positions. The tokens that they are added to have 1: a small value hardly changes a
    pretrained perceiver, with a large one a new perceiver can distinguish frames from the start."""

    def check(self) -> Iterable[str]:
        """Yield contradictions."""
        if min(self.frames, self.clips) < 1:
            yield "frames and clips must be at least 1"


class ModelSettings(Settings):
    """A whole ChatBridge."""

    language_model: LanguageModelSettings
    arch: str = "chatbridge"
    """The name registered with LAVIS."""

    model_type: str = "tiny"
    """The YAML that these settings come from."""

    vision: VisionSettings = VisionSettings()
    audio: AudioSettings = AudioSettings(config=None)
    perceiver: PerceiverSettings = PerceiverSettings()
    temporal_positions: TemporalSettings | None = None
    """Positions of frames and clips in time; null as in the released checkpoints."""

    template: TemplateName = "human_assistant"
    """How conversations are worded, in training, evaluation, chat and server: ``human_assistant`` (the paper's),
    ``vicuna_v1``, or ``tokenizer`` (the language model's own chat template)."""

    prompt_layout: Layout = "text"
    """``text`` puts BOS before the text; ``original`` repeats the original's batches exactly."""

    max_text_length: int = 150
    """Text tokens of a training sample; in the original's stage 2, positions of any sort."""

    reply_end: str = "###"
    """The text that ends a reply."""

    encoder_batch: int = 64
    """At most this many frames or clips pass an encoder at once."""

    checkpoint: Weights | None = None
    """A trained ChatBridge."""

    load_finetuned: bool = False
    """LAVIS's switch: load ``finetuned`` instead of ``checkpoint``."""

    finetuned: Weights | None = None
    load_pretrained: bool = True
    """LAVIS's switch: load ``pretrained`` if ``checkpoint`` is null."""

    pretrained: Weights | None = None

    def check(self) -> Iterable[str]:
        """Yield contradictions."""
        if self.max_text_length < 1:
            yield f"max_text_length {self.max_text_length} is not positive"
        if self.encoder_batch < 1:
            yield f"encoder_batch {self.encoder_batch} is not positive"
        if self.prompt_layout == "original" and self.template != "human_assistant":
            yield f"prompt_layout original needs template human_assistant, found {self.template}"
        if self.load_finetuned and self.finetuned is None:
            yield "load_finetuned is true, but finetuned names no checkpoint"

    @property
    def trained(self) -> Weights | None:
        """The trained ChatBridge to load."""
        if self.load_finetuned:
            return self.finetuned
        return self.checkpoint or (self.pretrained if self.load_pretrained else None)


def torch_dtype(name: Precision) -> torch.dtype:
    """The type that frozen parts are loaded in: as named, or fp32 if only a CPU is there that is slow in it."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if torch.cuda.is_available() or not slow_on_cpu(dtype):
        return dtype
    _log_fp32(name)
    return torch.float32


@functools.cache
def slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU lacks instructions for a half precision, in which matmuls are then slower than in fp32."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if not torch.backends.mkldnn.is_available():
        return True
    ops = torch.ops.mkldnn
    return not (ops._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported())


@functools.cache
def _log_fp32(name: str) -> None:
    log.warning(
        "this CPU has no instructions for %s: frozen parts are loaded in float32, which takes twice as much", name
    )
