"""Settings: a mapping (YAML, command line) becomes a typed dataclass, or one error that names every fault.

An unknown key is a fault that names the nearest known one; so are a missing key, a wrong type and whatever the
dataclass's own ``check()`` yields. This module knows no setting by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from lavis_chatbridge.errors import ConfigError

T = TypeVar("T")

_LONGEST_KEY = 80

_short = reprlib.Repr()
_short.maxstring, _short.maxother, _short.maxlong = 80, 80, 40


def shown(value: Any) -> str:
    """A value as a message shows it: whatever somebody wrote, in a line that can be read."""
    return _short.repr(value)


def parse(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the settings dataclass ``cls`` from ``values``.

    Args:
        cls: A dataclass. Fields may be ``bool``, ``int``, ``float``, ``str``, ``list[...]``, ``tuple[...]``,
            ``dict[str, ...]``, ``Literal[...]``, another dataclass, or a union with ``None``. An optional method
            ``check(self) -> Iterable[str]`` yields contradictions between fields.
        values: The mapping to read.
        where: The section's name, for messages (``"run"``, ``"model"``).

    Raises:
        ConfigError: With all faults at once.
    """
    faults: list[str] = []
    built = _build(cls, values, where, faults)
    if faults:
        raise ConfigError("; ".join(faults))
    return typing.cast(T, built)


def checked(settings: T) -> T:
    """Settings that were built by hand, themselves.

    Raises:
        ConfigError: With all faults that their ``check()`` yields.
    """
    faults = list(settings.check())  # type: ignore[attr-defined]
    if faults:
        raise ConfigError("; ".join(faults))
    return settings


def unknown_key(key: str, known: Iterable[str], where: str) -> str:
    """The sentence for a key that ``where`` does not have, with the nearest one that it has."""
    near = difflib.get_close_matches(key[:_LONGEST_KEY], list(known), n=1)
    hint = f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
    return f"unknown key {where}.{key if key.isprintable() and len(key) <= _LONGEST_KEY else shown(key)}{hint}"


def _build(cls: type, values: Any, where: str, faults: list[str]) -> Any:
    if not isinstance(values, Mapping):
        faults.append(f"{where}: expected a mapping, found {shown(values)}")
        return None
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    before = len(faults)
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            faults.append(unknown_key(str(key), fields, where))
        else:
            arguments[key] = _convert(value, hints[key], f"{where}.{key}", faults)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            faults.append(f"{where}.{name} is missing")
    if len(faults) > before:
        return None
    built = cls(**arguments)
    check = getattr(built, "check", None)
    if check is not None:
        faults.extend(f"{where}: {fault}" for fault in check())
    return built


def _convert(value: Any, hint: Any, where: str, faults: list[str]) -> Any:
    """``value`` as the type ``hint``; appends to ``faults`` and returns ``value`` itself where it does not fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, where, faults)
    if origin is typing.Literal:
        if value not in arguments:
            near = difflib.get_close_matches(shown(value).strip("'"), [str(a) for a in arguments], n=1)
            hint_text = f", did you mean {near[0]!r}?" if near else ""
            faults.append(f"{where}: {shown(value)} is not one of {', '.join(map(repr, arguments))}{hint_text}")
        return value
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where, faults)
    if origin in (list, tuple) or hint in (list, tuple):
        if not isinstance(value, (list, tuple)):
            faults.append(f"{where}: expected a list, found {shown(value)}")
            return value
        inner = arguments[0] if arguments else Any
        items = [_convert(item, inner, f"{where}[{i}]", faults) for i, item in enumerate(value)]
        return tuple(items) if (origin or hint) is tuple else items
    if origin is dict or hint is dict:
        if value is None:  # a key with nothing behind it, which also empties what a default holds
            return {}
        if not isinstance(value, Mapping):
            faults.append(f"{where}: expected a mapping, found {shown(value)}")
            return value
        inner = arguments[1] if arguments else Any
        return {str(key): _convert(item, inner, f"{where}.{key}", faults) for key, item in value.items()}
    return _convert_scalar(value, hint, where, faults)


def _convert_union(value: Any, options: tuple, where: str, faults: list[str]) -> Any:
    if value is None and type(None) in options:
        return None
    tried: list[str] = []
    for option in options:
        if option is type(None):
            continue
        attempt: list[str] = []
        converted = _convert(value, option, where, attempt)
        if not attempt:
            return converted
        tried = tried or attempt
    faults.extend(tried)
    return value


def _convert_scalar(value: Any, hint: Any, where: str, faults: list[str]) -> Any:
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-4 (no dot) as a string
        except (ValueError, OverflowError):
            number = math.nan
        if not math.isnan(number):
            return number
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)) and hint is not float:
        return value
    faults.append(f"{where}: expected {hint.__name__}, found {shown(value)}")
    return value
