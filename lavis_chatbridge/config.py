"""Settings: a mapping (YAML, command line) becomes a pydantic model, or one error that names every fault.

Sections of a configuration are subclasses of :class:`Settings`. An unknown key is a fault that names the nearest known
one; so are a missing key, a wrong type and whatever the model's own ``check()`` yields. YAML and ``--options`` are read
here for every command. This module knows no setting by name.
"""

from __future__ import annotations

import difflib
import os
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from lavis_chatbridge.errors import ConfigError

if typing.TYPE_CHECKING:
    from omegaconf import DictConfig

M = TypeVar("M", bound=BaseModel)

PROJECTS = Path(__file__).parent / "configs" / "projects"
"""The shipped configurations of runs; in a checkout a link to ``projects/chatbridge``."""

_LONGEST_KEY = 80

_short = reprlib.Repr()
_short.maxstring, _short.maxother, _short.maxlong = 80, 80, 40


class Settings(BaseModel):
    """Base of every section of a configuration.

    Fields are annotated as pydantic reads them. Build one from a user's values with :func:`parse`; the constructor is
    for code, which passes keywords that are known to be right.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _no_bool_as_number(cls, values: Any) -> Any:
        """``true`` is no number, although Python counts it as one."""
        if isinstance(values, Mapping):
            for name, value in values.items():
                field = cls.model_fields.get(str(name))
                if isinstance(value, bool) and field is not None and _is_number(field.annotation):
                    raise ValueError(f"{name}: expected a number, found {value}")
        return values

    @model_validator(mode="after")
    def _without_contradictions(self) -> Settings:
        if faults := list(self.check()):
            raise ValueError("; ".join(faults))
        return self

    def check(self) -> Iterable[str]:
        """Yield a sentence for each contradiction between fields."""
        return ()


def find_yaml(path: str | os.PathLike) -> Path:
    """A configuration file by its path, or a shipped one by its name: ``align``, ``vicuna7b/align``, ``eval/okvqa``.

    Raises:
        ConfigError: If there is neither.
    """
    if Path(path).is_file():
        return Path(path)
    name = str(path).removeprefix("projects/chatbridge/").removesuffix(".yaml")
    if (shipped := PROJECTS / f"{name}.yaml").is_file():
        return shipped
    known = sorted(str(file.relative_to(PROJECTS).with_suffix("")) for file in PROJECTS.rglob("*.yaml"))
    near = difflib.get_close_matches(name, known, n=1)
    raise ConfigError(f"no configuration file at {path}" + (f"; did you mean the shipped {near[0]!r}?" if near else ""))


def read_yaml(path: str | os.PathLike) -> DictConfig:
    """A YAML file that holds a mapping; ``${...}`` is resolved when a value is read.

    Args:
        path: Its path, or a shipped configuration's name (see `find_yaml`).

    Raises:
        ConfigError: If there is no such file, or it is no YAML mapping.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    file = find_yaml(path)
    try:
        loaded = OmegaConf.load(file)
    except (YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of sections, found a list")
    return loaded


def read_options(options: Sequence[str]) -> DictConfig:
    """``--options`` in either of LAVIS's two forms: ``KEY=VALUE ...``, or ``KEY VALUE KEY VALUE ...``.

    Raises:
        ConfigError: If a key has no value, or both forms are mixed.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    words = list(options)
    if words and "=" not in words[0]:
        if mixed := [key for key in words[::2] if "=" in key]:
            raise ConfigError(f"--options: {mixed[0]!r} stands among pairs KEY VALUE; write all as KEY=VALUE")
        if len(words) % 2:
            raise ConfigError(f"--options: {words[-1]!r} has no value; write KEY=VALUE")
        words = [f"{key}={value}" for key, value in zip(words[::2], words[1::2], strict=True)]
    if without := [word for word in words if "=" not in word]:
        raise ConfigError(f"--options: {without[0]!r} has no value; write KEY=VALUE")
    try:
        read = OmegaConf.from_dotlist(words)
        for key, _, text in (word.partition("=") for word in words):
            if key == "run.job_id" and isinstance(OmegaConf.select(read, key), (int, float)):
                OmegaConf.update(read, key, text)  # Slurm's 123_4 is the number 1234 in YAML
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"--options: {' '.join(str(error).split())}") from error
    return read


def merged(*configs: Any) -> DictConfig:
    """Mappings merged, later ones over earlier ones.

    Raises:
        ConfigError: If a list stands where another one has a mapping.
    """
    from omegaconf import DictConfig, OmegaConf

    try:
        result = OmegaConf.merge(*configs)
    except (TypeError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if not isinstance(result, DictConfig):
        raise ConfigError(f"expected mappings, found {shown(result)}")
    return result


def shown(value: Any) -> str:
    """A value as an error message shows it, shortened to one readable line."""
    return _short.repr(value)


def parse(cls: type[M], values: Any, where: str) -> M:
    """Build the settings ``cls`` from ``values``.

    Args:
        cls: A subclass of :class:`Settings`.
        values: The mapping to read; OmegaConf's is resolved first.
        where: The section's name, for messages (``"run"``, ``"model"``).

    Raises:
        ConfigError: With all faults at once.
    """
    if type(values).__module__.startswith("omegaconf"):
        from omegaconf import OmegaConf

        values = OmegaConf.to_container(values, resolve=True)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping, found {shown(values)}")
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("; ".join(_sentences(cls, error, where))) from error


def _sentences(cls: type[BaseModel], error: ValidationError, where: str) -> list[str]:
    """One sentence for each fault that pydantic found; of a union's branches, the first."""
    sentences: dict[str, str] = {}
    for fault in error.errors(include_url=False):
        place, owner = _place(cls, fault["loc"], where)
        key = place if fault["type"] != "value_error" else f"{place} {fault['msg']}"
        sentences.setdefault(key, _sentence(fault, place, owner))
    return list(sentences.values())


def _sentence(fault: Any, place: str, owner: type[BaseModel] | None) -> str:
    found, context = shown(fault["input"]), fault.get("ctx", {})
    if fault["type"] == "extra_forbidden":
        return unknown_key(str(fault["loc"][-1]), owner.model_fields if owner else (), place.rpartition(".")[0])
    if fault["type"] == "missing":
        return f"{place} is missing"
    if fault["type"] == "literal_error":
        choices = str(context["expected"]).replace(" or ", ", ")
        near = difflib.get_close_matches(found.strip("'"), [c.strip("'") for c in choices.split(", ")], n=1)
        return f"{place}: {found} is not one of {choices}" + (f", did you mean {near[0]!r}?" if near else "")
    if fault["type"] == "value_error":
        return f"{place}: {fault['msg'].removeprefix('Value error, ')}"
    limits = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    bare = found.strip("'")
    if limit := next((f"{words} {context[key]}" for key, words in limits.items() if key in context), ""):
        return f"{place} is {bare}, expected {limit}"
    kinds = {"int": "int", "float": "float", "bool": "bool", "string": "str", "list": "a list", "tuple": "a list"}
    kinds |= {"dict": "a mapping", "model": "a mapping", "model_attributes": "a mapping"}
    expected = kinds.get(fault["type"].rsplit("_", 1)[0]) or kinds.get(fault["type"].split("_", 1)[0])
    return f"{place}: expected {expected}, found {found}" if expected else f"{place}: {fault['msg']}, found {found}"


def _place(cls: type[BaseModel], loc: tuple, where: str) -> tuple[str, type[BaseModel] | None]:
    """A fault's dotted name without pydantic's union branches, and the model that the last key belongs to."""
    place, owner, annotation = where, typing.cast("type[BaseModel] | None", cls), None
    for part in loc:
        model = _model_in(annotation) if annotation is not None else cls
        if isinstance(part, int):
            place += f"[{part}]"
            continue
        if model is not None and part in model.model_fields:
            place, owner, annotation = f"{place}.{part}", model, model.model_fields[part].annotation
        elif not _names_a_branch(str(part), annotation):
            place, owner = f"{place}.{part}", model
    return place, owner


def _names_a_branch(part: str, annotation: Any) -> bool:
    """Whether ``part`` is pydantic's name for a branch of a union."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return False
    names = {getattr(branch, "__name__", str(branch)) for branch in typing.get_args(annotation)}
    return part in names or "[" in part


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The settings class in an annotation, also inside ``X | None``, ``list[X]`` and ``dict[str, X]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for part in typing.get_args(annotation) if (m := _model_in(part)) is not None), None)


def _is_number(annotation: Any) -> bool:
    branches = {getattr(branch, "__origin__", branch) for branch in typing.get_args(annotation) or (annotation,)}
    return bool({int, float} & branches) and bool not in branches


def unknown_key(key: str, known: Iterable[str], where: str) -> str:
    """The sentence for a key that ``where`` does not have, with the nearest one that it has."""
    near = difflib.get_close_matches(key[:_LONGEST_KEY], list(known), n=1)
    hint = f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
    return f"unknown key {where}.{key if key.isprintable() and len(key) <= _LONGEST_KEY else shown(key)}{hint}"
