"""The folder for what can be made again (indexes, converted annotations), and locks: one process makes a file, and what
a killed one left unfinished is told from what another is writing."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CACHE_VARIABLE = "CHATBRIDGE_CACHE"
_SECONDS_TO_HOLD = 2.0  # from the making of an empty file until it is held


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


@contextmanager
def held(temporary: Path) -> Iterator[None]:
    """Mark an unfinished file as this process's for as long as it lives: `remove_abandoned` then leaves it alone."""
    with open(temporary, "rb") as handle:
        with suppress(ImportError, OSError):  # Windows removes no open file; some network folders have no locks
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def remove_abandoned(temporary: Path) -> None:
    """Remove an unfinished file, unless a process holds it or is about to; where there are no locks it stays."""
    with suppress(ImportError, OSError):
        import fcntl

        with open(temporary, "rb") as handle:
            status = os.fstat(handle.fileno())
            if status.st_size == 0 and time.time() - status.st_mtime < _SECONDS_TO_HOLD:
                return
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink()
