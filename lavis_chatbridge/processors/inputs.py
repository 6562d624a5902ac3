"""The input that an encoder needs: image size, mean and std, or sample rate and feature extractor.

A processor's ``encoder: ${model.vision}`` is replaced by these settings, which are read from the encoder's own
``preprocessor_config.json`` or timm's configuration; no weights are loaded.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lavis_chatbridge import hub
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.media.frames import one_of_each
from lavis_chatbridge.media.types import AudioClips

PREPROCESSOR = "preprocessor_config.json"
_SECONDS = 10.0
"""Length of a clip for encoders without a window of their own (wav2vec2, HuBERT)."""

_SHORTEST = 0.1
"""A shorter remainder of a sound (in seconds) is dropped."""


def settings_for(encoder: Mapping[str, Any], modality: str) -> dict[str, Any]:
    """The processor settings that an encoder needs.

    Args:
        encoder: The section ``model.vision`` or ``model.audio``.
        modality: ``"vision"`` or ``"audio"``.

    Returns:
        ``image_size``, ``mean`` and ``std``, or ``extractor`` and ``clip_seconds``; empty for BEATs and for
        encoders that users register.

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


def clips_of(
    samples: np.ndarray,
    extractor: Mapping[str, Any],
    clip_seconds: float,
    max_clips: int,
    rng: np.random.Generator | None = None,
) -> AudioClips:
    """Cut a sound into clips and extract the features of each.

    Args:
        samples: ``[S]`` at the extractor's rate.
        extractor: A ``preprocessor_config.json`` of transformers.
        clip_seconds: Length of a clip.
        max_clips: A longer sound is divided into this many equal stretches, and one clip of each is used.
        rng: Chooses a random clip of each stretch; None chooses the middle one.
    """
    rate = int(extractor["sampling_rate"])
    length = int(clip_seconds * rate)
    count = -(-len(samples) // length)
    if count > 1 and len(samples) - (count - 1) * length < _SHORTEST * rate:
        count -= 1
    chosen = list(range(count)) if count <= max_clips else one_of_each(range(count), max_clips, rng)
    clips = [samples[clip * length : (clip + 1) * length] for clip in chosen]
    built = _extractor(json.dumps(dict(extractor), sort_keys=True))
    each = [next(iter(built(clip, sampling_rate=rate, return_tensors="pt").values()))[0] for clip in clips]
    features = pad_sequence(each, batch_first=True)  # waveforms differ in length, other features do not
    return AudioClips(features, _valid(features, clips, getattr(built, "hop_length", 1)))


def _valid(features: Tensor, clips: list[np.ndarray], hop: int) -> Tensor:
    """``[N]`` number of steps of each clip that are sound; all steps if the encoder was trained on padded windows."""
    lengths = torch.tensor([len(clip) for clip in clips])
    if features.dim() == 2:  # [N, S] waveforms
        return lengths
    if features.dim() == 3 and features.shape[2] > features.shape[1]:  # [N, M, F] of Whisper
        return (-(-lengths // hop)).clamp(max=features.shape[2])
    return torch.full((len(clips),), features.shape[-2])


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


@functools.lru_cache(maxsize=4)
def _extractor(described: str) -> Any:
    import transformers

    values = json.loads(described)
    name = values.get("feature_extractor_type")
    built = getattr(transformers, str(name), None)
    if built is None or not issubclass(built, transformers.FeatureExtractionMixin):
        raise ConfigError(f"{PREPROCESSOR}: transformers has no feature extractor {name!r} (feature_extractor_type)")
    return built.from_dict(values)
