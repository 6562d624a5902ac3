"""A folder for the files of one request, which is gone once the request is over and nobody writes into it any more.

A request may end (its time is up, its client has left) while a thread still writes its media. Whoever removed the
folder then would see the thread put files into what is being removed; so the last one to leave removes it, and the
thread learns at its next block that nobody waits.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

log = logging.getLogger(__name__)


class FolderClosedError(Exception):
    """The request is over; what is written now is wanted by nobody."""


class RequestFolder:
    """A new, empty folder.

    Args:
        parent: Where it is made.
    """

    def __init__(self, parent: Path) -> None:
        self.path = Path(tempfile.mkdtemp(dir=parent))
        self._lock = threading.Lock()
        self._writers = 0
        self._closed = False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep the folder while files are written.

        Raises:
            FolderClosedError: If the request is over already.
        """
        with self._lock:
            self.check()
            self._writers += 1
        try:
            yield
        finally:
            with self._lock:
                self._writers -= 1
                last = self._closed and self._writers == 0
            if last:
                self._remove()

    def check(self) -> None:
        """Raises FolderClosedError: If the request is over."""
        if self._closed:
            raise FolderClosedError

    def create(self, name: str) -> RequestFile:
        """A new file in it, for who is `writing`."""
        return RequestFile(self, open(self.path / name, "xb"))

    def close(self) -> None:
        """The request is over: remove the folder now, or when its last writer leaves. May be called twice."""
        with self._lock:
            now = not self._closed and self._writers == 0
            self._closed = True
        if now:
            self._remove()

    def _remove(self) -> None:
        try:
            shutil.rmtree(self.path)
        except OSError:
            log.exception("the files of a request could not be removed")


class RequestFile:
    """A file that takes nothing any more once its request is over."""

    def __init__(self, folder: RequestFolder, file: BinaryIO) -> None:
        self._folder, self._file = folder, file

    def write(self, block: bytes) -> None:
        """Add to it.

        Raises:
            FolderClosedError: If the request is over.
        """
        self._folder.check()
        self._file.write(block)

    def __enter__(self) -> RequestFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
