"""BEATs, the audio encoder: log-mel filterbank in, one token per 16x16 patch of it out.

The architecture is that of BEATs (arXiv 2212.09058) as ChatBridge uses it: no waveform entry, no classification head,
no dropout (the encoder is frozen). Parameter names are those of the published checkpoints. This module knows no files.

Shapes: ``B`` clips, ``F`` frames of 10 ms, ``M`` mel bins, ``n`` tokens (time outer, mel inner), ``D`` width,
``H`` heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lavis_chatbridge import config as settings
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.models import half_precision

_SIZES = ("input_patch_size", "embed_dim", "encoder_embed_dim", "encoder_ffn_embed_dim", "conv_pos", "num_buckets")
_LARGEST, _MOST_LAYERS = 65_536, 256


@dataclass(frozen=True)
class BeatsConfig:
    """Sizes of a BEATs encoder; the field names are those of the ``cfg`` in a published checkpoint.

    The defaults are those of ``BEATs_iter3_plus_AS2M``.
    """

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
        """The configuration held in a published checkpoint.

        Keys for training only (dropout, the classification head and so on) are of no use here and are left out.

        Raises:
            ConfigError: If the checkpoint uses a variant of the architecture that is not built here.
        """
        for key, built in (("layer_norm_first", False), ("activation_fn", "gelu")):
            if cfg.get(key, built) != built:
                raise ConfigError(f"BEATs with {key}={cfg[key]!r} is not supported, only {key}={built!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        return settings.parse(cls, {key: value for key, value in cfg.items() if key in names}, "BEATs")

    def check(self) -> Iterable[str]:
        """Sizes that do not fit together."""
        width, heads = self.encoder_embed_dim, self.encoder_attention_heads
        sizes = {name: getattr(self, name) for name in _SIZES}
        wrong = [f"{name} {size}" for name, size in sizes.items() if not 1 <= size <= _LARGEST]
        if wrong or not 1 <= self.encoder_layers <= _MOST_LAYERS:
            yield f"sizes from 1 to {_LARGEST} and up to {_MOST_LAYERS} layers are built, found " + ", ".join(
                [*wrong, f"encoder_layers {self.encoder_layers}"]
            )
        if heads < 1 or width % heads:
            yield f"encoder_embed_dim {width} is not a multiple of encoder_attention_heads {heads}"
        if self.conv_pos_groups < 1 or width % self.conv_pos_groups:
            yield f"encoder_embed_dim {width} is not a multiple of conv_pos_groups {self.conv_pos_groups}"
        if self.num_buckets < 4 or self.max_distance <= self.num_buckets // 4:
            yield f"max_distance {self.max_distance} must exceed a quarter of num_buckets {self.num_buckets} (4 up)"


class Beats(nn.Module):
    """The BEATs encoder (arXiv 2212.09058, section 3).

    Args:
        config: Its sizes.
    """

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.input_patch_size
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, patch, stride=patch, bias=config.conv_bias)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        self.post_extract_proj = (
            nn.Linear(config.embed_dim, config.encoder_embed_dim)
            if config.embed_dim != config.encoder_embed_dim
            else nn.Identity()
        )
        self.encoder = _Encoder(config)

    def forward(self, fbank: Tensor, frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode clips.

        Args:
            fbank: ``[B, F, M]`` normalised filterbank; ``M`` a multiple of the patch size.
            frames: ``[B]`` how many frames of each clip are sound; the rest is padding, which then has no influence. A
                patch begun counts (what is missing of it is zeros). Without it every whole patch counts, as in the
                original.

        Returns:
            ``[B, n, D]`` tokens and ``[B, n]`` bool, true where a token stands for sound. Tokens of padding are zeros.

        Raises:
            ConfigError: If ``M`` is not a multiple of the patch size, or a clip is shorter than one patch.
        """
        patch = self.config.input_patch_size
        if fbank.shape[-1] % patch or (frames is None and fbank.shape[1] < patch):
            raise ConfigError(
                f"BEATs needs mel bins in multiples of {patch} and at least {patch} frames, found "
                f"{fbank.shape[-1]} bins and {fbank.shape[1]} frames"
            )
        if frames is None:
            tokens = self.encode(self.patches(fbank), None)
            return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        fbank = functional.pad(fbank, (0, 0, 0, -fbank.shape[1] % patch))
        fbank = fbank * (torch.arange(fbank.shape[1], device=fbank.device) < frames[:, None]).unsqueeze(-1)
        steps, bands = fbank.shape[1] // patch, fbank.shape[2] // patch
        begun = (frames + patch - 1).div(patch, rounding_mode="floor").clamp(1, steps)
        mask = (torch.arange(steps, device=fbank.device) < begun[:, None]).repeat_interleave(bands, dim=1)
        tokens = self.encode(self.patches(fbank), mask)
        return tokens * mask.unsqueeze(-1), mask

    def patches(self, fbank: Tensor) -> Tensor:
        """``[B, F, M]`` filterbank to ``[B, n, embed_dim]`` normalised patches, time outer and mel inner."""
        return self.layer_norm(self.patch_embedding(fbank.unsqueeze(1)).flatten(2).transpose(1, 2))

    def encode(self, patches: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, n, embed_dim]`` patches to ``[B, n, D]`` tokens; ``mask`` ``[B, n]`` is true for sound."""
        return self.encoder(self.post_extract_proj(patches), mask)


class _Encoder(nn.Module):
    """Convolutional positions, then post-norm layers that share one relative-position bias."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.config = config
        self.pos_conv = nn.Sequential(_PositionConv(width, config.conv_pos, config.conv_pos_groups))
        self.layer_norm = nn.LayerNorm(width)
        table = None
        if config.relative_position_embedding:
            table = nn.Embedding(config.num_buckets, config.encoder_attention_heads)
            nn.init.xavier_normal_(table.weight)
        self.layers = nn.ModuleList(_Layer(config, table) for _ in range(config.encoder_layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            x = x * mask.unsqueeze(-1)  # otherwise the convolution carries padding into the sound
        x = self.layer_norm(x + self.pos_conv(x.transpose(1, 2)).transpose(1, 2))
        bias = self.position_bias(x.shape[1])
        blocked = None
        if mask is not None:
            blocked = torch.zeros(mask.shape, dtype=torch.float32, device=x.device)
            blocked = blocked.masked_fill(~mask, float("-inf"))[:, None, None, :]
        for layer in self.layers:
            x = layer(x, bias, blocked)
        return x

    def position_bias(self, length: int) -> Tensor | None:
        """``[H, n, n]`` bias from query (rows) to key before gating.

        It depends on the distance only, so ``2n - 1`` values of the table are looked up and laid out as windows.
        """
        table = cast(_Layer, self.layers[0]).self_attn.relative_attention_bias
        if table is None:
            return None
        distances = torch.arange(1 - length, length, device=table.weight.device)
        buckets = relative_buckets(distances, self.config.num_buckets, self.config.max_distance)
        # window s holds the distances s + 1 - n ... s of query n - 1 - s
        return table(buckets).t().unfold(1, length, 1).flip(1)


class _PositionConv(nn.Module):
    """A grouped 1-d convolution with the weight normalised over all but its kernel axis, then GELU.

    The names ``weight_g`` and ``weight_v`` are those of torch's former weight norm, which checkpoints hold.
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
        sizes = {"padding": kernel // 2, "groups": self.groups}
        out = half_precision.convolve(functional.conv1d, x, weight, self.bias, **sizes)
        return functional.gelu(out[..., : x.shape[-1]])  # an even kernel yields one step too many


class _Layer(nn.Module):
    """Self-attention and feed-forward, each with a (scaled) residual and a layer norm after it."""

    def __init__(self, config: BeatsConfig, table: nn.Embedding | None) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        layers = config.encoder_layers
        self.residual_scale = (2 * layers) ** 0.25 if config.deep_norm else 1.0
        self.self_attn = _Attention(config, table)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_embed_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)
        gain = (8 * layers) ** -0.25 if config.deep_norm else 1.0
        for linear in (self.fc1, self.fc2, self.self_attn.v_proj, self.self_attn.out_proj):
            nn.init.xavier_normal_(linear.weight, gain=gain)

    def forward(self, x: Tensor, bias: Tensor | None, blocked: Tensor | None) -> Tensor:
        x = self.self_attn_layer_norm(x * self.residual_scale + self.self_attn(x, bias, blocked))
        return self.final_layer_norm(x * self.residual_scale + self.fc2(functional.gelu(self.fc1(x))))


class _Attention(nn.Module):
    """Self-attention whose relative-position bias is gated by the query (WavLM, arXiv 2110.13900, equation 3)."""

    def __init__(self, config: BeatsConfig, table: nn.Embedding | None) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.heads = config.encoder_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.relative_attention_bias = table
        self.gated = config.gru_rel_pos and table is not None
        if self.gated:
            self.grep_linear = nn.Linear(width // self.heads, 8)
            self.grep_a = nn.Parameter(torch.ones(1, self.heads, 1, 1))

    def forward(self, x: Tensor, bias: Tensor | None, blocked: Tensor | None) -> Tensor:
        """``[B, n, D]`` tokens, ``[H, n, n]`` bias, ``[B, 1, 1, n]`` zero or minus infinity -> ``[B, n, D]``."""
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = bias if bias is None else bias.unsqueeze(0)
        if scores is not None and self.gated:
            scores = self._gate(q) * scores
        if blocked is not None:
            scores = blocked if scores is None else scores + blocked
        if scores is not None:
            scores = scores.to(q.dtype)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=scores)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _gate(self, q: Tensor) -> Tensor:
        """``[B, H, n, d]`` unscaled queries to ``[B, H, n, 1]`` factors of the bias."""
        update, reset = torch.sigmoid(self.grep_linear(q).unflatten(-1, (2, 4)).sum(-1)).chunk(2, dim=-1)
        return update * (reset * self.grep_a - 1.0) + 2.0


def relative_buckets(distances: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each signed distance (key minus query), as in T5 (arXiv 1910.10683, section 2.1), both directions.

    Half of the buckets serve keys after the query; of each half, the first half holds one distance each, the rest grow
    logarithmically up to ``max_distance``.
    """
    half = num_buckets // 2
    exact = half // 2
    size = distances.abs()
    ratio = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(size < exact, size, far) + half * (distances > 0)
