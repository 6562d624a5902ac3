"""Changes three of LAVIS's imports. The finder in ``lavis_chatbridge/__init__.py`` calls `find_spec` at each import.

- ``lavis.models`` and the modules below it are imported with the repairs of ``compat`` for today's libraries.
- After ``lavis.tasks``, the last import of ``lavis``, the plugin's classes are registered. While a module of this
  package is half imported this waits, so that a program may import any of them first.
- ``lavis.train`` and ``lavis.evaluate`` are the package's command line, unless LAVIS has these modules.

It imports the standard library only, and names no class of the package.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

SERVED = ("lavis.train", "lavis.evaluate")
"""Modules that LAVIS's wheel does not have; ``cli.py`` runs as both."""

_in_progress: list[str] = []
_to_register = [
    "lavis_chatbridge.processors",
    "lavis_chatbridge.models.chatbridge",
    "lavis_chatbridge.datasets.builders",
    "lavis_chatbridge.tasks.choice",  # and the other tasks
    "lavis_chatbridge.runners",
]
"""Modules whose import registers their classes; if one fails, only its classes are missing, with a warning."""


def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    """The spec of a module that concerns the plugin, or None to leave it to the next finder."""
    from lavis_chatbridge.plugin import compat

    if name == "lavis.common.dist_utils":  # it imports timm by an old name, as other modules of LAVIS do
        warnings.filterwarnings("ignore", message="Importing from timm", category=FutureWarning)
    elif name.startswith("lavis.models."):
        compat.patch_transformers()
    elif name in SERVED:
        own = Path(__file__).parents[1] / "cli.py"  # a file, so that `python -m` and spawned children can run it
        return _next_spec(name, path, target) or importlib.util.spec_from_file_location(name, own)
    elif name == "lavis.models":
        return _wrapped(_next_spec(name, path, target), compat.loading_models)
    elif name == "lavis.tasks" or name.startswith("lavis_chatbridge."):
        return _wrapped(_next_spec(name, path, target), _before_registering)
    return None


def _next_spec(name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    """The spec that the other finders have."""
    others = (finder for finder in sys.meta_path if type(finder).__module__ != "lavis_chatbridge")
    specs = (finder.find_spec(name, path, target) for finder in others if hasattr(finder, "find_spec"))
    return next(filter(None, specs), None)


def _wrapped(spec: ModuleSpec | None, around: Callable[[str], AbstractContextManager[None]]) -> ModuleSpec | None:
    """The spec, whose module is executed inside the context ``around(name)``."""
    if spec is None or spec.loader is None:
        return spec
    loader: Any = spec.loader
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        with around(spec.name):
            execute(module)

    # On the instance: the loader keeps its type, on which inspect, pkgutil and importlib.resources rely.
    loader.exec_module = exec_module
    return spec


@contextmanager
def _before_registering(name: str) -> Iterator[None]:
    """Register the plugin's classes once LAVIS is complete and no module of this package is half imported."""
    _in_progress.append(name)
    try:
        yield
    finally:
        _in_progress.remove(name)
    # The last name that lavis.tasks defines: its module counts as initialising until after this has been called.
    if not _to_register or _in_progress or "setup_task" not in vars(sys.modules.get("lavis.tasks", sys)):
        return
    while _to_register:
        name = _to_register.pop(0)
        try:
            import_module(name)
        except Exception as fault:
            logging.getLogger("lavis_chatbridge").warning(
                "LAVIS does not know the classes of %s: %s: %s", name, type(fault).__name__, fault
            )
    if (zoo := vars(sys.modules["lavis.models"]).get("model_zoo")) is not None:
        zoo.__init__()  # it lists the models that were registered when it was made
