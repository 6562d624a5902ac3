"""EVA-ViT, the vision encoder: LAVIS's code, built from given sizes without a download, all tokens and no final norm.

The frozen encoder of ChatBridge is EVA-ViT-G of BLIP-2 (39 of its 40 blocks). Parameter names are those of
``eva_vit_g.pth``. This module knows no files.

Shapes: ``B`` images, ``N`` tokens (a class token, then patches row by row), ``D`` width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lavis_chatbridge.models import half_precision


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of an EVA-ViT; the defaults are those of EVA-ViT-G.

    Args:
        image_size: Height and width of an image in pixels.
        patch_size: Height and width of a patch in pixels.
        width: Width of the tokens.
        depth: Number of blocks.
        heads: Attention heads.
        mlp_ratio: Width of the feed-forward part over ``width``.
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 1408
    depth: int = 39
    heads: int = 16
    mlp_ratio: float = 4.3637

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def check(self) -> Iterable[str]:
        """Sizes that do not fit together."""
        if self.patch_size < 1 or self.image_size < self.patch_size or self.image_size % self.patch_size:
            yield f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
        if self.heads < 1 or self.width % self.heads:
            yield f"width {self.width} is not a multiple of heads {self.heads}"


def build_vision(config: VisionConfig) -> nn.Module:
    """LAVIS's EVA-ViT with random weights.

    The module maps ``[B, 3, H, W]`` to ``[B, N, D]``, all tokens of the last block; attention runs through torch's
    fused kernel instead of LAVIS's plain products.
    """
    from lavis.models.eva_vit import VisionTransformer

    model = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_mean_pooling=False,
    )
    for block in model.blocks:
        block.attn.forward = partial(_fused_attention, block.attn)  # which can be pickled
    return model


def fit_positions(table: Tensor, tokens: int) -> Tensor:
    """A position table fitted to another number of patches by bicubic interpolation, as BLIP-2 does.

    Args:
        table: ``[1, N, D]`` with the class token's position first, then a square of patches.
        tokens: The number of tokens wanted, one more than a square number.

    Returns:
        ``[1, tokens, D]``; the table itself where it fits already or is no square of patches.
    """
    have, want = math.isqrt(table.shape[1] - 1), math.isqrt(tokens - 1)
    if table.shape[1] == tokens or have**2 != table.shape[1] - 1 or want**2 != tokens - 1:
        return table
    grid = table[:, 1:].float().unflatten(1, (have, have)).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(want, want), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def _fused_attention(attention: Any, x: Tensor, rel_pos_bias: Tensor | None = None) -> Tensor:
    """The forward of an EVA attention module: queries and values have a bias, keys have none."""
    bias = torch.cat([attention.q_bias, torch.zeros_like(attention.v_bias), attention.v_bias])
    qkv = half_precision.linear(x, attention.qkv.weight, bias).unflatten(-1, (3, attention.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=rel_pos_bias)
    return attention.proj(out.transpose(1, 2).flatten(2))
