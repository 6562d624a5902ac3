"""A quick start for the commands that only answer: what libraries import early and use seldom is imported when used.

`start` puts a finder at the front of ``sys.meta_path``. Of the modules in `LATER` it replaces the named imports by
proxies, which import on their first use. LAVIS's packages run their own code when somebody reads one of their
attributes, or looks a name up in LAVIS's registry that this package has not registered. Nothing changes for a program
that does not call `start`.
"""

from __future__ import annotations

import builtins
import functools
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import resolve_name
from types import ModuleType, SimpleNamespace
from typing import Any

LATER: dict[str, tuple[str, ...]] = {
    "lavis.common.dist_utils": ("timm",),
    "lavis.common.utils": ("pandas", "torchvision", "iopath"),
    "lavis.models.eva_vit": ("timm",),
    "transformers": (
        *("scipy", "torchvision", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"),
        *("torch.distributed.tensor", "torch.nn.attention.flex_attention", "transformers.distributed.tensor_parallel"),
        *(
            "transformers.distributed.expert_parallel",
            "transformers.integrations.deepgemm",
            "torch.distributed._composable",
        ),
    ),
    "transformers.loss.loss_utils": ("transformers.loss",),
}
"""Module, or package with all of its modules -> the imports that it needs for other tasks than answering."""

SAME = {
    "timm.models.layers.to_2tuple": "torch.nn.modules.utils._pair",
    "timm.models.layers.trunc_normal_": "torch.nn.init.trunc_normal_",
}
"""Functions that LAVIS's EVA-ViT calls when it is built, and equal ones of torch."""

PACKAGES = ("lavis", "lavis.datasets.builders", "lavis.models", "lavis.processors", "lavis.tasks")
"""LAVIS's packages that import all of its data sets, models, processors and tasks."""

BASES = {
    "BaseModel": "lavis.models.base_model",
    "BaseProcessor": "lavis.processors.base_processor",
    "BaseTask": "lavis.tasks.base_task",
}
"""Attributes of these packages that need no more than one module; LAVIS's registry reads them."""


def start() -> None:
    """Use the quick start in this process, unless torch is imported already."""
    if "torch" not in sys.modules:
        # lavis.models.med, which the quick start does not import, silences transformers' warnings.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        sys.meta_path.insert(0, _Finder())


class Proxy:
    """An object of a module that is not imported yet, at a dotted path; a call or a use as a class imports it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Proxy(f"{self._path}.{name}")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return pkgutil.resolve_name(SAME.get(self._path, self._path))(*arguments, **named)

    def __instancecheck__(self, value: object) -> bool:
        # Where the module is not imported, nobody has made an instance of its classes.
        return self._path.rpartition(".")[0] in sys.modules and isinstance(value, pkgutil.resolve_name(self._path))

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__


class _Finder:
    """Wraps the loaders of the modules above, which the finders behind it find."""

    def __init__(self) -> None:
        self._asking: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if name == "torch._dynamo":
            _let_compile()
        around = _AROUND.get(name)
        if around is None and (name in LATER or name.startswith("transformers.")):
            around = _without
        if around is None or name in self._asking:
            return None
        self._asking.add(name)  # a finder behind this one may ask all finders
        try:
            spec = next((s for f in sys.meta_path if f is not self and (s := f.find_spec(name, path, target))), None)
        finally:
            self._asking.remove(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module
            loader.exec_module = lambda module: around(module, execute)
        return spec


def _without(module: ModuleType, execute: Callable[[ModuleType], None]) -> None:
    """Execute a module with proxies for some of its imports; as usual if it does more with them than that."""
    packages = LATER[module.__name__ if module.__name__ in LATER else module.__name__.partition(".")[0]]

    def import_(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        full = resolve_name("." * level + name, module.__package__)
        if any(full == package or full.startswith(f"{package}.") for package in packages):
            return Proxy(full if fromlist else full.partition(".")[0])
        return builtins.__import__(name, globals, locals, fromlist, level)

    before = dict(vars(module))
    held = {**vars(builtins), "__import__": import_}
    vars(module)["__builtins__"] = held
    try:
        with _nothing_compiled():
            execute(module)
    except Exception:  # the module needs the real packages while it is imported: import it again with them
        vars(module).clear()
        vars(module).update(before)
        execute(module)
    held["__import__"] = builtins.__import__  # imports inside of functions are real


def _without_compiler(module: ModuleType, execute: Callable[[ModuleType], None]) -> None:
    """Functions that torch hides from its compiler call themselves directly while the compiler is not imported."""
    execute(module)
    original = module._disable_dynamo

    def disable(function: Any = None, recursive: bool = True) -> Any:
        if function is None:
            return lambda inner: disable(inner, recursive)
        hidden = original(function, recursive)

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            chosen = hidden if "torch._dynamo" in sys.modules else function
            return chosen(*arguments, **named)

        return call

    module._disable_dynamo = disable  # type: ignore[attr-defined]


def _with_plain_checks(module: ModuleType, execute: Callable[[ModuleType], None]) -> None:
    """A check of a plain bool does not need torch's symbolic shapes, which import sympy."""
    execute(module)
    original = module._check_with

    def check(error_type: Any, condition: Any, message: Any) -> None:
        if condition is not True:
            original(error_type, condition, message)

    module._check_with = check  # type: ignore[attr-defined]


def _without_sharding(module: ModuleType, execute: Callable[[ModuleType], None]) -> None:
    """No tensor is sharded as long as nobody has imported the classes of sharded tensors."""
    execute(module)
    if original := getattr(module, "is_dtensor", None):
        module.is_dtensor = lambda value: "torch.distributed.tensor" in sys.modules and original(value)  # type: ignore[attr-defined]


MARKS = ("allow_in_graph", "assume_constant_result", "disable")


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Without torch's compiler, which `MARKS` import only to mark a function for it."""
    torch: Any = import_module("torch")

    def mark(function: Any = None, *_: Any, **__: Any) -> Any:
        return function or (lambda inner: inner)

    original = {name: getattr(torch.compiler, name) for name in MARKS}
    vars(torch.compiler).update(dict.fromkeys(MARKS, mark))
    outermost = "_dynamo" not in vars(torch)
    if outermost:
        torch._dynamo = _Marks(**dict.fromkeys(MARKS, mark))
    try:
        yield
    finally:
        vars(torch.compiler).update(original)
        if outermost:
            _let_compile()


class _Marks(SimpleNamespace):
    """Stands for ``torch._dynamo`` until somebody imports it."""


def _let_compile() -> None:
    torch: Any = sys.modules["torch"]
    if isinstance(vars(torch).get("_dynamo"), _Marks):
        del torch._dynamo


def _postponed(module: ModuleType, execute: Callable[[ModuleType], None]) -> None:
    """Let a package be imported, and execute it when one of its attributes is missing."""

    def complete(name: str) -> Any:
        if name in BASES:
            return getattr(import_module(BASES[name]), name)
        if "__getattr__" in vars(module):
            del module.__getattr__  # type: ignore[attr-defined]
            execute(module)
        return getattr(module, name)

    module.__getattr__ = complete  # type: ignore[method-assign]


class _Table(dict):
    """A table of LAVIS's registry that imports all of LAVIS when it is asked for an unknown name, or for all names."""

    def get(self, name: Any, default: Any = None) -> Any:
        if name not in self:
            _complete_lavis()
        return super().get(name, default)

    def __missing__(self, name: Any) -> Any:
        _complete_lavis()
        return dict(self)[name]

    def keys(self) -> Any:
        _complete_lavis()
        return super().keys()


def _complete_lavis() -> None:
    getattr(sys.modules["lavis"], "default_cfg", None)


def _with_filled_tables(module: ModuleType, execute: Callable[[ModuleType], None]) -> None:
    execute(module)
    mapping = module.registry.mapping
    mapping.update({key: _Table(table) for key, table in mapping.items() if key.endswith("name_mapping")})


_AROUND: dict[str, Callable[[ModuleType, Callable[[ModuleType], None]], None]] = {
    **dict.fromkeys(PACKAGES, _postponed),
    "lavis.common.registry": _with_filled_tables,
    "torch._compile": _without_compiler,
    "torch": _with_plain_checks,
    "transformers.distributed.utils": _without_sharding,
}
