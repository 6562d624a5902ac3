"""``chatbridge convert``: converts a trained ChatBridge between four formats; tensors and their names stay equal.

- ``huggingface``: a folder with ``config.json``, safetensors and a model card.
- ``run``: a folder with ``config.yaml`` and ``model.safetensors``, as training writes it.
- ``original``: a file of torch with the tensors under ``model``, as the authors of ChatBridge released them.
- ``bridge``: a file of safetensors without the frozen models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lavis_chatbridge import hub
from lavis_chatbridge.errors import CheckpointError, one_line
from lavis_chatbridge.files import atomic_file, atomic_folder, write_text

if TYPE_CHECKING:
    from torch import Tensor

    from lavis_chatbridge.hf import ChatBridgeConfig
    from lavis_chatbridge.models.settings import ModelSettings, Weights

FORMATS = ("huggingface", "run", "original", "bridge")


def command(
    source: Annotated[Path, typer.Argument(help="A run's folder, a Hugging Face folder, or a checkpoint file.")],
    out: Annotated[Path, typer.Argument(help="The folder or file to write; it must not exist.")],
    to: Annotated[str, typer.Option(help="huggingface, run (folders), original (.pth) or bridge (.safetensors).")] = (
        "huggingface"
    ),
    model_type: Annotated[str | None, typer.Option(help="Model type of a checkpoint file, such as vicuna13b.")] = None,
) -> None:
    """Convert a trained ChatBridge to another format."""
    from lavis_chatbridge.models import lora, state_dicts

    if to not in FORMATS:
        raise typer.BadParameter(f"{to!r} is none of {', '.join(FORMATS)}", param_hint="--to")
    if out.exists():
        raise CheckpointError(f"{out} exists: choose another path")
    if source.is_file() and to in ("huggingface", "run") and model_type is None:
        raise CheckpointError(f"{source} contains no configuration: pass its --model-type, such as vicuna13b")
    tensors, cfg = state_dicts.read(source)[1:]
    if "llama_proj.weight" not in tensors:
        raise CheckpointError(f"{source} is not a ChatBridge: it contains {state_dicts.shortened(tensors)}")
    adapters = {"lora": cfg["lora"]} if cfg and "lora" in cfg else None
    if to == "original":
        _write_original(tensors, out)
    elif to == "bridge":
        frozen = ("visual_encoder.", "audio_encoder.", "llama_model.")  # the layer norms are kept: results need them
        named = state_dicts.bridge_tensors(tensors)
        tensors = {name: t for name, t in named.items() if not name.startswith(frozen) or lora.is_adapter(name)}
        state_dicts.save(out, tensors, adapters)
    else:
        from lavis_chatbridge.hf import ChatBridgeConfig

        config, folder = ChatBridgeConfig.find(source if source.is_dir() else str(model_type))
        settings = config.settings(folder)
        if not source.is_dir():
            _check_fit(source, tensors, settings)
        if settings.perceiver.weights is not None and "ln_vision.weight" not in tensors:
            tensors = {**tensors, **_vision_norm(settings.perceiver.weights)}
        saved = config.with_references(out, settings)
        with atomic_folder(out) as partial:
            if to == "huggingface":
                saved.write(partial, tensors)
            else:
                _write_run(saved, tensors, adapters, partial)
    typer.echo(f"{out}: {len(tensors)} tensors")


def _write_original(tensors: Mapping[str, Tensor], out: Path) -> None:
    import torch

    try:
        with atomic_file(out) as temporary:
            torch.save({"model": tensors}, temporary)
    except RuntimeError as error:  # torch's zip writer
        raise CheckpointError(f"cannot write {out}: {one_line(error)}; is the disk full?") from error


def _write_run(
    config: ChatBridgeConfig, tensors: Mapping[str, Tensor], adapters: dict[str, str] | None, folder: Path
) -> None:
    from omegaconf import OmegaConf

    from lavis_chatbridge.models import state_dicts

    state_dicts.save(folder / "model.safetensors", tensors, adapters)
    model = config.settings(folder).model_dump(exclude_unset=True)
    sections = OmegaConf.create({"model": model, "preprocess": config.preprocess})
    write_text(folder / "config.yaml", OmegaConf.to_yaml(sections))


def _vision_norm(names: Weights) -> dict[str, Tensor]:
    """BLIP-2's frozen layer norm: a run reads it from BLIP-2's file, which a converted folder does not refer to."""
    from lavis_chatbridge.models import state_dicts

    prefixes = state_dicts.BLIP2_BRIDGE
    file = state_dicts.read(hub.find(names, "model.perceiver.weights", prefixes=prefixes), prefixes)
    named = state_dicts.from_huggingface(file.tensors)
    return {name: tensor for name, tensor in named.items() if name.startswith("ln_vision.")}


def _check_fit(source: Path, tensors: Mapping[str, Tensor], settings: ModelSettings) -> None:
    """Raise a `CheckpointError` if a file's bridge has other shapes than the settings; builds no frozen model.

    Widths that are in no setting, but in a file of a frozen part that is not on this disk, are not compared.
    """
    import torch

    from lavis_chatbridge.models import encoding, state_dicts

    own, llm = settings.perceiver, settings.language_model
    found = state_dicts.bridge_tensors(tensors)
    width = settings.vision.width if settings.vision.encoder == "eva" else len(found.get("audio_trans.bias", ()))
    folder = hub.status(llm.weights, "model.language_model.weights", "language_model").path if llm.weights else None
    sizes = hub.read_config(folder) if folder else llm.config or {}
    hidden = sizes.get("hidden_size", len(found["llama_proj.weight"]))
    with state_dicts.on_meta():
        expected = encoding.build_perceiver(own, width).state_dict(prefix="Qformer.")
        queries = torch.empty(1, own.queries, own.width)
        expected |= {"image_query_tokens": queries, "audio_query_tokens": queries}
        expected |= {"audio_trans.bias": torch.empty(width), "llama_proj.weight": torch.empty(hidden, own.width)}
    expected = state_dicts.bridge_tensors(expected)
    compared = {name: t for name, t in found.items() if name in expected or name.startswith("Qformer.")}
    state_dicts.check_fit(expected, compared, expected, source, f"model type {settings.model_type}")
