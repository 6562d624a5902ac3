"""Vision encoders of timm: every model with ``forward_features`` (ViT, SigLIP, EfficientNet, ConvNeXt, ...).

Shapes: ``B`` images, ``N`` tokens, ``D`` width.
"""

from __future__ import annotations

from typing import Any

import timm
from torch import Tensor, nn

from lavis_chatbridge import hub
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.models import state_dicts
from lavis_chatbridge.models.encoders import tokens_of
from lavis_chatbridge.models.settings import VisionSettings, torch_dtype


class TimmVision(nn.Module):
    """A timm model without its head; ``settings.layer`` counts blocks of a ViT or stages of a convolutional network."""

    def __init__(self, model: Any, settings: VisionSettings) -> None:
        super().__init__()
        self.model = model
        self.layer, self.class_token, self.pool = settings.layer, settings.class_token, settings.pool
        self.width: int = model.num_features
        if self.layer != -1:
            self.width = model.feature_info[self.layer]["num_chs"]
        self.frame_shape = tuple(timm.data.resolve_model_data_config(model)["input_size"])
        architecture = model.pretrained_cfg.get("architecture") or type(model).__name__
        self.description = f"timm {architecture}, layer {self.layer}, {self.class_token}, pool {self.pool}"

    def encode(self, batch: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``[B, 3, H, W]`` -> ``[B, N, D]``: prefix tokens if they are kept, then the grid row by row."""
        prefix = None
        if self.layer == -1:
            features = self.model.forward_features(batch)
        else:
            features = self.model.forward_intermediates(batch, indices=[self.layer], intermediates_only=True)[-1]
        if features.dim() == 3:  # [B, N, D] of a transformer
            count = getattr(self.model, "num_prefix_tokens", 0)
            prefix = features[:, :count] if self.class_token else None
            grid = features[:, count:].unflatten(1, self.model.patch_embed.grid_size).permute(0, 3, 1, 2)
        else:
            grid = features.permute(0, 3, 1, 2) if getattr(self.model, "output_fmt", "") == "NHWC" else features
        return tokens_of(grid, self.pool, prefix)


def build_vision(settings: VisionSettings) -> TimmVision:
    """A timm model with the weights of the settings, or a randomly initialised one."""
    path = None if settings.weights is None else hub.find(settings.weights, "model.vision.weights")
    described = hub.read_config(path) if path is not None and (path / "config.json").is_file() else {}
    name = settings.name or described.get("architecture")
    if name is None:
        raise ConfigError("model.vision.name is null, and config.json does not name an architecture of timm")
    sizes = {**(described.get("model_args") or {}), "num_classes": 0}  # without the head
    try:
        model: Any = timm.create_model(name, pretrained_cfg=described.get("pretrained_cfg"), **sizes)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"model.vision.name: timm cannot build {name!r}: {error}") from error
    dtype = torch_dtype(settings.dtype)
    if path is not None:
        file = state_dicts.read(path)
        head = tuple(f"{name}." for name in hub.as_list(model.pretrained_cfg.get("classifier") or ()))
        tensors = {name: tensor for name, tensor in file.tensors.items() if not name.startswith(head)}
        state_dicts.load_exactly(model, tensors, file.path, "model.vision", dtype)
    return TimmVision(model.to(dtype), settings)
