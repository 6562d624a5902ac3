"""``chatbridge convert``: converts a ChatBridge between its three formats; the tensors stay equal.

A run's folder has ``model.safetensors`` and ``config.yaml``; a Hugging Face folder ``config.json`` and safetensors; the
original's checkpoint is a torch file with the tensors under ``model``. All use the same names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def command(
    source: Annotated[Path, typer.Argument(help="A run's folder, a Hugging Face folder, or a checkpoint file.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; for `original` a .pth file.")],
    to: Annotated[str, typer.Option(help="huggingface, run or original.")] = "huggingface",
    model_type: Annotated[str | None, typer.Option(help="Model type of a checkpoint file, such as vicuna13b.")] = None,
) -> None:
    """Convert a trained ChatBridge between its three formats."""
    if to not in ("huggingface", "run", "original"):
        raise typer.BadParameter(f"{to!r} is none of huggingface, run, original", param_hint="--to")
    count = convert(source, out, to, model_type)  # type: ignore[arg-type]
    typer.echo(f"{out}: {count} tensors")


def convert(
    source: Path, out: Path, to: Literal["huggingface", "run", "original"], model_type: str | None = None
) -> int:
    """Write the tensors of ``source`` in another format.

    Args:
        source: A run's folder, a Hugging Face folder, or a file.
        out: The output path; it must not exist.
        to: The format.
        model_type: The model type of a file, which contains no configuration.

    Returns:
        The number of tensors.

    Raises:
        CheckpointError: If ``out`` exists, the source is not a ChatBridge, or the model type of a file is not given.
    """
    import torch
    from huggingface_hub import save_torch_state_dict
    from omegaconf import OmegaConf

    from lavis_chatbridge.errors import CheckpointError
    from lavis_chatbridge.files import atomic_file, write_text
    from lavis_chatbridge.hf import ChatBridgeConfig, card
    from lavis_chatbridge.hf.modeling import config_of
    from lavis_chatbridge.models import state_dicts

    if out.exists():
        raise CheckpointError(f"{out} exists; choose another path")
    tensors = state_dicts.read(source).tensors
    if "llama_proj.weight" not in tensors:
        raise CheckpointError(f"{source} is not a ChatBridge; it contains {state_dicts.some(tensors)}")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if to == "original":
        with atomic_file(out) as temporary:
            torch.save({"model": tensors}, temporary)
        return len(tensors)
    if not source.is_dir() and model_type is None:
        raise CheckpointError(f"{source} contains no configuration: pass its --model-type, such as vicuna13b")
    config = config_of(source, source) if source.is_dir() else ChatBridgeConfig.of_type(str(model_type))
    out.mkdir(parents=True)
    saved = config.with_references(out, config.settings(source if source.is_dir() else None))
    if to == "huggingface":
        save_torch_state_dict(tensors, out)
        saved.save_pretrained(out)
        card.write(out, saved)
    else:
        state_dicts.save(out / "model.safetensors", tensors)
        sections = {"model": saved.settings(out).model_dump(exclude_unset=True), "preprocess": saved.preprocess}
        write_text(out / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(sections)))
    return len(tensors)
