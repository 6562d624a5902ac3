"""The input that an encoder needs: image size, mean and std, or sample rate and feature extractor.

These settings replace a processor's ``encoder: ${model.vision}``. They are read from the encoder's own
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
    """The processor settings that an encoder needs.

    Args:
        encoder: The section ``model.vision`` or ``model.audio``.
        modality: ``"vision"`` or ``"audio"``.

    Returns:
        ``image_size``, ``mean`` and ``std``, or ``extractor`` and ``clip_seconds``; empty for BEATs and for
        encoders registered by users.

    Raises:
        CheckpointError: If the encoder's configuration cannot be read or downloaded.
    """
    name, weights = encoder.get("encoder", "eva" if modality == "vision" else "beats"), encoder.get("weights")
    if name == "eva":
        return {"image_size": encoder["image_size"]} if "image_size" in encoder else {}
    if name == "timm":
        return _of_timm(encoder)
    if name != "transformers" or weights is None:
        return {}
    folder = hub.find(weights, f"model.{modality}.weights", "processor")
    if not (folder / PREPROCESSOR).is_file():
        return {}
    read = hub.read_config(folder, PREPROCESSOR)
    if modality == "vision":
        found = {"image_size": hub.image_size(read), "mean": read.get("image_mean"), "std": read.get("image_std")}
        return {key: value for key, value in found.items() if value is not None}
    return {"extractor": read, "clip_seconds": _clip_seconds(read)}


def _of_timm(encoder: Mapping[str, Any]) -> dict[str, Any]:
    import timm

    described: Mapping[str, Any] = {}
    if encoder.get("weights") is not None:
        folder = hub.find(encoder["weights"], "model.vision.weights", "processor")
        if (folder / "config.json").is_file():
            described = hub.read_config(folder).get("pretrained_cfg") or {}
    if not described and encoder.get("name"):
        known = timm.get_pretrained_cfg(encoder["name"], allow_unregistered=True)
        described = {} if known is None else known.to_dict()
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
