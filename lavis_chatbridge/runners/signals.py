"""Signals and the clock as wishes: a cluster that takes the machine away asks for a checkpoint first.

SIGTERM (Slurm's end of time, a spot machine's notice, Ctrl-C's polite sister) saves and stops; SIGUSR1 saves and
goes on. A handler only notes the wish: the training loop grants it at the end of a step, on all processes together.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lavis_chatbridge.runners.step import Wishes

_log = logging.getLogger(__name__)


class Watch:
    """Notes signals and the time between saves, while it is entered.

    Args:
        minutes: A checkpoint is wished for this often; None never.
    """

    def __init__(self, minutes: float | None) -> None:
        self.seconds = None if minutes is None else 60.0 * minutes
        self.last = time.monotonic()
        self._asked = Wishes()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Watch:
        if threading.current_thread() is not threading.main_thread():
            _log.warning("training outside the main thread: SIGTERM and SIGUSR1 do not save a checkpoint")
            return self
        for number in (signal.SIGTERM, getattr(signal, "SIGUSR1", None)):
            if number is not None:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_fault: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wishes(self) -> Wishes:
        """What signals and the clock ask for now."""
        due = self.seconds is not None and time.monotonic() - self.last >= self.seconds
        return Wishes(save=self._asked.save or due, stop=self._asked.stop)

    def saved(self) -> None:
        """A checkpoint has been written: the wish for one is granted."""
        self.last = time.monotonic()
        self._asked.save = False

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._asked.save = True
        self._asked.stop = self._asked.stop or number == signal.SIGTERM


@contextmanager
def user_signal_outlived() -> Iterator[None]:
    """SIGUSR1 ends nothing where there is nothing to save: before the first step, and in the evaluation at the end."""
    number = getattr(signal, "SIGUSR1", None)
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, lambda *_: _log.info("SIGUSR1: there is nothing to save now"))
    try:
        yield
    finally:
        signal.signal(number, before)
