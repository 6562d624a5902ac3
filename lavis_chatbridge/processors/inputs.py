"""The processor settings that an encoder needs: image size, mean and std, or feature extractor and clip length.

They replace a processor's ``encoder: ${model.vision}``, and are read from the encoder's own
``preprocessor_config.json`` or timm's configuration, without loading weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavis_chatbridge import hub

PREPROCESSOR = "preprocessor_config.json"
_SECONDS = 10.0
"""Length of a clip in seconds for encoders without a fixed window (wav2vec2, HuBERT)."""


def settings_for(encoder: Mapping[str, Any], modality: str) -> dict[str, Any]:
    """The settings for the section ``model.vision`` or ``model.audio`` (``modality``).

    Empty for BEATs and for encoders registered by users.
    """
    name = encoder.get("encoder", "eva" if modality == "vision" else "beats")
    if name == "eva":
        return {"image_size": encoder["image_size"]} if "image_size" in encoder else {}
    if name == "timm":
        return _of_timm(encoder)
    if name != "transformers":
        return {}
    read = _read(encoder, modality, PREPROCESSOR)
    if not read:
        return {}
    if modality == "vision":
        found = {"image_size": hub.image_size(read), "mean": read.get("image_mean"), "std": read.get("image_std")}
        return {key: value for key, value in found.items() if value is not None}
    return {"extractor": read, "clip_seconds": _clip_seconds(read)}


def _read(encoder: Mapping[str, Any], modality: str, name: str) -> dict[str, Any]:
    """A configuration file of the encoder's weights, or an empty mapping if there is none."""
    if encoder.get("weights") is None:
        return {}
    folder = hub.find(encoder["weights"], f"model.{modality}.weights", "processor")
    return hub.read_config(folder, name) if (folder / name).is_file() else {}


def _of_timm(encoder: Mapping[str, Any]) -> dict[str, Any]:
    import timm

    described = _read(encoder, "vision", "config.json").get("pretrained_cfg")
    if not described and encoder.get("name"):
        known = timm.get_pretrained_cfg(encoder["name"], allow_unregistered=True)
        described = None if known is None else known.to_dict()
    if not described:
        return {}
    data = timm.data.resolve_data_config({}, pretrained_cfg=dict(described))
    return {"image_size": data["input_size"][1], "mean": list(data["mean"]), "std": list(data["std"])}


def _clip_seconds(extractor: Mapping[str, Any]) -> float:
    """Length in seconds of the window that an encoder was trained on."""
    for key in ("chunk_length", "max_length_s"):  # Whisper, CLAP
        if extractor.get(key):
            return float(extractor[key])
    frames = extractor.get("max_length")  # AST: frames of 10 ms
    return frames / 100 if extractor.get("feature_extractor_type") == "ASTFeatureExtractor" and frames else _SECONDS
