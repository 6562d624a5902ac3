"""What the plugin does around LAVIS's own imports; the finder in ``lavis_chatbridge/__init__.py`` asks it.

- ``lavis.models`` and some modules below it: patched to work with today's libraries (``compat``).
- ``lavis.tasks``, the last import of ``lavis``: the plugin's classes are registered after it, but not while a module of
  this package is half imported, so that a program may import any of them first.
- ``lavis.train`` and ``lavis.evaluate``: served from this folder, unless LAVIS ships them.

It imports the standard library only, and knows no class of the package.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

SERVED = ("lavis.train", "lavis.evaluate")
"""Modules that LAVIS's wheel lacks and that this folder provides under the same last name."""

_in_progress: list[str] = []
_to_register = [
    "lavis_chatbridge.processors",
    "lavis_chatbridge.models.chatbridge",
    "lavis_chatbridge.datasets.builders",
    "lavis_chatbridge.tasks.alignment",
    "lavis_chatbridge.tasks.choice",  # and generation
    "lavis_chatbridge.runners",
]
"""Modules whose import registers their classes; one that fails costs its own classes and a warning."""


def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    """The spec of a module that concerns the plugin, or ``None`` to leave it to the next finder."""
    around = _around(name)
    if around is None and name not in SERVED:
        return None
    others = (finder for finder in sys.meta_path if type(finder).__module__ != "lavis_chatbridge")
    specs = (finder.find_spec(name, path, target) for finder in others if hasattr(finder, "find_spec"))
    spec = next(filter(None, specs), None)
    if name in SERVED:
        return spec or _serve(name)
    if spec is not None and spec.loader is not None and around is not None:
        _wrap(spec, around)
    return spec


def catch_up() -> None:
    """Patch and register at once if LAVIS was imported before this package."""
    if "model_zoo" in vars(sys.modules.get("lavis.models", sys)):
        _compat().apply()
    _register_when_ready()


def _around(name: str) -> Callable[[str], AbstractContextManager[None]] | None:
    """The context in which a module is executed, if it needs one."""
    if name == "lavis.models":
        return _compat().loading_models
    if name == "lavis.common.dist_utils":  # imports timm
        return _compat().without_timms_warning
    if name == "lavis.tasks" or name.startswith("lavis_chatbridge."):
        return _before_registering
    if name.startswith("lavis.") and name in _compat().BASE_CLASSES:
        return _compat().loading_base_class
    return None


def _compat() -> ModuleType:
    from lavis_chatbridge.plugin import compat

    return compat


@contextmanager
def _before_registering(name: str) -> Iterator[None]:
    _in_progress.append(name)
    try:
        yield
    finally:
        _in_progress.remove(name)
    _register_when_ready()


def _register_when_ready() -> None:
    """Register the plugin's classes once LAVIS is complete and no module of this package is half imported."""
    # The last name that lavis.tasks defines: its module counts as initialising until after this has been called.
    if _in_progress or "setup_task" not in vars(sys.modules.get("lavis.tasks", sys)):
        return
    while _to_register:
        name = _to_register.pop(0)
        try:
            import_module(name)
        except Exception as fault:
            logging.getLogger("lavis_chatbridge").warning(
                "LAVIS does not know the classes of %s: %s: %s", name, type(fault).__name__, fault
            )


def _serve(name: str) -> ModuleSpec | None:
    """This folder's module as ``name``: the file itself, so that ``python -m`` and spawned children can run it."""
    own = importlib.util.find_spec(f"lavis_chatbridge.plugin.{name.rpartition('.')[2]}")
    return None if own is None or own.origin is None else importlib.util.spec_from_file_location(name, own.origin)


def _wrap(spec: ModuleSpec, around: Callable[[str], AbstractContextManager[None]]) -> None:
    loader: Any = spec.loader
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        with around(spec.name):
            execute(module)

    # On the instance: the loader keeps its type, on which inspect, pkgutil and importlib.resources rely.
    loader.exec_module = exec_module
