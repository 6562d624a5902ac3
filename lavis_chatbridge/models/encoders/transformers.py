"""Encoders of transformers: the towers of CLIP, SigLIP, SigLIP2, DINOv2; Whisper, AST, wav2vec2, HuBERT, CLAP.

Other models also work if ``AutoModel`` can build them and they return ``last_hidden_state``.

Shapes: ``B`` frames or clips, ``N`` tokens, ``D`` width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lavis_chatbridge import hub
from lavis_chatbridge.errors import CheckpointError, ConfigError, one_line
from lavis_chatbridge.models import state_dicts
from lavis_chatbridge.models.encoders import tokens_of
from lavis_chatbridge.models.settings import AudioSettings, EncoderSettings, VisionSettings, torch_dtype

_UNSTABLE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "_attn_implementation")
"""Keys of a configuration that do not affect the output."""

_NOT_USED = ("pooler.dense.weight", "pooler.dense.bias", "masked_spec_embed")
"""Parameters that may be missing in files, because ``last_hidden_state`` does not depend on them."""


class _Transformers(nn.Module):
    """A model of transformers; ``settings.layer`` counts its blocks."""

    def __init__(self, model: Any, settings: EncoderSettings) -> None:
        super().__init__()
        self.model = model
        self.layer, self.class_token, self.pool = settings.layer, settings.class_token, settings.pool
        self.width: int = model.config.hidden_size
        config = {key: value for key, value in model.config.to_dict().items() if key not in _UNSTABLE}
        options = settings.layer, settings.class_token, settings.pool
        self.description = f"transformers {json.dumps(config, sort_keys=True, default=str)} {options}"

    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        """The output of the chosen block; for the last block, after the model's final norm."""
        output = self.model(**inputs, output_hidden_states=self.layer != -1, return_dict=True)
        if self.layer == -1:
            return output.last_hidden_state
        return output.hidden_states[self.layer if self.layer < 0 else self.layer + 1]


class TransformersVision(_Transformers):
    """A vision tower for frames of ``size`` by ``size`` pixels."""

    def __init__(self, model: Any, settings: VisionSettings, size: int) -> None:
        super().__init__(model, settings)
        self.frame_shape = (3, size, size)

    def encode(self, batch: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``[B, 3, H, W]`` -> ``[B, N, D]``: prefix tokens if they are kept, then patches row by row."""
        patch = self.model.config.patch_size
        height, width = batch.shape[2] // patch, batch.shape[3] // patch
        naflex = self.model.config.model_type.startswith("siglip2")
        tokens = self.run(_as_patches(batch, patch) if naflex else {"pixel_values": batch})
        count = tokens.shape[1] - height * width
        grid = tokens[:, count:].transpose(1, 2).unflatten(2, (height, width))
        return tokens_of(grid, self.pool, tokens[:, :count] if self.class_token else None)


class TransformersAudio(_Transformers):
    """An audio encoder; ``settings.pool`` shortens Whisper's 1500 tokens."""

    patch = 1

    def __init__(self, model: Any, settings: AudioSettings) -> None:
        super().__init__(model, settings)
        self.time_axis = 2 if model.config.model_type.startswith(("whisper", "clap")) else 1

    def encode(self, batch: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``[B, ...]`` features from the encoder's own extractor -> ``[B, N, D]`` tokens, and a mask of valid ones."""
        inputs = {self.model.main_input_name: batch}
        family = self.model.config.model_type
        if family.startswith("clap"):
            inputs["is_longer"] = torch.zeros(len(batch), 1, dtype=torch.bool, device=batch.device)
        if batch.dim() == 2 and lengths is not None and self.model.config.feat_extract_norm == "layer":
            steps = torch.arange(batch.shape[1], device=batch.device)
            inputs["attention_mask"] = (steps < lengths[:, None]).long()
        tokens = self.run(inputs)
        if tokens.dim() == 4:  # CLAP: [B, D, frequency, time]
            tokens = tokens.flatten(2).transpose(1, 2)
        if family == "audio-spectrogram-transformer":  # two prefix tokens, then patches, frequency outer, time inner
            config = self.model.config
            rows = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
            grid = tokens[:, 2:].transpose(1, 2).unflatten(2, (rows, -1))
            return tokens_of(grid, self.pool, tokens[:, :2] if self.class_token else None)
        mask = self._mask(tokens, batch, lengths)
        if self.pool > 1:
            weights = mask.unsqueeze(1).to(tokens.dtype)
            lines = (tokens.transpose(1, 2) * weights, weights)
            rest = -tokens.shape[1] % self.pool
            pooled = [functional.avg_pool1d(functional.pad(line, (0, rest)), self.pool) for line in lines]
            tokens = (pooled[0] / pooled[1].clamp_min(torch.finfo(tokens.dtype).eps)).transpose(1, 2)
            mask = pooled[1].squeeze(1) > 0
        return tokens * mask.unsqueeze(-1), mask

    def _mask(self, tokens: Tensor, batch: Tensor, lengths: Tensor | None) -> Tensor:
        """``[B, N]`` mask for encoders with tokens in time order: true for tokens that begin within the sound."""
        count = tokens.shape[1]
        valid = torch.full((len(tokens),), count, device=tokens.device)
        if lengths is not None and hasattr(self.model, "_get_feat_extract_output_lengths") and batch.dim() == 2:
            valid = self.model._get_feat_extract_output_lengths(lengths)
        elif lengths is not None and self.model.config.model_type == "whisper":
            valid = -(-lengths * count // batch.shape[-1])
        return torch.arange(count, device=tokens.device) < valid.clamp(1, count)[:, None]


def build_vision(settings: VisionSettings) -> TransformersVision:
    """The vision encoder in a folder (for CLIP and the like, the vision tower), or a randomly initialised one."""
    model, folder = _loaded(settings, "vision")
    size = model.config.image_size if hasattr(model.config, "image_size") else settings.image_size
    if folder is not None and (folder / "preprocessor_config.json").is_file():
        size = hub.image_size(hub.read_config(folder, "preprocessor_config.json")) or size
    return TransformersVision(model, settings, size if isinstance(size, int) else size[0])


def build_audio(settings: AudioSettings) -> TransformersAudio:
    """The audio encoder in a folder (CLAP: its audio tower; Whisper: its encoder)."""
    model, _ = _loaded(settings, "audio")
    if model.config.model_type.startswith("clap") and settings.layer != -1:
        raise ConfigError("model.audio.layer: only -1 works for CLAP, whose stages differ in width")
    return TransformersAudio(model.encoder if model.config.model_type == "whisper" else model, settings)


def _loaded(settings: EncoderSettings, part: str) -> tuple[Any, Path | None]:
    """The encoder (of a model with a text tower, the other tower) and the folder of its weights."""
    from transformers import MODEL_MAPPING, AutoConfig

    where, dtype, folder = f"model.{part}", torch_dtype(settings.dtype), None
    described = dict(settings.config or {})
    if settings.weights is not None:
        folder = hub.find(settings.weights, f"{where}.weights")
        described = hub.read_config(folder)
    if "model_type" not in described:
        raise ConfigError(f"{where}: model_type is missing in {folder or 'config, which random weights need'}")
    try:
        config = AutoConfig.for_model(described.pop("model_type"), **described)
        alone = getattr(config, f"{part}_config", config)
        config = alone if type(alone) in MODEL_MAPPING else config
        built: Any = MODEL_MAPPING[type(config)]
        if folder is None:
            model, missing = built._from_config(config).to(dtype), []
        else:
            model, info = built.from_pretrained(
                str(folder), config=config, dtype=dtype, local_files_only=True, output_loading_info=True
            )
            missing = [name for name in info["missing_keys"] if not name.endswith(_NOT_USED)]
    except Exception as error:  # transformers raises any error of its configurations and readers
        cause = one_line(error)
        raise CheckpointError(f"{where}: cannot build an encoder from {folder or 'config'}: {cause}") from error
    if missing:
        raise CheckpointError(f"{where}: {folder} is incomplete: {state_dicts.shortened(missing)} missing")
    return getattr(model, f"{part}_model", model), folder


def _as_patches(batch: Tensor, patch: int) -> dict[str, Tensor]:
    """Frames in SigLIP2's (NaFlex) input format: flattened patches, channels last."""
    height, width = batch.shape[2] // patch, batch.shape[3] // patch
    grid = batch.unflatten(3, (width, patch)).unflatten(2, (height, patch))  # [B, 3, h, p, w, p]
    pixels = grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    shapes = torch.tensor([[height, width]] * len(batch), device=batch.device)
    mask = torch.ones(pixels.shape[:2], dtype=torch.long, device=batch.device)
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
