"""A quick start for the commands that only answer: they need few of LAVIS's modules, and LAVIS imports all of them.

`start` puts LAVIS's packages into ``sys.modules`` without executing them. They are executed when somebody reads one of
their attributes, or asks LAVIS's registry for a name that this package has not registered. Nothing changes for a
program that does not call `start`.
"""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

PACKAGES = ("lavis", "lavis.datasets.builders", "lavis.models", "lavis.processors", "lavis.tasks")
"""LAVIS's packages that import all of its data sets, models, processors and tasks."""

BASES = {
    "BaseModel": "lavis.models.base_model",
    "BaseProcessor": "lavis.processors.base_processor",
    "BaseTask": "lavis.tasks.base_task",
}
"""Attributes of these packages that need one module only; LAVIS's registry reads them."""

USERS = ("lavis.common.dist_utils", "lavis.common.utils", "lavis.models.eva_vit")
"""Modules that import `SLOW` packages and call them for other tasks than answering."""

SLOW = (
    *("timm", "timm.models", "timm.models.hub", "timm.models.layers", "timm.models.registry", "pandas", "iopath"),
    *("iopath.common", "iopath.common.download", "iopath.common.file_io"),
    *("torchvision", "torchvision.datasets", "torchvision.datasets.utils"),
)

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
    for name in (*PACKAGES, *USERS):
        _postpone(name)
    mapping = import_module("lavis.common.registry").registry.mapping
    mapping.update({key: _Table(table) for key, table in mapping.items() if key.endswith("name_mapping")})


def _postpone(name: str) -> None:
    """Let a module be imported, and execute it when one of its attributes is missing."""
    spec: Any = importlib.util.find_spec(name)
    module: Any = importlib.util.module_from_spec(spec)

    def complete(attribute: str) -> Any:
        if attribute in BASES:
            return getattr(import_module(BASES[attribute]), attribute)
        if attribute.startswith("__") and attribute != "__all__":
            raise AttributeError(attribute)
        if vars(module).pop("__getattr__", None) is not None:
            import_module("torch")  # which looks for pandas, and must not find its stand-in
            with _stand_ins(SLOW if name in USERS else ()):
                spec.loader.exec_module(module)
        return getattr(module, attribute)

    module.__getattr__ = complete
    sys.modules[name] = module
    parent, _, own = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], own, module)


@contextmanager
def _stand_ins(names: tuple[str, ...]) -> Iterator[None]:
    """Let modules import packages that are not imported yet, without executing them."""
    added = {name: _Later(name) for name in names if name.partition(".")[0] not in sys.modules}
    sys.modules.update(added)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


class _Later:
    """An object of a package that is not imported yet; a call imports it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Later(f"{self._path}.{name}")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return pkgutil.resolve_name(SAME.get(self._path, self._path))(*arguments, **named)


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
