"""SIGTERM, SIGUSR1 and the clock as requests, which the training loop fulfils at the end of a step on all processes.

SIGTERM (Slurm's end of time, a spot machine's notice) saves a checkpoint and stops; SIGUSR1 saves and continues.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

_log = logging.getLogger(__name__)

STOPPED_BY_SIGTERM = 128 + 15


class Watch:
    """Notes signals and the time since the last save, while it is entered.

    Args:
        minutes: A checkpoint is requested at this interval; None never.

    Attributes:
        in_loop: Whether steps are taken, so that SIGTERM waits for the end of one; else it ends the process at once.
        stop: Whether SIGTERM was received.
    """

    def __init__(self, minutes: float | None) -> None:
        self.in_loop = self.stop = self._noted = False
        self._seconds = None if minutes is None else 60.0 * minutes
        self._last = time.monotonic()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Watch:
        if threading.current_thread() is not threading.main_thread():
            _log.warning("training outside the main thread: SIGTERM and SIGUSR1 do not save a checkpoint")
            return self
        for number in (signal.SIGTERM, getattr(signal, "SIGUSR1", None)):  # Windows has no SIGUSR1
            if number is not None:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_fault: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def save(self) -> bool:
        """Whether a signal or the clock requests a checkpoint now."""
        return self._noted or (self._seconds is not None and time.monotonic() - self._last >= self._seconds)

    def saved(self) -> None:
        """A checkpoint has been written."""
        self._last = time.monotonic()
        self._noted = False

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGTERM and not self.in_loop:
            raise SystemExit(STOPPED_BY_SIGTERM)
        self._noted = True
        self.stop = self.stop or number == signal.SIGTERM
