"""A model with its processors, from a model type, a run's folder or a YAML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_chatbridge.config import merged, read_options, read_yaml
from lavis_chatbridge.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from lavis_chatbridge.models.chatbridge import ChatBridge

_SECTIONS = ["model", "preprocess"]


def load_model(
    model: str | Path = "tiny", options: Sequence[str] = (), device: str = "auto", engine: str = ""
) -> tuple[ChatBridge, dict[str, dict[str, Any]]]:
    """Build a ChatBridge for answering, and its processors.

    Args:
        model: A model type (``tiny``, ``vicuna7b``, ``vicuna13b``), a run's folder, or a YAML with ``model``
            and ``preprocess``; keys that it leaves out come from its ``model.model_type``.
        options: Settings that override the YAML's, ``model.checkpoint=file`` for example.
        device: ``"auto"`` takes CUDA if there is a device; else torch's name of one.
        engine: The address of a vLLM server that runs the language model; empty for a local one.

    Raises:
        ConfigError: If there is no such type, file or device, or a setting does not fit.
        CheckpointError: If a weight file is missing or does not fit.
        EngineError: If the server does not answer or serves another model.
    """
    folder = Path(model)
    if (folder / "config.yaml").is_file():
        options = [f"model.checkpoint={folder}/model.safetensors", *options]
        model = folder / "config.yaml"
    elif (folder / "config.json").is_file():
        raise ConfigError(f"--model {model} is a Hugging Face folder: first chatbridge convert {model} OUT --to run")
    if engine:
        options = [*options, f"model.language_model.engine={engine}"]
    if wrong := [option for option in options if "=" not in option or not option.startswith(("model.", "preprocess."))]:
        raise ConfigError(f"option {wrong[0]!r}: expected model.KEY=VALUE or preprocess.KEY=VALUE")
    from omegaconf import OmegaConf

    from lavis_chatbridge.models.chatbridge import ChatBridge
    from lavis_chatbridge.processors import load_processors

    own: Any = read_yaml(model) if str(model).endswith((".yaml", ".yml")) else OmegaConf.create({})
    base = read_yaml(ChatBridge.default_config_path(OmegaConf.select(own, "model.model_type") if own else str(model)))
    config = merged(*(OmegaConf.masked_copy(part, _SECTIONS) for part in (base, own, read_options(options))))
    place = _device(device)
    processors = load_processors(config.get("preprocess"))
    return ChatBridge.from_config(config.model).to(place).eval(), processors


def default_processors(model: ChatBridge) -> dict[str, dict[str, Any]]:
    """The processors of a model's type."""
    from lavis_chatbridge.processors import load_processors

    return load_processors(read_yaml(model.default_config_path(model.settings.model_type)).get("preprocess"))


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"torch knows no device {name!r}: use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name}: torch finds {torch.cuda.device_count()} CUDA devices here")
    return device
