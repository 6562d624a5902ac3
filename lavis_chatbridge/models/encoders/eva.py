"""EVA-ViT, ChatBridge's own vision encoder: LAVIS's class, built without its download. It returns all tokens.

The encoder is BLIP-2's EVA-ViT-G: 39 of its 40 blocks, without a final norm. Parameter names are those of
``eva_vit_g.pth``.

Shapes: ``B`` images, ``N`` tokens (a class token, then patches row by row), ``D`` width.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import torch
from lavis.models.eva_vit import VisionTransformer, interpolate_pos_embed
from torch import Tensor, nn
from torch.nn import functional

from lavis_chatbridge import hub
from lavis_chatbridge.models import state_dicts
from lavis_chatbridge.models.settings import VisionSettings, torch_dtype


class EvaVit(VisionTransformer):
    """LAVIS's EVA-ViT with random weights, and with torch's fused attention."""

    def __init__(self, settings: VisionSettings) -> None:
        super().__init__(
            img_size=settings.image_size,
            patch_size=settings.patch_size,
            embed_dim=settings.width,
            depth=settings.depth,
            num_heads=settings.heads,
            mlp_ratio=settings.mlp_ratio,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_mean_pooling=False,
        )
        self.width = settings.width
        self.frame_shape = (3, settings.image_size, settings.image_size)
        self.description = f"eva, {settings.heads} heads"
        for block in self.blocks:
            block.attn.forward = partial(_fused_attention, block.attn)  # a partial can be pickled

    def encode(self, batch: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``[B, 3, H, W]`` -> the last block's ``[B, N, D]`` tokens, and their mask."""
        tokens = self(batch)
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def build_vision(settings: VisionSettings) -> EvaVit:
    """An EVA-ViT from its own file, a ChatBridge's or BLIP-2's, or a randomly initialised one.

    Blocks and norms after the last block are dropped; positions are interpolated to the image size.
    """
    dtype = torch_dtype(settings.dtype)
    if settings.weights is None:
        return EvaVit(settings).to(dtype)
    prefixes = state_dicts.BLIP2_VISION
    file = state_dicts.read(hub.find(settings.weights, "model.vision.weights", prefixes=prefixes), prefixes)
    named = state_dicts.from_huggingface(file.tensors)
    own = state_dicts.part(named, "visual_encoder.") or named
    unused = (f"blocks.{settings.depth}.", "norm.", "fc_norm.", "head.")
    tensors = {name: tensor for name, tensor in own.items() if not name.startswith(unused)}
    with state_dicts.on_meta():
        encoder = EvaVit(settings)
    with redirect_stdout(sys.stderr):  # it prints what it does; answers go to stdout
        interpolate_pos_embed(encoder, tensors)
    state_dicts.load_exactly(encoder, tensors, file.path, "model.vision", dtype)
    return encoder


def _fused_attention(attention: Any, x: Tensor, rel_pos_bias: Tensor | None = None) -> Tensor:
    """The forward of an EVA attention module: queries and values have a bias, keys have none."""
    bias = torch.cat([attention.q_bias, torch.zeros_like(attention.v_bias), attention.v_bias])
    qkv = functional.linear(x, attention.qkv.weight, bias).unflatten(-1, (3, attention.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=rel_pos_bias)
    return attention.proj(out.transpose(1, 2).flatten(2))
