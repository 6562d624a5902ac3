"""The folder for what can be made again (indexes, converted annotations), and a lock so that one process makes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE_VARIABLE = "CHATBRIDGE_CACHE"


def cache_folder() -> Path:
    """``$CHATBRIDGE_CACHE``, else ``lavis-chatbridge`` in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lavis-chatbridge"


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold a lock beside ``target``: of all processes of a machine, one makes a file and the others wait for it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f".{target.name}.lock"), "w", encoding="utf-8") as handle:
        try:
            import fcntl
        except ImportError:  # no such locks on Windows: each process makes its own copy, the last one stays
            yield
            return
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)
