"""Options that ask, chat, web and serve share: each field of a `Settings` parameter becomes a command-line option."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import typing
from collections.abc import Callable
from inspect import Parameter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavis_chatbridge.config import Settings, parse
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.models.sampling import Sampling

if TYPE_CHECKING:
    from lavis_chatbridge.chat.engine import Engine

SAMPLED = [
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "num_beams",
    "seed",
    "stop",
]
"""The fields of `Sampling` that users of a command may set."""


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

    def announce(self) -> None:
        """Say on stderr what is loaded, before the imports that take seconds."""
        print(f"loading {self.model} ...", file=sys.stderr, flush=True)

    def open(self, **settings: Any) -> Engine:
        """An engine with a model of its own; ``settings`` are those of `Engine`."""
        from lavis_chatbridge.chat.conversation import MediaReader
        from lavis_chatbridge.chat.engine import Engine
        from lavis_chatbridge.chat.session import load_model

        model, processors = load_model(self.model, self.options, self.device, self.engine)
        return Engine(model, MediaReader(model, processors), self.template, **settings)


class TalkOptions(Settings):
    """How a command asks."""

    system: str = ""
    """System prompt."""
    video_sound: bool = True
    """Give the model videos' own sound tracks."""


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command for typer: fields of `Settings` become options, whose help is the field's docstring.

    Faults of the values raise ConfigError, all together.
    """
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, type[Settings]] = {}
    options: list[Parameter] = []
    for parameter in signature.parameters.values():
        cls = parameter.annotation
        if isinstance(cls, type) and issubclass(cls, Settings):
            groups[parameter.name] = cls
            options += [_option(cls, name) for name in _fields(cls)]
        else:
            options.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def call(**values: Any) -> Any:
        for name, cls in groups.items():
            given = {field: values.pop(field) for field in _fields(cls) if field in values}
            try:
                values[name] = parse(cls, given, "options")
            except ConfigError as error:  # name the options as they are typed
                raise ConfigError(re.sub(r"(^|; )options(\.\w+|: )", _typed, str(error))) from error
        return command(**values)

    call.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    call.__annotations__ = {option.name: option.annotation for option in options}
    return call


def _typed(fault: re.Match[str]) -> str:
    option = fault[2].strip(":. ").replace("_", "-")
    return fault[1] + (f"--{option}" if option else "")


def _fields(cls: type[Settings]) -> list[str]:
    return SAMPLED if cls is Sampling else list(cls.model_fields)


def _option(cls: type[Settings], name: str) -> Parameter:
    field = cls.model_fields[name]
    annotation: Any = field.annotation
    default = field.default
    if typing.get_origin(annotation) is tuple:  # typer reads a tuple as an option with several values
        annotation, default = list[typing.get_args(annotation)[0]], list(default)  # type: ignore[misc]
    option = Annotated[annotation, typer.Option(help=field.description)]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=option)
