"""Which weight files a model needs, what a file holds, and whether the two fit: by names and shapes, nothing is built.

It judges files as the model does when it loads them (:mod:`lavis_chatbridge.models.checkpoint`), in a second instead of
minutes, and before there is a GPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from lavis_chatbridge.errors import CheckpointError, ConfigError
from lavis_chatbridge.models import checkpoint, hub_folder, lora, shapes
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
        found.append(_looked_at(setting, path, place))
    return found


def _looked_at(setting: str, path: str, place: Path) -> Need:
    """A place that is there, judged by names, sizes and first bytes."""
    try:
        files = weight_files(setting, place)
        for file in files:
            checkpoint.check_no_stand_in(file)
        if setting == "model.language_model.weights" and (fault := hub_folder.fault(place)):
            raise CheckpointError(fault)
        return Need(setting, path, place, sum(file.stat().st_size for file in files), "")
    except (CheckpointError, OSError) as error:
        return Need(setting, path, place, 0, f"{setting}: {checkpoint.one_line(error)}")


def weight_files(setting: str, place: Path) -> list[Path]:
    """The files that a setting's place stands for.

    Raises:
        CheckpointError: If they are not there.
    """
    if setting == "model.language_model.weights":
        return hub_folder.weight_files(place)
    if setting == "model.language_model.tokenizer":
        return [hub_folder.tokenizer_file(place)]
    return [checkpoint.file_at(place)]


def open_file(path: Path) -> WeightFile:
    """Read a weight file, or the weights in a checkpoint's folder, and compare it with the checksums that it holds.

    Raises:
        CheckpointError: If it is missing, damaged, unsafe, or a language model's folder.
    """
    file = checkpoint.read(path)
    checkpoint.check_sums(file.path)
    return file


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
        raise CheckpointError(f"{file.path} has {LAYOUTS[layout]}; it holds {checkpoint.some(file.tensors)}")


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
    _check_target(target, replace)
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
    renamed = {"query_tokens"} if "query_tokens" not in named else set()
    dropped: dict[str, int] = {}
    for name in file.tensors:
        if name not in tensors and name not in renamed:
            part = name.split(".", maxsplit=1)[0]
            dropped[part] = dropped.get(part, 0) + 1
    _write(target, tensors, {"lora": file.cfg["lora"]} if file.cfg and "lora" in file.cfg else None)
    return Converted(sorted(tensors), dropped, sum(t.numel() for t in tensors.values()))


def _check_target(target: Path, replace: bool) -> None:
    try:
        if target.is_dir():
            raise CheckpointError(f"{target} is a folder, expected the name of the file to write")
        if target.exists() and not replace:
            raise CheckpointError(f"{target} exists; name another file, or give --force to replace it")
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {checkpoint.one_line(error)}") from error


def _write(target: Path, tensors: Mapping[str, Tensor], cfg: Mapping[str, Any] | None) -> None:
    from safetensors import SafetensorError

    try:
        checkpoint.save(target, tensors, cfg)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target} cannot be written: {checkpoint.one_line(error)}") from error


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
        return hub_folder.config_of(checkpoint.find(own.weights, "model.language_model.weights"))
    except CheckpointError:
        return None


def digest(*files: Path) -> str:
    """SHA-256 of files, one after the other: 64 hexadecimal digits.

    Raises:
        CheckpointError: If one cannot be read.
    """
    total = hashlib.sha256()
    for file in files:
        try:
            with open(file, "rb") as opened:
                while block := opened.read(_BLOCK):
                    total.update(block)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {checkpoint.one_line(error)}") from error
    return total.hexdigest()


def _check_blip2(file: WeightFile, settings: ModelSettings) -> None:
    found = {n: t for n, t in checkpoint.bridge_tensors(file.tensors).items() if n.startswith(_OF_BLIP2)}
    all_of_it = shapes.bridge_shapes(settings, audio_width=1, llm_width=1)
    expected = {name: tensor for name, tensor in all_of_it.items() if name.startswith(_OF_BLIP2)}
    checkpoint.check_fit(expected, found, expected, file.path, "model.perceiver")


def _check_bridge(file: WeightFile, settings: ModelSettings) -> None:
    """As the model's own ``load_checkpoint`` does; of a language model inside the file, a LLaMA is looked at."""
    found = checkpoint.bridge_tensors(file.tensors)
    config = llm_config(settings)
    what = f"model type {settings.model_type}"
    inside = {name: tensor for name, tensor in found.items() if name.startswith("llama_model.")}
    found = {name: tensor for name, tensor in found.items() if name not in inside}
    try:
        audio = beats_config(settings.audio)
    except (CheckpointError, ConfigError):  # not there yet: the published ones have these sizes
        audio = settings.audio.config or BeatsConfig()
    width = _llm_width(config) or next(iter(found["llama_proj.weight"].shape), 1)
    expected = shapes.bridge_shapes(settings, audio.encoder_embed_dim, width)
    frozen = NORMS + (_FROZEN_WITH_PERCEIVER if settings.perceiver.frozen else ())
    required = [name for name in expected if not name.startswith(frozen)]
    expected |= {f"visual_encoder.{name}": t for name, t in shapes.vision_shapes(settings.vision).items()}
    expected |= {f"audio_encoder.{name}": t for name, t in shapes.beats_shapes(audio).items()}
    held = tuple(p for p in (*NORMS, *ENCODERS[:2]) if any(name.startswith(p) for name in found))
    required += [name for name in expected if held and name.startswith(held)]
    checkpoint.check_fit(expected, found, required, file.path, what)
    _check_inside(file, checkpoint.part(inside, "llama_model."), settings, config, what)


def _check_inside(
    file: WeightFile, inside: Mapping[str, Tensor], settings: ModelSettings, config: dict[str, Any] | None, what: str
) -> None:
    """Adapters and a language model that a bridge's file holds."""
    own = settings.language_model
    held = lora.described_by(inside)
    if held is not None and file.cfg is not None and isinstance(file.cfg.get("lora"), Mapping):
        held |= file.cfg["lora"]
    expected = None
    if own.lora is not None:
        targets = sorted(own.lora.target_modules)
        expected = {"rank": own.lora.rank, "alpha": float(own.lora.alpha), "target_modules": targets}
    if fault := lora.misfit(held, expected, fresh_is_fine=True):
        raise CheckpointError(f"{file.path} does not fit {what}: {fault}")
    adapters = {name: tensor for name, tensor in inside.items() if lora.is_adapter(name)}
    whole = {lora.without_base(name): tensor for name, tensor in inside.items() if name not in adapters}
    if whole and own.quantization is not None:
        raise CheckpointError(
            f"{file.path} does not fit {what}: it holds a whole language model, but this one's is quantised to "
            f"{own.quantization}"
        )
    if config is None or config.get("model_type") != "llama":
        return
    if whole:
        places = shapes.llama_shapes(config)
        checkpoint.check_fit(places, whole, places, file.path, f"the language model of {what}")
    if adapters and own.lora is not None:
        places = shapes.adapter_shapes(config, own.lora)
        checkpoint.check_fit(places, adapters, places, file.path, f"the adapters of {what}")


def _llm_width(config: Mapping[str, Any] | None) -> int | None:
    """Width of a language model's embeddings, under the names that its family has for it."""
    named = (config or {}).get("word_embed_proj_dim"), (config or {}).get("hidden_size"), (config or {}).get("n_embd")
    return next((width for width in named if isinstance(width, int) and width > 0), None)
