"""A JSONL file as a sequence of samples: offsets are in memory, the text stays on disk.

Opening a file checks every line once. The index (offset, modality and length of each sample) of a large file is cached
on disk until the file changes.
"""

from __future__ import annotations

import mmap
import os
from array import array
from codecs import BOM_UTF8
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.files import atomic_file, hash_of
from lavis_chatbridge.schema import SCHEMA_VERSION, Medium, Sample, check_inside, folder_of, parse_line

CACHE_VARIABLE = "CHATBRIDGE_CACHE"
CHARACTERS_PER_TOKEN = 4
TOKENS_PER_MEDIUM = 32
_CACHED_FROM = 1 << 20  # bytes; a smaller file is indexed faster than a stored index is loaded


def cache_folder() -> Path:
    """``$CHATBRIDGE_CACHE``, or by default ``lavis-chatbridge`` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lavis-chatbridge")
    return Path(os.environ.get(CACHE_VARIABLE) or default).expanduser()


class SampleFile(Sequence[Sample]):
    """The samples of one JSONL file, parsed on access; opening it raises a `DataError` for the first faulty line.

    Args:
        path: The file.
        root: The folder that media paths are relative to; by default the file's own.
        allow_outside: Accept media outside the root.
        cache: Folder for the index of a large file; None does not store it.
        limit: Use only this number of samples.

    Attributes:
        modalities: The modalities that occur, ``"image"``, ``"video+audio"``, ``"text"`` ...
        modality: ``[n]`` uint8, each sample's index in ``modalities``.
        lengths: ``[n]`` uint32, approximate number of tokens of each sample, with 32 per medium.
    """

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        allow_outside: bool = False,
        cache: str | Path | None = None,
        limit: int | None = None,
    ) -> None:
        self.path = str(path)
        self.root = folder_of(path, root)
        self.allow_outside = allow_outside
        self._map: mmap.mmap | None = None
        index = self._index(cache)
        self._starts, self._lines = index["starts"][:limit], index["lines"][:limit]
        self.modality, self.lengths = index["modality"][:limit], index["lengths"][:limit]
        self.modalities = [str(name) for name in index["modalities"]]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = int(self._starts[index])
        end = self._map.find(b"\n", start)
        line = self._map[start : end if end >= 0 else len(self._map)]
        return parse_line(line, f"{self.path}:{self._lines[index]}", self.root, self.allow_outside)

    def check_inside(self, medium: Medium) -> None:
        """Raise a `DataError` if a symbolic link in a medium's path leads outside the root."""
        if not self.allow_outside:
            check_inside(medium.path, self.root)

    def __getstate__(self) -> dict:
        """Omit the memory map: every process opens its own."""
        return self.__dict__ | {"_map": None}

    def _index(self, cache: str | Path | None) -> dict[str, np.ndarray]:
        """The arrays of the index, from the cache if possible."""
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error
        if cache is None or status.st_size < _CACHED_FROM:
            return _scan(self.path, self.root, self.allow_outside)
        file_state = (os.path.abspath(self.path), status.st_size, status.st_mtime_ns)
        stored = Path(cache, "indexes", f"{hash_of(SCHEMA_VERSION, *file_state, self.allow_outside)[:24]}.npz")
        if not stored.exists():
            index = _scan(self.path, self.root, self.allow_outside)
            with atomic_file(stored) as temporary, open(temporary, "wb") as file:
                np.savez(file, **index)  # type: ignore[arg-type]
        with np.load(stored) as arrays:
            return dict(arrays)


def about_tokens(sample: Sample) -> int:
    """Approximate number of tokens of a sample, to group samples of similar length."""
    text = sum(len(turn.text) for turn in sample.turns) or max(map(len, sample.captions), default=0)
    text += sum(max(map(len, medium.words)) for medium in sample.media if medium.words)
    return text // CHARACTERS_PER_TOKEN + TOKENS_PER_MEDIUM * len(sample.files) + 1


def _scan(path: str, root: str, allow_outside: bool) -> dict[str, np.ndarray]:
    index = {"starts": array("Q"), "lines": array("I"), "modality": array("B"), "lengths": array("I")}
    modalities: dict[str, int] = {}
    with open(path, "rb") as file:
        position = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0  # as `read_lines`
        file.seek(position)
        for number, line in enumerate(file, start=1):
            if line.strip():
                sample = parse_line(line, f"{path}:{number}", root, allow_outside)
                modality = modalities.setdefault(sample.modality, len(modalities))
                values = (position, number, modality, about_tokens(sample))
                for column, value in zip(index.values(), values, strict=True):
                    column.append(value)
            position += len(line)
    if not modalities:
        raise DataError(f"{path}: contains no sample")
    return {name: np.array(column) for name, column in index.items()} | {"modalities": np.array(list(modalities))}
