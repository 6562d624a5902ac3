"""EVA-ViT: sizes, positions for other image sizes, and the fused attention against LAVIS's own."""

from __future__ import annotations

import pytest
import torch

from lavis_chatbridge.config import parse
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.models.encoders.eva import EvaVit
from lavis_chatbridge.models.settings import VisionSettings

SMALL = VisionSettings(image_size=28, patch_size=14, width=32, depth=2, heads=4)


def test_fused_attention_equals_lavis() -> None:
    torch.manual_seed(0)
    attention = EvaVit(SMALL).blocks[1].attn
    for bias in (attention.q_bias, attention.v_bias):
        torch.nn.init.normal_(bias)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(attention(x), type(attention).forward(attention, x), atol=1e-6, rtol=1e-5)


def test_sizes_that_do_not_fit_are_all_named() -> None:
    with pytest.raises(ConfigError, match=r"image_size 225 is not a multiple of patch_size 14; .*width 32 .* heads 5"):
        parse(VisionSettings, {"image_size": 225, "width": 32, "heads": 5}, "model.vision")
