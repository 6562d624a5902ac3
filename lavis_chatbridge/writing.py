"""Files that appear whole or not at all: written under a temporary name beside their place, then renamed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def _left_by_umask(mode: int) -> int:
    taken = os.umask(0o077)
    os.umask(taken)
    return mode & ~taken


SHARED, PRIVATE = _left_by_umask(0o666), 0o600
"""Who may use a file: whom the umask lets (as it was when this module was imported), or its owner alone."""


@contextmanager
def whole_file(target: Path, mode: int = SHARED) -> Iterator[Path]:
    """The path of an empty temporary file, which takes the target's name when the block ends without a fault.

    Args:
        target: The file; its folder is made where missing. Until the end it is as it was.
        mode: Who may read it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        publish(temporary, target, mode)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def share(path: Path) -> None:
    """Let others use a file as the umask has it; safetensors keeps those that it writes to their owner."""
    os.chmod(path, SHARED)


def publish(temporary: Path, target: Path, mode: int = SHARED) -> None:
    """Give a finished temporary file of the same folder its name, after its bytes have reached the disk."""
    sync(temporary)
    os.chmod(temporary, mode)  # mkstemp keeps files private
    os.replace(temporary, target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Have the operating system put a file, or a folder's list of names, on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_text(target: Path, errors: str = "strict", mode: int = SHARED) -> Iterator[IO[str]]:
    """A text file in UTF-8, open for writing, which takes the target's name when the block ends without a fault.

    Args:
        target: The file; its folder is made where missing.
        errors: What becomes of halves of characters, as ``str.encode`` has it.
        mode: Who may read it.
    """
    with whole_file(target, mode) as temporary, open(temporary, "w", encoding="utf-8", errors=errors) as file:
        yield file


def write_text(path: Path, text: str, errors: str = "strict", mode: int = SHARED) -> None:
    """Write a text file as a whole; arguments as those of `whole_text`."""
    with whole_text(path, errors, mode) as file:
        file.write(text)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, indented, as a whole; its folder is made where missing."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines to a file, made if absent; half a line that an interruption left at its end stays apart."""
    with open(path, "a+b") as file:
        file.seek(max(0, file.tell() - 1))
        begin = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(begin + "".join(f"{line}\n" for line in lines).encode())


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is none, or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
