"""Which weight files a model needs, what a file holds, and whether the two fit: by names and shapes, nothing is built.

It judges files as the model does when it loads them (:mod:`lavis_chatbridge.models.checkpoint`), in a second instead of
minutes, and before there is a GPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from lavis_chatbridge.errors import CheckpointError, ConfigError
from lavis_chatbridge.models import checkpoint, delta, lora, shapes
from lavis_chatbridge.models.beats import BeatsConfig
from lavis_chatbridge.models.checkpoint import WeightFile
from lavis_chatbridge.models.settings import AudioSettings, ModelSettings

Layout = Literal["chatbridge", "blip2", "eva", "beats", "language_model", "unknown"]

LAYOUTS: dict[Layout, str] = {
    "chatbridge": "a trained ChatBridge",
    "blip2": "BLIP-2: queries, perceiver and ln_vision",
    "eva": "EVA-ViT",
    "beats": "BEATs",
    "language_model": "a language model",
    "unknown": "no layout that is known here",
}

_LAVIS_FILES = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"
HINTS = {
    "model.vision.weights": f"published as {_LAVIS_FILES}/eva_vit_g.pth",
    "model.audio.weights": "published by https://github.com/microsoft/unilm/tree/master/beats",
    "model.perceiver.weights": f"published as {_LAVIS_FILES}/blip2_pretrained_flant5xxl.pth",
    "model.language_model.weights": "published by https://huggingface.co/lmsys; Vicuna v0 as a delta: docs/weights.md",
    "model.language_model.tokenizer": "it is part of the language model's folder",
    "model.checkpoint": "null starts from an untrained bridge",
}
"""Where the file of a setting can be had, or what stands in for it."""

TRAINED = ("Qformer.", "audio_trans.", "llama_proj.", "image_query_tokens", "audio_query_tokens")
TEMPORAL = ("visual_temporal_pos_embeds", "audio_temporal_pos_embeds")
NORMS = ("ln_vision.", "ln_audio.")
ENCODERS = ("visual_encoder.", "audio_encoder.", "llama_model.")
_FROZEN_WITH_PERCEIVER = ("Qformer.", "audio_trans.", "image_query_tokens", "audio_query_tokens")
_OF_BLIP2 = ("image_query_tokens", "Qformer.", "ln_vision.")
_BLOCK = 1 << 22


class Need(NamedTuple):
    """A weight file or folder that a model's settings name.

    Attributes:
        setting: The setting.
        path: As the setting says.
        place: Where it was found, or none.
        size: Bytes of weights.
        fault: What is wrong with it and where it can be had, or nothing.
    """

    setting: str
    path: str
    place: Path | None
    size: int
    fault: str


class Converted(NamedTuple):
    """What a conversion did.

    Attributes:
        kept: Names of the tensors in the new file.
        dropped: Part -> number of its tensors that were left out.
        parameters: Numbers in the new file.
    """

    kept: list[str]
    dropped: dict[str, int]
    parameters: int


def named_files(settings: ModelSettings) -> dict[str, str]:
    """Setting -> the path that it names; settings without one are left out."""
    named = {
        "model.language_model.weights": settings.language_model.weights,
        "model.language_model.tokenizer": settings.language_model.tokenizer,
        "model.vision.weights": settings.vision.weights,
        "model.audio.weights": settings.audio.weights,
        "model.perceiver.weights": settings.perceiver.weights,
        "model.checkpoint": settings.trained,
    }
    return {setting: path for setting, path in named.items() if path is not None}


def needs(settings: ModelSettings) -> list[Need]:
    """Every weight file that the settings name, looked for but not read; of a language model one small tensor is."""
    found = []
    for setting, path in named_files(settings).items():
        try:
            place = checkpoint.find(path, setting, HINTS[setting])
        except CheckpointError as error:
            found.append(Need(setting, path, None, 0, str(error)))
            continue
        fault = folder_fault(place) if setting == "model.language_model.weights" else ""
        found.append(Need(setting, path, place, sum(file.stat().st_size for file in _files(place)), fault))
    return found


def open_file(path: Path) -> WeightFile:
    """Read a weight file, or the weights in a checkpoint's folder.

    Raises:
        CheckpointError: If it is missing, damaged, unsafe, or a language model's folder.
    """
    if path.is_dir() and (path / "config.json").is_file():
        raise CheckpointError(f"{path} is a language model's folder, which is used as it is")
    inner = path / "model.safetensors"
    return checkpoint.read(inner if inner.is_file() else path)


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """What sort of model a file's tensors belong to, by their names."""
    if "llama_proj.weight" in tensors:
        return "chatbridge"
    if "query_tokens" in tensors or "image_query_tokens" in tensors:
        return "blip2"
    if "patch_embed.proj.weight" in tensors and "pos_embed" in tensors:
        return "eva"
    if "patch_embedding.weight" in tensors and "post_extract_proj.weight" in tensors:
        return "beats"
    if any(name.endswith("embed_tokens.weight") or name.startswith("model.layers.") for name in tensors):
        return "language_model"
    return "unknown"


def check_finite(file: WeightFile) -> None:
    """Refuse a file with a NaN or an infinity in it.

    Raises:
        CheckpointError: With the tensors that hold one.
    """
    checkpoint.check_finite(file.tensors, file.path)


def check(file: WeightFile, settings: ModelSettings) -> None:
    """Refuse a file that the model of these settings could not load; values are not looked at.

    Raises:
        CheckpointError: With what does not fit.
    """
    layout = layout_of(file.tensors)
    if layout == "eva":
        own = settings.vision
        tensors = checkpoint.vision_tensors(file.tensors, own.depth, own.tokens)
        expected = shapes.vision_shapes(own)
        checkpoint.check_fit(expected, tensors, expected, file.path, "model.vision")
    elif layout == "beats":
        config = beats_config_of(file, settings.audio)
        expected = shapes.beats_shapes(config)
        tensors = checkpoint.beats_tensors(file.tensors, config.encoder_layers)
        checkpoint.check_fit(expected, tensors, expected, file.path, "model.audio")
    elif layout == "blip2":
        _check_blip2(file, settings)
    elif layout == "chatbridge":
        _check_bridge(file, settings)
    elif layout == "language_model":
        raise CheckpointError(f"{file.path} is a part of a language model; model.language_model.weights is a folder")
    else:
        raise CheckpointError(f"{file.path} has {LAYOUTS[layout]}; it holds {_some(list(file.tensors))}")


def convert(source: Path, target: Path, settings: ModelSettings | None = None, replace: bool = False) -> Converted:
    """Write the trained tensors of a ChatBridge checkpoint of any layout as safetensors, whole or not at all.

    The encoders' layer norms, which are frozen, are kept where the file holds them: results depend on them.

    Args:
        source: The checkpoint: a file, or a folder that training wrote.
        target: The safetensors file to write.
        settings: Of the model that it must fit, if that is to be checked.
        replace: Overwrite the target.

    Raises:
        CheckpointError: If the source cannot be used, or the target is there already; nothing is written then.
    """
    if target.suffix != ".safetensors":
        raise CheckpointError(f"{target}: the name of the file to write must end in .safetensors")
    if target.exists() and not replace:
        raise CheckpointError(f"{target} exists; name another file, or give --force to replace it")
    file = open_file(source)
    layout = layout_of(file.tensors)
    if layout != "chatbridge":
        raise CheckpointError(f"{file.path} is {LAYOUTS[layout]}, not {LAYOUTS['chatbridge']}: nothing to convert")
    check_finite(file)
    if settings is not None:
        check(file, settings)
    own = (*TRAINED, *TEMPORAL, *NORMS)
    named = checkpoint.bridge_tensors(file.tensors)
    tensors = {name: t for name, t in named.items() if name.startswith(own) or lora.is_adapter(name)}
    renamed = {"query_tokens"} if "image_query_tokens" in tensors else set()
    dropped: dict[str, int] = {}
    for name in file.tensors:
        if name not in tensors and name not in renamed:
            part = name.split(".", maxsplit=1)[0]
            dropped[part] = dropped.get(part, 0) + 1
    checkpoint.save(target, tensors, {"lora": file.cfg["lora"]} if file.cfg and "lora" in file.cfg else None)
    return Converted(sorted(tensors), dropped, sum(t.numel() for t in tensors.values()))


def beats_config(audio: AudioSettings) -> BeatsConfig:
    """The sizes of BEATs: from its file where that holds them, else from the settings.

    Raises:
        CheckpointError: If the file cannot be read, or is of other sizes than the settings.
    """
    if audio.weights is None:
        return audio.config or BeatsConfig()
    return beats_config_of(checkpoint.read(checkpoint.find(audio.weights, "model.audio.weights")), audio)


def beats_config_of(file: WeightFile, audio: AudioSettings) -> BeatsConfig:
    """The sizes of the BEATs in a file.

    Raises:
        CheckpointError: If they are not those of the settings.
    """
    if file.cfg is None:
        return audio.config or BeatsConfig()
    held = BeatsConfig.from_dict(file.cfg)
    if audio.config is not None and audio.config != held:
        raise CheckpointError(f"{file.path} holds {held}, but model.audio.config says {audio.config}")
    return held


def llm_config(settings: ModelSettings) -> dict[str, Any] | None:
    """The language model's configuration, or none while its folder is not there."""
    own = settings.language_model
    if own.weights is None:
        return own.config
    try:
        folder = checkpoint.find(own.weights, "model.language_model.weights")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (CheckpointError, OSError, ValueError):
        return None
    return config.get("text_config", config)


def folder_fault(folder: Path) -> str:
    """Why a folder is no whole language model of Hugging Face's form (a delta, say); nothing if it is one."""
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{folder / 'config.json'} cannot be read: {_one_line(error)}"
    for index in sorted(folder.glob("*.index.json")):
        try:
            wanted = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            return f"{index} cannot be read: {_one_line(error)}"
        missing = [name for name in wanted if not (folder / name).is_file()]
        if missing:
            return f"{folder} lacks {_some(missing)}, which {index.name} names: fetch the folder again"
    if not _files(folder):
        return f"{folder} holds no weights (*.safetensors or *.bin)"
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json", "vocab.json")):
        return f"{folder} holds no tokenizer (tokenizer.model or tokenizer.json)"
    return delta.fault(folder)


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's weight files one after the other: 64 hexadecimal digits."""
    total = hashlib.sha256()
    for file in _files(path):
        with open(file, "rb") as opened:
            while block := opened.read(_BLOCK):
                total.update(block)
    return total.hexdigest()


def _check_blip2(file: WeightFile, settings: ModelSettings) -> None:
    found = {n: t for n, t in checkpoint.bridge_tensors(file.tensors).items() if n.startswith(_OF_BLIP2)}
    all_of_it = shapes.bridge_shapes(settings, audio_width=1, llm_width=1)
    expected = {name: tensor for name, tensor in all_of_it.items() if name.startswith(_OF_BLIP2)}
    checkpoint.check_fit(expected, found, expected, file.path, "model.perceiver")


def _check_bridge(file: WeightFile, settings: ModelSettings) -> None:
    """As the model's own ``load_checkpoint`` does; a language model inside the file is not looked at."""
    found = checkpoint.bridge_tensors(file.tensors)
    found = {name: tensor for name, tensor in found.items() if not name.startswith("llama_model.")}
    config = llm_config(settings)
    llm_width = int(config["hidden_size"]) if config else found["llama_proj.weight"].shape[0]
    try:
        audio = beats_config(settings.audio)
    except (CheckpointError, ConfigError):  # not there yet: the published ones have these sizes
        audio = settings.audio.config or BeatsConfig()
    expected = shapes.bridge_shapes(settings, audio.encoder_embed_dim, llm_width)
    frozen = NORMS + (_FROZEN_WITH_PERCEIVER if settings.perceiver.frozen else ())
    required = [name for name in expected if not name.startswith(frozen)]
    expected |= {f"visual_encoder.{name}": t for name, t in shapes.vision_shapes(settings.vision).items()}
    expected |= {f"audio_encoder.{name}": t for name, t in shapes.beats_shapes(audio).items()}
    held = tuple(p for p in (*NORMS, *ENCODERS[:2]) if any(name.startswith(p) for name in found))
    required += [name for name in expected if held and name.startswith(held)]
    checkpoint.check_fit(expected, found, required, file.path, f"model type {settings.model_type}")


def _files(place: Path) -> list[Path]:
    """The weight files of a file or folder; safetensors come before copies in torch's format."""
    if place.is_file():
        return [place]
    for pattern in ("*.safetensors", "pytorch_model*.bin", "*.bin"):
        if found := sorted(place.glob(pattern)):
            return found
    return []


def _some(names: list[str]) -> str:
    more = f" and {len(names) - checkpoint.NAMED} more" if len(names) > checkpoint.NAMED else ""
    return ", ".join(names[: checkpoint.NAMED]) + more


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
