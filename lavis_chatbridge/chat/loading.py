"""A model with its processors, from the name of a model type or a configuration file; it knows no conversation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavis_chatbridge.errors import ConfigError


def load_model(
    model: str | Path = "tiny", options: Sequence[str] = (), device: str = "auto"
) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Build a ChatBridge for answering, and its processors.

    Args:
        model: A model type (``tiny``, ``vicuna7b``, ``vicuna13b``), or a YAML with ``model`` and ``preprocess``; what
            the YAML leaves out is that of its ``model.model_type``.
        options: Settings that override the YAML's, ``model.checkpoint=file`` for one.
        device: ``"auto"`` takes CUDA where there is one; else torch's name of a device.

    Returns:
        The model, in evaluation mode on its device, and the processors as `processors.load_processors` gives them.

    Raises:
        ConfigError: If there is no such type, file or device, or a setting does not fit.
        CheckpointError: If a weight file is missing or does not fit.
    """
    from omegaconf import OmegaConf

    from lavis_chatbridge.models.chatbridge import ChatBridge
    from lavis_chatbridge.processors import load_processors

    config = _config(str(model), options, ChatBridge)
    place = _device(device)
    preprocess: Any = OmegaConf.to_container(config.get("preprocess") or OmegaConf.create({}), resolve=True)
    processors = load_processors(preprocess)
    return ChatBridge.from_config(config.model).to(place).eval(), processors


def _config(model: str, options: Sequence[str], chatbridge: Any) -> Any:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    wrong = [option for option in options if "=" not in option or not option.startswith(("model.", "preprocess."))]
    if wrong:
        raise ConfigError(f"option {wrong[0]!r}: expected model.KEY=VALUE or preprocess.KEY=VALUE")
    try:
        own: Any = OmegaConf.create({})
        if model.endswith((".yaml", ".yml")):
            if not Path(model).is_file():
                raise ConfigError(f"no configuration file at {model}")
            own = OmegaConf.load(model)
        overrides = OmegaConf.from_dotlist(list(options))
        named = OmegaConf.select(own, "model.model_type") if len(own) else model
        base: Any = OmegaConf.load(chatbridge.default_config_path(named))
        return OmegaConf.merge(*(_sections(part) for part in (base, own, overrides)))
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"model {model}: {' '.join(str(error).split())}") from error


def _sections(config: Any) -> Any:
    """What a configuration says about the model and its processors."""
    from omegaconf import OmegaConf

    return OmegaConf.masked_copy(config, ["model", "preprocess"])


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is none that torch knows: use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name}: torch finds {torch.cuda.device_count()} CUDA devices here")
    return device
