"""Files: atomic writes, JSON, JSONL, hashes of content, locks.

An atomic write creates a temporary file or folder beside its target, and then renames it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from lavis_chatbridge.errors import DataError, one_line

_log = logging.getLogger(__name__)


_UMASK = os.umask(0o077)
os.umask(_UMASK)
SHARED, PRIVATE = 0o666 & ~_UMASK, 0o600
"""File modes: the umask's (at import of this module), or owner only."""


@contextmanager
def atomic_file(target: Path, mode: int = SHARED) -> Iterator[Path]:
    """Yield the path of an empty temporary file, which replaces ``target`` if the block ends without an error.

    Creates the target's folder. The target does not change before the end of the block.
    """
    with _named_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            os.chmod(temporary, mode)  # mkstemp and safetensors create private files
            sync(temporary)
            os.replace(temporary, target)
            sync(target.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty temporary folder, which is renamed to ``target`` if the block ends without an error."""
    with _named_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
        try:
            yield temporary
            os.chmod(temporary, 0o777 & ~_UMASK)
            os.rename(temporary, target)
            sync(target.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def _named_errors(target: Path) -> Iterator[None]:
    """Add the target to errors of a write: a full disk's has no file name, and safetensors raises its own class."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, one_line(error), str(target)) from error
    except OSError as error:
        temporary = f".{target.name}." in str(error.filename)
        if error.errno is not None and (error.filename is None or temporary):
            error.filename = str(target)
        raise


def sync(path: Path) -> None:
    """Flush a file, or a folder's directory entries, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_text(target: Path, errors: str = "strict", mode: int = SHARED) -> Iterator[IO[str]]:
    """Like `atomic_file`, but yield the file, opened for UTF-8 text; ``errors`` as in ``str.encode``."""
    with atomic_file(target, mode) as temporary, open(temporary, "w", encoding="utf-8", errors=errors) as file:
        yield file


def write_text(path: Path, text: str, errors: str = "strict", mode: int = SHARED) -> None:
    """Write a text file atomically; arguments as in `atomic_text`."""
    with atomic_text(path, errors, mode) as file:
        file.write(text)


def write_json(path: Path, content: Any) -> None:
    """Write an indented JSON file atomically."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines to a file (created if necessary); first end an incomplete last line of an interrupted write."""
    with open(path, "a+b") as file:
        file.seek(max(0, file.tell() - 1))
        begin = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(begin + "".join(f"{line}\n" for line in lines).encode())


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if it does not exist or is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_lines(path: Path | str, errors: str = "strict") -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 text file with their numbers from 1; only ``\\n`` ends a line.

    Raises:
        DataError: If the file cannot be read, or a line is not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors)
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}:{number}: not UTF-8 at byte {error.start} of the line") from error
                yield number, text.rstrip("\r\n") if text.endswith("\n") else text
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_objects(path: Path | str, skip_cut: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``file:line`` and object for each line of a JSONL file; blank lines are skipped.

    Args:
        path: The file.
        skip_cut: Skip, with a warning, lines that are not JSON: an interruption can cut off a line of `append_lines`.

    Raises:
        DataError: If the file cannot be read, or a line is not a JSON object.
    """
    for number, line in read_lines(path, "replace" if skip_cut else "strict"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if skip_cut:
                _log.warning("%s:%d is cut off; it is skipped", path, number)
                continue
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: expected an object, found {type(record).__name__}")
        yield f"{path}:{number}", record


def hash_of(*parts: Any) -> str:
    """A SHA-256 (64 hex digits) of values as JSON; values of other types as ``str``."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def hash_of_file(path: Path | str) -> str:
    """The SHA-256 of a file's bytes (64 hex digits)."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


@contextmanager
def locked(target: Path, wait_seconds: float = -1) -> Iterator[None]:
    """Hold the lock of a file or folder (``.NAME.lock`` next to it); other processes wait.

    Raises:
        DataError: If another process still holds the lock after ``wait_seconds``; negative waits without limit.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{target.name}.lock")
    try:
        with FileLock(lock, timeout=wait_seconds):
            yield
    except Timeout as error:
        raise DataError(f"another process uses {target.parent} (it holds {lock}): wait for it, or stop it") from error
