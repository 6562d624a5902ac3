"""A journal: JSON lines that are on the disk before anybody relies on them.

It knows nothing of what the records mean. One process writes a journal at a time; a reader may look at any moment.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.files import sync

_logger = logging.getLogger(__name__)


class Journal:
    """An append-only file of JSON lines; a write returns once the record is synced to the disk.

    Records that are waiting while a sync is under way go to the disk together with the next one (group commit), so that
    many writers at a time cost few syncs.

    Args:
        path: The file; made with its folder if absent. A line that a kill left unfinished is closed, never cut off.
        patience: For how many seconds a write is tried again while the disk is full. What waits to be written was paid
            for, so it is held in memory rather than given up at once.

    Raises:
        DataError: If another process writes this journal.
    """

    def __init__(self, path: str | Path, patience: float = 3600.0) -> None:
        self.path = Path(path)
        self._patience = patience
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise DataError(f"{self.path} is being written by another process; wait for it, or stop it") from error
        self._close_torn_line()
        sync(self.path.parent)
        self._pending: list[bytes] = []
        self._accepted = 0
        self._synced = 0
        self._turn = asyncio.Lock()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record and sync it."""
        self._write([_line(record)])

    async def write(self, record: Mapping[str, Any]) -> None:
        """Write one record and wait until it is synced, together with others that wait."""
        self._pending.append(_line(record))
        self._accepted += 1
        mine = self._accepted
        async with self._turn:
            if self._synced >= mine:
                return  # an earlier turn took this record along
            batch, self._pending = self._pending, []
            target = self._accepted
            await asyncio.shield(asyncio.to_thread(self._write, batch))
            self._synced = target

    def close(self) -> None:
        """Give up the file and its lock."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, lines: list[bytes]) -> None:
        data = memoryview(b"".join(lines))
        give_up_at = time.monotonic() + self._patience
        while data:
            try:
                data = data[os.write(self._file, data) :]  # after a full disk it goes on at the very byte
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or time.monotonic() >= give_up_at:
                    raise DataError(f"cannot write {self.path}: {error.strerror}") from error
                _logger.error("%s: the disk is full; %d bytes wait until there is room", self.path, len(data))
                time.sleep(min(5.0, self._patience))
        os.fsync(self._file)

    def _close_torn_line(self) -> None:
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            self._write([b"\n"])


def read_journal(path: str | Path) -> Iterator[dict[str, Any]]:
    """The whole records of a journal, in order; an unfinished line is passed over. No file, no records."""
    path = Path(path)
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # torn by a kill: nobody was told that it had been written
            if isinstance(record, dict):
                yield record


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
