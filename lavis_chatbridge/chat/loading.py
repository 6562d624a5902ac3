"""A model with its processors, from a type, a run's folder or a YAML; the options of commands that answer with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_chatbridge.config import Settings, merged, read_options, read_yaml
from lavis_chatbridge.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from lavis_chatbridge.chat.engine import Engine
    from lavis_chatbridge.models.chatbridge import ChatBridge


class ModelOptions(Settings):
    """The model that a command answers with."""

    model: str = "tiny"
    """tiny, small, qwen3_8b, vicuna7b, vicuna13b, a run's folder, or a YAML."""
    options: tuple[str, ...] = ()
    """Override the model's YAML: KEY=VALUE."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ..."""
    template: str | None = None
    """human_assistant, vicuna_v1 or tokenizer; by default the model's."""
    engine: str = ""
    """A vLLM server that runs the language model: http://HOST:PORT/v1."""

    def open(self, **settings: Any) -> Engine:
        """An engine with a model of its own; ``settings`` are those of `Engine`."""
        from lavis_chatbridge.chat.engine import Engine
        from lavis_chatbridge.chat.reader import MediaReader

        built, processors = load_model(self.model, self.options, self.device, self.engine)
        return Engine(built, MediaReader(built, processors), self.template, **settings)


class TalkOptions(Settings):
    """How a command asks."""

    system: str = ""
    """System prompt."""
    video_sound: bool = True
    """Give the model videos' own sound tracks."""


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
    from omegaconf import OmegaConf

    from lavis_chatbridge.models.chatbridge import ChatBridge
    from lavis_chatbridge.processors import load_processors

    own = [*options, *([f"model.language_model.engine={engine}"] if engine else [])]
    config, place = _config(str(model), own, ChatBridge), _device(device)
    preprocess: Any = OmegaConf.to_container(config.get("preprocess") or OmegaConf.create({}), resolve=True)
    processors = load_processors(preprocess)
    return ChatBridge.from_config(config.model).to(place).eval(), processors


def default_processors(model: ChatBridge) -> dict[str, dict[str, Any]]:
    """The processors of a model's type."""
    from lavis_chatbridge.processors import load_processors

    return load_processors(read_yaml(model.default_config_path(model.settings.model_type)).get("preprocess"))


def _config(model: str, options: Sequence[str], chatbridge: type[ChatBridge]) -> Any:
    from omegaconf import OmegaConf

    wrong = [option for option in options if "=" not in option or not option.startswith(("model.", "preprocess."))]
    if wrong:
        raise ConfigError(f"option {wrong[0]!r}: expected model.KEY=VALUE or preprocess.KEY=VALUE")
    own: Any = read_yaml(model) if model.endswith((".yaml", ".yml")) else OmegaConf.create({})
    named = OmegaConf.select(own, "model.model_type") if len(own) else model
    base = read_yaml(chatbridge.default_config_path(named))
    sections = ["model", "preprocess"]
    return merged(*(OmegaConf.masked_copy(part, sections) for part in (base, own, read_options(options))))


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
