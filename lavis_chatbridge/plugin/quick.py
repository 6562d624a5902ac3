"""Starts the commands that only answer (ask, chat, web, serve) in less time, by importing LAVIS lazily.

`start` puts LAVIS's packages, which import all of LAVIS, into ``sys.modules`` without executing them. They are executed
at the first use of one of their attributes, or of a name in LAVIS's registry that this package has not registered. The
modules in `USERS` get placeholders for the packages in `SLOW`. A program that does not call `start` is not affected.
"""

from __future__ import annotations

import builtins
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

PACKAGES = ("lavis", "lavis.datasets.builders", "lavis.models", "lavis.processors", "lavis.tasks")
"""LAVIS's packages that import all of its data sets, models, processors and tasks."""

BASES = {
    "BaseModel": "lavis.models.base_model",
    "BaseProcessor": "lavis.processors.base_processor",
    "BaseTask": "lavis.tasks.base_task",
}
"""Attributes of these packages that need one module only; LAVIS's registry reads them."""

SLOW = ("timm", "pandas", "iopath", "torchvision", "scipy")
"""Packages that `USERS` and transformers import for other tasks; torchvision imports torch's compiler."""

USERS = ("lavis.common.dist_utils", "lavis.common.utils", "lavis.models.eva_vit")

SAME = {
    "timm.models.layers.to_2tuple": "torch.nn.modules.utils._pair",
    "timm.models.layers.trunc_normal_": "torch.nn.init.trunc_normal_",
}
"""Functions that LAVIS's EVA-ViT calls when it is built, and equal ones of torch."""


def start() -> None:
    """Use the quick start in this process, unless LAVIS is imported already."""
    if "lavis" in sys.modules or importlib.util.find_spec("lavis") is None:
        return
    # lavis.models.med, which the quick start does not import, silences transformers' warnings.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in PACKAGES:
        _postpone(name)
    mapping = import_module("lavis.common.registry").registry.mapping
    mapping.update({key: _Table(table) for key, table in mapping.items() if key.endswith("name_mapping")})
    sys.meta_path.insert(0, _Finder())


def _postpone(name: str) -> None:
    """Let a package be imported, and execute it when one of its attributes is missing."""
    spec: Any = importlib.util.find_spec(name)
    module: Any = importlib.util.module_from_spec(spec)

    def complete(attribute: str) -> Any:
        if attribute in BASES:
            return getattr(import_module(BASES[attribute]), attribute)
        if attribute.startswith("__") and attribute != "__all__":
            raise AttributeError(attribute)
        if vars(module).pop("__getattr__", None) is not None:
            spec.loader.exec_module(module)
        return getattr(module, attribute)

    module.__getattr__ = complete
    sys.modules[name] = module
    parent, _, own = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], own, module)


class _Table(dict):
    """A table of LAVIS's registry that imports all of LAVIS when it is asked for an unknown name, or for all names."""

    def get(self, name: Any, default: Any = None) -> Any:
        if name not in self:
            _complete_lavis()
        return super().get(name, default)

    def keys(self) -> Any:
        _complete_lavis()
        return super().keys()


def _complete_lavis() -> None:
    getattr(sys.modules["lavis"], "default_cfg", None)


class _Finder:
    """Wraps the loaders of `USERS` and of transformers' modules, which the finders behind it find."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if name not in USERS and not name.startswith("transformers."):
            return None
        spec = next((s for f in sys.meta_path if f is not self and (s := f.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module
            loader.exec_module = lambda module: _without_slow(module, execute)
        return spec


def _without_slow(module: ModuleType, execute: Callable[[ModuleType], None]) -> None:
    """Execute a module whose own imports of `SLOW` packages give placeholders, or as usual if that fails."""

    def import_(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        package = name.partition(".")[0]
        if level or package not in SLOW or package in sys.modules:
            return builtins.__import__(name, globals, locals, fromlist, level)
        return _Later(name if fromlist else package)

    before = dict(vars(module))
    held = {**vars(builtins), "__import__": import_}
    vars(module)["__builtins__"] = held
    try:
        execute(module)
    except Exception:  # it needs the packages while it is imported
        vars(module).clear()
        vars(module).update(before)
        execute(module)
    held["__import__"] = builtins.__import__  # imports inside of functions are real


class _Later:
    """Stands for an object of a package that is not imported yet; a call or a check of a type imports it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Later(f"{self._path}.{name}")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return pkgutil.resolve_name(SAME.get(self._path, self._path))(*arguments, **named)

    def __instancecheck__(self, value: object) -> bool:
        # Nobody has made an instance of a class whose module is not imported.
        return self._path.rpartition(".")[0] in sys.modules and isinstance(value, pkgutil.resolve_name(self._path))

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__
