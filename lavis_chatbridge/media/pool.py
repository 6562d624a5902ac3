"""Opens media in processes with limited memory and time, for servers that receive files from users.

A decoder that crashes, hangs or uses too much memory fails only its own request. Memory is limited on Linux only.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

from lavis_chatbridge.errors import MediaError, MissingExtraError
from lavis_chatbridge.media.source import DEFAULT_LIMITS, Limits, is_file

_MEDIA_OF_A_PROCESS = 500  # processes are then replaced, which frees memory that decoders leak


class DecodingPool:
    """A pool of processes that decode media. Thread-safe.

    Args:
        workers: Number of processes, and of media decoded at once.
        memory: Maximum memory in bytes for decoding one medium.
        seconds: Time limit for decoding one medium; then the process is killed.

    Raises:
        MissingExtraError: If pebble is not installed.
    """

    def __init__(self, workers: int = 2, memory: int = 1 << 31, seconds: float = 60.0) -> None:
        try:
            from pebble import ProcessPool
        except ImportError as error:
            raise MissingExtraError("pebble", "serve", "opening media in limited processes") from error
        self._memory, self._seconds = memory, seconds
        self._lock, self._closed = threading.Lock(), False
        self._new = lambda: ProcessPool(
            workers,
            max_tasks=_MEDIA_OF_A_PROCESS,
            initializer=_limit_process,
            initargs=[memory],
            context=multiprocessing.get_context("spawn"),
        )
        self._pool = self._new()

    def __enter__(self) -> DecodingPool:
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes; unfinished calls fail."""
        with self._lock:
            self._closed = True
            self._pool.stop()
            self._pool.join()

    def __call__(
        self, function: Callable[..., Any], source: Any, *args: Any, limits: Limits = DEFAULT_LIMITS, **options: Any
    ) -> Any:
        """Call ``function(source, *args, limits=limits, **options)`` in one of the processes.

        Arguments and results are pickled. Arrays and Pillow images need no decoding and stay in this process.

        Raises:
            MediaError: If the function raises it, or its process dies, hangs or exceeds its memory limit.
        """
        if not is_file(source):
            return function(source, *args, limits=limits, **options)
        from pebble import ProcessExpired

        content = bytes(source) if isinstance(source, (bytearray, memoryview)) else source
        try:
            return self._run(function, [content, *args], {"limits": replace(limits, timeout=None), **options})
        except TimeoutError:
            raise MediaError(source, f"decoding took longer than {self._seconds:g} s") from None
        except (ProcessExpired, BrokenProcessPool) as error:
            raise MediaError(source, "its decoder crashed") from error
        except MediaError as error:
            if "MemoryError" not in error.cause:
                raise
            raise MediaError(source, f"decoding needs more than {self._memory >> 20} MiB of memory") from error

    def _run(self, function: Callable[..., Any], args: list[Any], options: dict[str, Any]) -> Any:
        """The function's result.

        A process that dies while it is idle, or as soon as it has taken a medium, breaks its pool. The pool is then
        replaced and the medium tried once more: it may be another one's process that died.
        """
        used = self._pool
        try:
            return used.schedule(function, args, options, timeout=self._seconds).result()
        except RuntimeError:
            with self._lock:
                if self._closed:
                    raise
                if self._pool is used:
                    used.stop()
                    self._pool = self._new()
            return self._pool.schedule(function, args, options, timeout=self._seconds).result()


def _limit_process(memory: int) -> None:
    """Limit this process to ``memory`` bytes of address space besides its libraries, and forbid writing files."""
    import resource

    import av  # noqa: F401  (libraries are loaded before the limit)

    from lavis_chatbridge.media import audio, container, video  # noqa: F401

    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    for limit, value in ((resource.RLIMIT_AS, used + memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
