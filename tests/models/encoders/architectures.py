"""Tiny random encoders of each supported architecture, saved by transformers and timm themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lavis_chatbridge.models.settings import AudioSettings, VisionSettings

PART = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
_TEXT = {**PART, "vocab_size": 64, "max_position_embeddings": 16}
VISION = ("clip", "siglip", "siglip2", "dinov2", "timm vit", "timm efficientnet", "timm convnext")
AUDIO = ("whisper", "ast", "wav2vec2", "hubert", "clap")


def vision(name: str, folder: Path, seed: int = 0) -> VisionSettings:
    """Save a vision encoder of 32-pixel images into a folder and return the settings that load it."""
    torch.manual_seed(seed)
    if name.startswith("timm"):
        _save_timm(name.removeprefix("timm "), folder)
        return VisionSettings(encoder="timm", weights=str(folder))
    from transformers import AutoConfig, AutoModel

    sizes = {**PART, "image_size": 32, "patch_size": 8}
    if name == "dinov2":
        config = AutoConfig.for_model("dinov2", **sizes)
    else:
        patches = {"num_patches": 16} if name == "siglip2" else {}
        config = AutoConfig.for_model(name, vision_config={**sizes, **patches}, text_config=_TEXT)
    AutoModel.from_config(config).save_pretrained(folder)
    processor = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return VisionSettings(encoder="transformers", weights=str(folder))


def _save_timm(name: str, folder: Path) -> None:
    import timm

    architectures: dict[str, tuple[str, dict[str, Any]]] = {
        "vit": ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}),
        "efficientnet": ("test_efficientnet", {}),
        "convnext": ("test_convnext", {}),
    }
    architecture, sizes = architectures[name]
    frames = {"input_size": (3, 32, 32)}
    model = timm.create_model(architecture, num_classes=7, pretrained_cfg_overlay=frames, **sizes)
    timm.models.save_for_hf(model, str(folder), model_args=sizes, safe_serialization=True)


def audio(name: str, folder: Path, seed: int = 0, **options: Any) -> AudioSettings:
    """Save an audio encoder with its feature extractor into a folder and return the settings that load it."""
    import transformers
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(seed)
    convolutions: dict[str, Any] = {
        "conv_dim": [16] * 3, "conv_stride": [5, 4, 4], "conv_kernel": [10, 8, 4], "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    }  # fmt: skip
    whisper: dict[str, Any] = {
        "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 16,
        "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48, "max_source_positions": 100,
        "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0,
        "begin_suppress_tokens": None,
    }  # fmt: skip
    clap: dict[str, Any] = {
        **PART, "depths": [1, 1], "num_attention_heads": [2, 2], "num_mel_bins": 16, "spec_size": 64, "window_size": 4,
        "patch_embeds_hidden_size": 16,
    }  # fmt: skip
    configs: dict[str, tuple[str, dict[str, Any]]] = {
        "whisper": ("whisper", whisper),
        "ast": ("audio-spectrogram-transformer", {**PART, "max_length": 64, "num_mel_bins": 32}),
        "wav2vec2": ("wav2vec2", {**PART, **convolutions}),
        "hubert": ("hubert", {**PART, **convolutions, "feat_extract_norm": "layer", "do_stable_layer_norm": True}),
        "clap": ("clap", {"audio_config": clap, "text_config": {**_TEXT, "pad_token_id": 0}}),
    }
    extractors: dict[str, Any] = {
        "whisper": transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=2),
        "ast": transformers.ASTFeatureExtractor(max_length=64, num_mel_bins=32),
        "clap": transformers.ClapFeatureExtractor(
            feature_size=16, sampling_rate=16_000, max_length_s=2, truncation="rand_trunc", hop_length=160
        ),
    }
    model_type, sizes = configs[name]
    AutoModel.from_config(AutoConfig.for_model(model_type, **sizes)).save_pretrained(folder)
    extractors.get(name, transformers.Wav2Vec2FeatureExtractor()).save_pretrained(folder)
    return AudioSettings(encoder="transformers", weights=str(folder), **options)
