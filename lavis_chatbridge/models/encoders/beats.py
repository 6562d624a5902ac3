"""BEATs, the audio encoder: maps a log-mel filterbank to one token per 16x16 patch.

This is BEATs (arXiv 2212.09058) as ChatBridge uses it: without waveform input, classification head and dropout (the
encoder is frozen). Parameter names are those of the published checkpoints.

Shapes: ``B`` clips, ``F`` frames of 10 ms, ``M`` mel bins, ``n`` tokens (time outer, mel inner), ``D`` width,
``H`` heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from lavis_chatbridge import hub
from lavis_chatbridge.config import Settings, parse
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.models import state_dicts
from lavis_chatbridge.models.settings import AudioSettings, torch_dtype


class BeatsConfig(Settings):
    """Sizes of a BEATs encoder; names as in ``cfg`` of published checkpoints, defaults of BEATs_iter3+."""

    input_patch_size: PositiveInt = 16
    embed_dim: PositiveInt = 512
    encoder_layers: PositiveInt = 12
    encoder_embed_dim: PositiveInt = 768
    encoder_ffn_embed_dim: PositiveInt = 3072
    encoder_attention_heads: PositiveInt = 12
    conv_pos: PositiveInt = 128
    conv_pos_groups: PositiveInt = 16
    num_buckets: int = Field(default=320, ge=4)
    max_distance: int = 800

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any]) -> BeatsConfig:
        """The sizes in a published checkpoint's ``cfg``; its other keys are the same in all published checkpoints."""
        return parse(cls, {key: value for key, value in cfg.items() if key in cls.model_fields}, "BEATs")


def build_audio(settings: AudioSettings) -> Beats:
    """A BEATs from its own file (with the file's sizes) or a ChatBridge's, or a randomly initialised one."""
    config = parse(BeatsConfig, settings.config or {}, "model.audio.config")
    dtype = torch_dtype(settings.dtype)
    if settings.weights is None:
        return Beats(config).to(dtype)
    file = state_dicts.read(hub.find(settings.weights, "model.audio.weights"))
    with torch.device("meta"):
        encoder = Beats(config if file.cfg is None else BeatsConfig.from_dict(file.cfg))
    own = state_dicts.part(file.tensors, "audio_encoder.") or file.tensors
    tensors = {name: tensor for name, tensor in own.items() if not name.startswith("predictor.")}  # of AudioSet
    shared = ".self_attn.relative_attention_bias.weight"
    if (table := tensors.get(f"encoder.layers.0{shared}")) is not None:  # a file may have the shared table once
        tensors = {f"encoder.layers.{i}{shared}": table for i in range(encoder.config.encoder_layers)} | tensors
    state_dicts.load_exactly(encoder, tensors, file.path, "model.audio", dtype)
    return encoder


class Beats(nn.Module):
    """The BEATs encoder (arXiv 2212.09058, section 3)."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        self.config = config
        self.width, self.patch, self.time_axis = config.encoder_embed_dim, config.input_patch_size, 1
        self.description = repr(config)
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, self.patch, stride=self.patch, bias=False)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        same = config.embed_dim == self.width
        self.post_extract_proj = nn.Identity() if same else nn.Linear(config.embed_dim, self.width)
        self.encoder = _Encoder(config)

    def encode(self, batch: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See :class:`lavis_chatbridge.models.encoders.Encoder`."""
        return self(batch, lengths)

    def forward(self, fbank: Tensor, frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode clips.

        Args:
            fbank: ``[B, F, M]`` normalised filterbank.
            frames: ``[B]`` number of valid frames of each clip; the padding after them has no influence, and a partly
                valid patch is kept. None: all complete patches are valid, as in the original.

        Returns:
            ``[B, n, D]`` tokens, zeros for padding, and ``[B, n]`` bool, false for padding.
        """
        patch = self.patch
        if fbank.shape[-1] % patch or (frames is None and fbank.shape[1] < patch):
            raise ConfigError(
                f"BEATs needs mel bins in multiples of {patch} and at least {patch} frames, found "
                f"{fbank.shape[-1]} bins and {fbank.shape[1]} frames"
            )
        if frames is None:
            fbank = fbank[:, : fbank.shape[1] // patch * patch]
            frames = torch.full((len(fbank),), fbank.shape[1], device=fbank.device)
        fbank = functional.pad(fbank, (0, 0, 0, -fbank.shape[1] % patch))
        fbank = fbank * (torch.arange(fbank.shape[1], device=fbank.device) < frames[:, None]).unsqueeze(-1)
        steps, bands = fbank.shape[1] // patch, fbank.shape[2] // patch
        begun = (frames + patch - 1).div(patch, rounding_mode="floor").clamp(1, steps)
        mask = (torch.arange(steps, device=fbank.device) < begun[:, None]).repeat_interleave(bands, dim=1)
        tokens = self.encoder(self.post_extract_proj(self.patches(fbank)), mask)
        return tokens * mask.unsqueeze(-1), mask

    def patches(self, fbank: Tensor) -> Tensor:
        """``[B, F, M]`` filterbank -> ``[B, n, embed_dim]`` normalised patches, time outer and mel inner."""
        return self.layer_norm(self.patch_embedding(fbank.unsqueeze(1)).flatten(2).transpose(1, 2))


class _Encoder(nn.Module):
    """Convolutional positions, then post-norm layers that share one relative-position bias."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.config = config
        self.pos_conv = nn.Sequential(_PositionConv(width, config.conv_pos, config.conv_pos_groups))
        self.layer_norm = nn.LayerNorm(width)
        table = nn.Embedding(config.num_buckets, config.encoder_attention_heads)
        nn.init.xavier_normal_(table.weight)
        self.layers = nn.ModuleList(_Layer(config, table) for _ in range(config.encoder_layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x * mask.unsqueeze(-1)  # otherwise the convolution mixes padding into valid tokens
        x = self.layer_norm(x + self.pos_conv(x.transpose(1, 2)).transpose(1, 2))
        bias = self.position_bias(x.shape[1])
        blocked = torch.zeros(mask.shape, device=x.device).masked_fill(~mask, float("-inf"))[:, None, None, :]
        for layer in self.layers:
            x = layer(x, bias, blocked)
        return x

    def position_bias(self, length: int) -> Tensor:
        """``[H, n, n]`` bias from query (rows) to key before gating.

        It depends only on the distance, so ``2n - 1`` values of the table are read, and each row is a window of them.
        """
        table = cast(_Layer, self.layers[0]).self_attn.relative_attention_bias
        distances = torch.arange(1 - length, length, device=table.weight.device)
        buckets = relative_buckets(distances, self.config.num_buckets, self.config.max_distance)
        # window s holds the distances s + 1 - n ... s of query n - 1 - s
        return table(buckets).t().unfold(1, length, 1).flip(1)


class _PositionConv(nn.Module):
    """A grouped 1-d convolution with weight normalisation over all but the kernel axis, then GELU.

    ``weight_g`` and ``weight_v`` are the parameter names of torch's old weight norm, as in checkpoints.
    """

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight_v = nn.Parameter(torch.empty(width, width // groups, kernel))
        nn.init.normal_(self.weight_v, std=math.sqrt(4.0 / (kernel * width)))
        self.weight_g = nn.Parameter(self.weight_v.detach().norm(dim=(0, 1), keepdim=True))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, D, n]`` to ``[B, D, n]``."""
        kernel = self.weight_v.shape[-1]
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=(0, 1), keepdim=True))
        out = functional.conv1d(x, weight, self.bias, padding=kernel // 2, groups=self.groups)
        return functional.gelu(out[..., : x.shape[-1]])  # an even kernel gives one extra step


class _Layer(nn.Module):
    """Self-attention and feed-forward, each with a (scaled) residual and a layer norm after it."""

    def __init__(self, config: BeatsConfig, table: nn.Embedding) -> None:
        super().__init__()
        width, layers = config.encoder_embed_dim, config.encoder_layers
        self.residual_scale = (2 * layers) ** 0.25
        self.self_attn = _Attention(config, table)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_embed_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)
        for linear in (self.fc1, self.fc2, self.self_attn.v_proj, self.self_attn.out_proj):
            nn.init.xavier_normal_(linear.weight, gain=(8 * layers) ** -0.25)

    def forward(self, x: Tensor, bias: Tensor, blocked: Tensor) -> Tensor:
        x = self.self_attn_layer_norm(x * self.residual_scale + self.self_attn(x, bias, blocked))
        return self.final_layer_norm(x * self.residual_scale + self.fc2(functional.gelu(self.fc1(x))))


class _Attention(nn.Module):
    """Self-attention with a relative-position bias that is gated by the query (WavLM, arXiv 2110.13900, equation 3)."""

    def __init__(self, config: BeatsConfig, table: nn.Embedding) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.heads = config.encoder_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.relative_attention_bias = table
        self.grep_linear = nn.Linear(width // self.heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, self.heads, 1, 1))

    def forward(self, x: Tensor, bias: Tensor, blocked: Tensor) -> Tensor:
        """``[B, n, D]`` tokens, ``[H, n, n]`` bias, ``[B, 1, 1, n]`` zero or minus infinity -> ``[B, n, D]``."""
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = self._gate(q) * bias.unsqueeze(0) + blocked
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=scores.to(q.dtype))
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _gate(self, q: Tensor) -> Tensor:
        """``[B, H, n, d]`` unscaled queries to ``[B, H, n, 1]`` factors of the bias."""
        update, reset = torch.sigmoid(self.grep_linear(q).unflatten(-1, (2, 4)).sum(-1)).chunk(2, dim=-1)
        return update * (reset * self.grep_a - 1.0) + 2.0


def relative_buckets(distances: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each signed distance (key minus query), as in T5 (arXiv 1910.10683, section 2.1), both directions.

    Half of the buckets are for keys after the query. In each half, the first buckets are for one distance each; the
    other buckets grow logarithmically up to ``max_distance``.
    """
    half = num_buckets // 2
    exact = half // 2
    size = distances.abs()
    ratio = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(size < exact, size, far) + half * (distances > 0)
