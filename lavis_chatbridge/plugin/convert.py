"""``chatbridge convert``: converts a trained ChatBridge between four formats; tensors and their names stay equal.

- ``huggingface``: a folder with ``config.json``, safetensors and a model card.
- ``run``: a folder with ``config.yaml`` and ``model.safetensors``, as training writes it.
- ``original``: a file of torch with the tensors under ``model``, as the authors of ChatBridge released them.
- ``bridge``: a file of safetensors without the frozen models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.files import atomic_file, write_text

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
        import torch

        with atomic_file(out) as temporary:
            torch.save({"model": tensors}, temporary)
    elif to == "bridge":
        frozen = ("visual_encoder.", "audio_encoder.", "llama_model.")  # the layer norms are kept: results need them
        named = state_dicts.bridge_tensors(tensors)
        tensors = {name: t for name, t in named.items() if not name.startswith(frozen) or lora.is_adapter(name)}
        state_dicts.save(out, tensors, adapters)
    else:
        from omegaconf import OmegaConf

        from lavis_chatbridge.hf import ChatBridgeConfig

        config, folder = ChatBridgeConfig.find(source if source.is_dir() else str(model_type))
        saved = config.with_references(out, config.settings(folder))
        if to == "huggingface":
            saved.write(out, tensors)
        else:
            state_dicts.save(out / "model.safetensors", tensors, adapters)
            sections = {"model": saved.settings(out).model_dump(exclude_unset=True), "preprocess": saved.preprocess}
            write_text(out / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(sections)))
    typer.echo(f"{out}: {len(tensors)} tensors")
