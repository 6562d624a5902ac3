"""Settings: validates a mapping (YAML, command line) into a pydantic model, or raises one error with every fault.

Reads YAML files and ``--options`` for all commands. This module defines no setting.
"""

from __future__ import annotations

import difflib
import json
import os
import reprlib
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator

from lavis_chatbridge.errors import ConfigError, one_line

if typing.TYPE_CHECKING:
    from omegaconf import DictConfig

M = TypeVar("M", bound=BaseModel)

PROJECTS = Path(__file__).parent / "configs" / "projects"
"""The shipped run configurations; in a git checkout, a link to ``projects/chatbridge``."""

_short = reprlib.Repr()
_short.maxstring, _short.maxother, _short.maxlong = 80, 80, 40

_EXPECTED = {"int": "int", "float": "float", "bool": "bool", "string": "str", "list": "a list", "tuple": "a list"}
_EXPECTED |= {"dict": "a mapping", "model": "a mapping"}
_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


class Settings(BaseModel):
    """Base of every section of a configuration.

    Use :func:`parse` for a user's values, and the constructor in code.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _without_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Raise for YAML's ``true`` where numbers are expected (also in a list or mapping): pydantic reads it as 1."""
        inner = list(value.values()) if isinstance(value, Mapping) else value
        if isinstance(inner, bool) or (isinstance(inner, (list, tuple)) and any(isinstance(v, bool) for v in inner)):
            types = _types_in(cls.model_fields[str(info.field_name)].annotation)
            if not {bool, Any} & {*types} and (int in types or float in types):
                raise ValueError(f"expected a number, found {json.dumps(value, default=str)}")
        return value

    @model_validator(mode="after")
    def _without_contradictions(self) -> Settings:
        if faults := list(self.check()):
            raise ValueError("; ".join(faults))
        return self

    def check(self) -> Iterable[str]:
        """Yield an error text for each contradiction between fields."""
        return ()


def find_yaml(path: str | os.PathLike) -> Path:
    """Find a YAML file by its path, or a shipped one by its name: ``align``, ``vicuna7b/align``, ``eval/okvqa``."""
    if Path(path).is_file():
        return Path(path)
    name = str(path).removeprefix("projects/chatbridge/").removesuffix(".yaml")
    if (shipped := PROJECTS / f"{name}.yaml").is_file():
        return shipped
    known = sorted(str(file.relative_to(PROJECTS).with_suffix("")) for file in PROJECTS.rglob("*.yaml"))
    near = difflib.get_close_matches(name, known, n=1)
    raise ConfigError(f"no configuration file at {path}" + (f"; did you mean the shipped {near[0]!r}?" if near else ""))


def read_yaml(path: str | os.PathLike) -> DictConfig:
    """Read a YAML file (see `find_yaml`) with a mapping; ``${...}`` is resolved when a value is read."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    file = find_yaml(path)
    try:
        loaded = OmegaConf.load(file)
    except (YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {one_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of sections, found a list")
    return loaded


def read_options(options: Sequence[str]) -> DictConfig:
    """The mapping of options ``KEY=VALUE``."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if without := [word for word in options if "=" not in word]:
        raise ConfigError(f"option {without[0]!r} has no value; write KEY=VALUE")
    try:
        read = OmegaConf.from_dotlist(list(options))
        for key, _, text in (word.partition("=") for word in options):
            if key == "run.job_id" and isinstance(OmegaConf.select(read, key), (int, float)):
                OmegaConf.update(read, key, text)  # Slurm's 123_4 is the number 1234 in YAML
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"options: {one_line(error)}") from error
    return read


def merged(*configs: Any) -> DictConfig:
    """Mappings merged, later ones over earlier ones."""
    from omegaconf import DictConfig, OmegaConf

    try:
        result = OmegaConf.merge(*configs)
    except (TypeError, ValueError) as error:
        raise ConfigError(one_line(error)) from error
    if not isinstance(result, DictConfig):
        raise ConfigError(f"expected mappings, found {shown(result)}")
    return result


def shown(value: Any) -> str:
    """A value as one short line, for error messages."""
    return _short.repr(value)


def hint(name: str, known: Iterable[str]) -> str:
    """``, did you mean 'NEAREST'?``, or the known names if none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name[:80], known, n=1)
    return f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def unknown_key(key: str, known: Iterable[str], where: str) -> str:
    """The error text for a key that ``where`` does not have."""
    return f"unknown key {where}.{key if key.isprintable() and len(key) <= 80 else shown(key)}{hint(key, known)}"


def parse(cls: type[M], values: Any, where: str) -> M:
    """Build settings from a mapping, or raise a `ConfigError` with all faults; ``where`` is the section's name."""
    if type(values).__module__.startswith("omegaconf"):
        from omegaconf import OmegaConf

        values = OmegaConf.to_container(values, resolve=True)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping, found {shown(values)}")
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(explained(cls, values, error, where)) from error


def explained(cls: type[BaseModel], values: Any, error: ValidationError, where: str) -> str:
    """The error text with all faults of values; ``where`` is their section's name."""
    sentences: dict[str, str] = {}  # one fault per key: a union has one per branch
    for fault in error.errors(include_url=False):
        key = _key_of(values, fault, where)
        distinct = f"{key} {fault['msg']}" if fault["type"] == "value_error" else key
        sentences.setdefault(distinct, _sentence(cls, fault, key))
    return "; ".join(sentences.values())


def _key_of(values: Any, fault: Any, where: str) -> str:
    """The dotted key of a fault, without pydantic's names of a union's branches, which are not keys."""
    for part in fault["loc"]:
        if isinstance(values, Mapping) and part in values:
            where, values = f"{where}.{part}", values[part]
        elif isinstance(part, int) and isinstance(values, Sequence):
            where, values = f"{where}[{part}]", values[part] if part < len(values) else None
        elif fault["type"] == "missing":
            where = f"{where}.{part}"
    return where


def _sentence(cls: type[BaseModel], fault: Any, key: str) -> str:
    found, context = shown(fault["input"]), fault.get("ctx", {})
    if fault["type"] == "extra_forbidden":
        owner = cls
        for part in fault["loc"][:-1]:
            types = _types_in(owner.model_fields[part].annotation) if part in owner.model_fields else []
            owner = next((one for one in types if isinstance(one, type) and issubclass(one, BaseModel)), owner)
        return unknown_key(str(fault["loc"][-1]), owner.model_fields, key.rpartition(".")[0])
    if fault["type"] == "missing":
        return f"{key} is missing"
    if fault["type"] == "literal_error":
        choices = str(context["expected"]).replace(" or ", ", ")
        near = difflib.get_close_matches(found.strip("'"), [c.strip("'") for c in choices.split(", ")], n=1)
        return f"{key}: {found} is not one of {choices}" + (f", did you mean {near[0]!r}?" if near else "")
    if fault["type"] == "value_error":
        return f"{key}: {fault['msg'].removeprefix('Value error, ')}"
    if limit := next((f"{words} {context[kind]}" for kind, words in _LIMITS.items() if kind in context), ""):
        bare = found.strip("'")
        return f"{key} is {bare}, expected {limit}"
    expected = None if fault["type"].endswith("too_short") else _EXPECTED.get(fault["type"].split("_")[0])
    return f"{key}: expected {expected}, found {found}" if expected else f"{key}: {fault['msg']}, found {found}"


def _types_in(annotation: Any) -> list[Any]:
    """The types in an annotation, also inside ``X | None``, ``list[X]`` and ``dict[str, X]``."""
    inner = typing.get_args(annotation)
    return [found for part in inner for found in _types_in(part)] if inner else [annotation]
