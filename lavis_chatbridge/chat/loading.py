"""What the chat commands share: a model with its processors, and the options that choose both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavis_chatbridge.config import merged, parse, read_options, read_yaml
from lavis_chatbridge.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from lavis_chatbridge.chat.engine import Engine
    from lavis_chatbridge.models.chatbridge import ChatBridge
    from lavis_chatbridge.models.sampling import Sampling

Model = Annotated[
    str, typer.Option("--model", help="tiny, small, qwen3_8b, vicuna7b, vicuna13b, a run's folder, or a YAML.")
]
Options = Annotated[list[str], typer.Option("--options", help="Override the model's YAML: KEY=VALUE.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 ...")]
EngineUrl = Annotated[
    str, typer.Option("--engine", help="A vLLM server that runs the language model: http://HOST:PORT/v1.")
]
TemplateName = Annotated[
    str | None, typer.Option("--template", help="human_assistant, vicuna_v1 or tokenizer; by default the model's.")
]
System = Annotated[str, typer.Option("--system", help="System prompt.")]
NoVideoSound = Annotated[bool, typer.Option("--no-video-sound", help="Leave out videos' own sound tracks.")]
MaxContext = Annotated[int | None, typer.Option("--max-context", help="Tokens that the model reads at most.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Limit of a reply.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample within this probability.")]
NumBeams = Annotated[int, typer.Option("--num-beams", help="Above 1: beam search.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Samples the same reply again.")]
Stop = Annotated[list[str], typer.Option("--stop", help="A text that ends a reply; repeatable.")]


def sampling_of(**values: Any) -> Sampling:
    """The `Sampling` of a command's options.

    Raises:
        ConfigError: If a number is out of range.
    """
    from lavis_chatbridge.models.sampling import Sampling

    return parse(Sampling, values, "sampling")


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

    Returns:
        The model in evaluation mode on its device, and the processors as `processors.load_processors` gives them.

    Raises:
        ConfigError: If there is no such type, file or device, or a setting does not fit.
        CheckpointError: If a weight file is missing or does not fit.
        EngineError: If the server does not answer or serves another model.
    """
    if Path(model).is_dir():
        if (Path(model) / "config.yaml").is_file():
            return load_model(
                Path(model) / "config.yaml", [f"model.checkpoint={model}/model.safetensors", *options], device, engine
            )
        if (Path(model) / "config.json").is_file():
            raise ConfigError(
                f"--model {model} is a Hugging Face folder: first chatbridge convert {model} OUT --to run"
            )
    if not str(model).endswith((".yaml", ".yml")) and Path(model).suffix:
        raise ConfigError(f"--model {model}: expected a model type or a YAML")
    try:
        from lavis_chatbridge.models.chatbridge import ChatBridge
    except ModuleNotFoundError as error:
        if error.name != "lavis":
            raise
        raise ConfigError("LAVIS is not installed: pip install --no-deps salesforce-lavis==1.0.2") from error
    from omegaconf import OmegaConf

    from lavis_chatbridge.processors import load_processors

    own = [*options, *([f"model.language_model.engine={engine}"] if engine else [])]
    config, place = _config(str(model), own, ChatBridge), _device(device)
    preprocess: Any = OmegaConf.to_container(config.get("preprocess") or OmegaConf.create({}), resolve=True)
    processors = load_processors(preprocess)
    return ChatBridge.from_config(config.model).to(place).eval(), processors


def open_engine(
    model: str,
    options: Sequence[str] = (),
    device: str = "auto",
    template: str | None = None,
    engine: str = "",
    **settings: Any,
) -> Engine:
    """An engine with a model of its own, by a command's options; ``settings`` are those of `Engine`."""
    from lavis_chatbridge.chat.engine import Engine
    from lavis_chatbridge.chat.media import MediaReader

    built, processors = load_model(model, options, device, engine)
    return Engine(built, MediaReader(built, processors), template, **settings)


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
