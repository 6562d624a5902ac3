"""SIGTERM and the clock as requests for a checkpoint, which the training loop fulfils at the end of a step."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

_log = logging.getLogger(__name__)

STOPPED_BY_SIGTERM = 128 + signal.SIGTERM


class Watch:
    """Notes SIGTERM (Slurm's end of time, a spot machine's notice) and the time since the last save, while entered.

    Args:
        minutes: A checkpoint is requested at this interval; None never.

    Attributes:
        stop: Whether SIGTERM was received.
    """

    def __init__(self, minutes: float | None) -> None:
        self.stop = False
        self._seconds = float("inf") if minutes is None else 60.0 * minutes
        self._saved = time.monotonic()

    def __enter__(self) -> Watch:
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        else:
            _log.warning("training outside the main thread: SIGTERM does not save a checkpoint")
        return self

    def __exit__(self, *_fault: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def due(self) -> bool:
        """Whether the clock requests a checkpoint."""
        return time.monotonic() - self._saved >= self._seconds

    def saved(self) -> None:
        """A checkpoint has been written."""
        self._saved = time.monotonic()

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.stop = True
