"""Registers the package's classes with LAVIS, by importing the modules that define them.

A module that cannot be imported costs its own classes and a warning, never ``import lavis``.
"""

from __future__ import annotations

import logging
from importlib import import_module

MODULES = (
    "lavis_chatbridge.processors",
    "lavis_chatbridge.models.chatbridge",
    "lavis_chatbridge.datasets.builders",
    "lavis_chatbridge.tasks.alignment",
    "lavis_chatbridge.tasks.choice",  # and generation
    "lavis_chatbridge.runners",
)

_state = {"begun": False}


def register_all() -> None:
    """Import every module of :data:`MODULES`, once in a process."""
    if _state["begun"]:
        return
    _state["begun"] = True
    for name in MODULES:
        try:
            import_module(name)
        except Exception as fault:
            logging.getLogger("lavis_chatbridge").warning(
                "LAVIS does not know the classes of %s: %s: %s", name, type(fault).__name__, fault
            )
