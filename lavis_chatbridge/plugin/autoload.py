"""The door into LAVIS: what must happen around LAVIS's own imports, arranged by one finder on ``sys.meta_path``.

torch calls :func:`activate` at the end of ``import torch`` (entry point ``torch.backends``), and LAVIS imports torch;
importing ``lavis_chatbridge`` calls it too. The module therefore imports the standard library only, does almost nothing
until LAVIS is imported, and never raises. It knows no class of the package: ``register`` does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

SERVED = ("lavis.train", "lavis.evaluate")
"""Modules that LAVIS's wheel lacks and that ``lavis_chatbridge.plugin`` provides under the same last name."""


def activate() -> None:
    """Put the door in place, once; if LAVIS is loaded already, do at once what it would have done.

    Never raises: an exception here would break ``import torch`` for the whole environment.
    """
    try:
        if not any(isinstance(finder, Door) for finder in sys.meta_path):
            sys.meta_path.insert(0, Door())
        if hasattr(sys.modules.get("lavis.models"), "model_zoo"):
            from lavis_chatbridge.plugin import compat

            compat.apply()
        _register_when_ready()
    except Exception as fault:
        _warn("lavis-chatbridge is not active", fault)


class Door:
    """A finder that leaves finding to the others, and wraps the execution of the modules that concern the plugin.

    - ``lavis.models``: LAVIS's code is made to work with today's libraries around it (``compat``).
    - ``lavis.tasks``, the last import of ``lavis``: the plugin's classes are registered after it.
    - modules of this package: registration waits until none of them is half imported, so that a program may
      import any of them first.
    - ``lavis.train`` and ``lavis.evaluate``: served from the plugin, unless LAVIS ships them.
    """

    def __init__(self) -> None:
        self.in_progress: list[str] = []

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        """The spec of a module that concerns the plugin, or ``None`` to leave it to the next finder."""
        if not name.startswith("lavis"):
            return None
        around: Callable[[str], AbstractContextManager[None]]
        if name == "lavis.models":
            around = _around_models
        elif name == "lavis.tasks" or name.startswith("lavis_chatbridge."):
            around = self._around_own
        elif name not in SERVED:
            return None
        spec = _find(name, path, target)
        if name in SERVED:
            return spec or _serve(name)
        if spec is not None and spec.loader is not None:
            _wrap(spec, around)
        return spec

    @contextmanager
    def _around_own(self, name: str) -> Any:
        self.in_progress.append(name)
        try:
            yield
        finally:
            self.in_progress.remove(name)
        _register_when_ready()


@contextmanager
def _around_models(name: str) -> Any:
    from lavis_chatbridge.plugin import compat

    with compat.loading_models():
        yield


def _register_when_ready() -> None:
    """Register the plugin's classes once LAVIS is complete and no module of this package is half imported."""
    door = next(finder for finder in sys.meta_path if isinstance(finder, Door))
    # The last name that lavis.tasks defines: its module counts as initialising until after the door has been told.
    if door.in_progress or not hasattr(sys.modules.get("lavis.tasks"), "setup_task"):
        return
    from lavis_chatbridge.plugin import register

    register.register_all()


def _find(name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        find_spec = None if isinstance(finder, Door) else getattr(finder, "find_spec", None)
        spec = find_spec(name, path, target) if find_spec else None
        if spec is not None:
            return spec
    return None


def _serve(name: str) -> ModuleSpec | None:
    """The plugin's module as ``name``: the file itself, so that ``python -m`` and spawned children can run it."""
    from importlib.util import find_spec, spec_from_file_location

    own = find_spec(f"lavis_chatbridge.plugin.{name.rpartition('.')[2]}")
    return None if own is None or own.origin is None else spec_from_file_location(name, own.origin)


def _wrap(spec: ModuleSpec, around: Callable[[str], AbstractContextManager[None]]) -> None:
    loader: Any = spec.loader
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        with around(spec.name):
            execute(module)

    # On the instance: the loader keeps its type, on which inspect, pkgutil and importlib.resources rely.
    loader.exec_module = exec_module


def _warn(what: str, fault: Exception) -> None:
    import logging

    logging.getLogger("lavis_chatbridge").warning("%s: %s: %s", what, type(fault).__name__, fault)
