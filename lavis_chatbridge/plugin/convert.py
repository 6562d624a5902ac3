"""``chatbridge convert``: converts a ChatBridge between its three formats; the tensors stay equal.

A run's folder has ``model.safetensors`` and ``config.yaml``; a Hugging Face folder ``config.json`` and safetensors; the
original's checkpoint is a torch file with the tensors under ``model``. All use the same names.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.files import atomic_file, write_text

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("huggingface", "run", "original")


def command(
    source: Annotated[Path, typer.Argument(help="A run's folder, a Hugging Face folder, or a checkpoint file.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; for `original` a .pth file.")],
    to: Annotated[str, typer.Option(help="huggingface, run or original.")] = "huggingface",
    model_type: Annotated[str | None, typer.Option(help="Model type of a checkpoint file, such as vicuna13b.")] = None,
) -> None:
    """Convert a trained ChatBridge between its three formats."""
    from lavis_chatbridge.models import state_dicts

    if to not in FORMATS:
        raise typer.BadParameter(f"{to!r} is none of {', '.join(FORMATS)}", param_hint="--to")
    if source.is_file() and to != "original" and model_type is None:
        raise CheckpointError(f"{source} contains no configuration: pass its --model-type, such as vicuna13b")
    tensors = state_dicts.read_chatbridge(source, out).tensors
    if to == "original":
        import torch

        with atomic_file(out) as temporary:
            torch.save({"model": tensors}, temporary)
    else:
        _write_folder(tensors, source if source.is_dir() else str(model_type), out, to)
    typer.echo(f"{out}: {len(tensors)} tensors")


def _write_folder(tensors: dict[str, Tensor], name: Path | str, out: Path, to: str) -> None:
    from omegaconf import OmegaConf

    from lavis_chatbridge.hf import ChatBridgeConfig
    from lavis_chatbridge.models import state_dicts

    config, folder = ChatBridgeConfig.find(name)
    saved = config.with_references(out, config.settings(folder))
    if to == "huggingface":
        saved.write(out, tensors)
        return
    state_dicts.save(out / "model.safetensors", tensors)
    sections = {"model": saved.settings(out).model_dump(exclude_unset=True), "preprocess": saved.preprocess}
    write_text(out / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(sections)))
