"""Options of the chat commands: a parameter of a command that is `Settings` becomes one option for each field."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from inspect import Parameter
from typing import Annotated, Any

import typer

from lavis_chatbridge.config import Settings, parse
from lavis_chatbridge.models.sampling import Sampling

SAMPLED = (
    *("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "num_beams", "seed", "stop"),
)
"""The fields of `Sampling` that users of a command may set."""


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
            values[name] = parse(cls, given, "options")
        return command(**values)

    call.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    call.__annotations__ = {option.name: option.annotation for option in options}
    return call


def _fields(cls: type[Settings]) -> tuple[str, ...]:
    return SAMPLED if cls is Sampling else tuple(cls.model_fields)


def _option(cls: type[Settings], name: str) -> Parameter:
    field = cls.model_fields[name]
    annotation: Any = field.annotation
    default = field.default
    if typing.get_origin(annotation) is tuple:  # typer reads a tuple as an option with several values
        annotation, default = list[typing.get_args(annotation)[0]], list(default)  # type: ignore[misc]
    option = Annotated[annotation, typer.Option(help=field.description)]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=option)
