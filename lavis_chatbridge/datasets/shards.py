"""The shard format: uncompressed tar files in webdataset's layout, each with an index of its content.

`write` stores samples with their media, and a JSONL with the offset and size of each medium, which training reads like
any other JSONL. The feature store and converted tables use the same tar files. A shard is valid only with its index.
The JSONL is written last, and removed before a shard is rewritten. This module decodes no media.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from lavis_chatbridge.datasets.dataset import media_content
from lavis_chatbridge.datasets.loader import too_many_unreadable
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.files import atomic_file, atomic_text, hash_of, hash_of_file, read_json, write_json
from lavis_chatbridge.prompting.conversation import Modality
from lavis_chatbridge.schema import Medium, Sample, SampleFile, check_inside, to_record

_log = logging.getLogger(__name__)

PER_SHARD = 1000
_FORMAT = "chatbridge-shard-3"

_Content: TypeAlias = tuple[str, int | None, int | None]  # path, offset, size


@contextmanager
def tar_file(target: Path) -> Iterator[Callable[[str, bytes], tuple[int, int]]]:
    """Write a tar file atomically; yields a function that appends a member: name, content -> its offset and size."""
    with atomic_file(target) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:

        def add(name: str, content: bytes) -> tuple[int, int]:
            member = tarfile.TarInfo(name)
            member.size, at = len(content), tar.offset + tarfile.BLOCKSIZE
            tar.addfile(member, io.BytesIO(content))
            return at, len(content)

        yield add


@contextmanager
def media_file(target: Path) -> Iterator[Callable[[Modality, bytes, str], Medium]]:
    """Yield a function that stores a medium's bytes in a tar file (modality, content, file ending -> `Medium`).

    The tar file ``target`` is written atomically, and only if a medium is stored.
    """
    numbers = itertools.count()
    with ExitStack() as stack:
        tar = functools.cache(lambda: stack.enter_context(tar_file(target)))

        def keep(modality: Modality, content: bytes, ending: str) -> Medium:
            return Medium(modality, str(target), *tar()(f"{next(numbers):09d}.{ending}", content))

        yield keep


def write_index(shard: Path, content: dict[str, Any]) -> None:
    write_json(_index_of(shard), {"format": _FORMAT, "bytes": shard.stat().st_size, **content})


def read_index(shard: Path) -> dict[str, Any] | None:
    """The index of a shard; None if shard or index is missing, incomplete or in another format."""
    index = read_json(_index_of(shard))
    if not isinstance(index, dict) or index.get("format") != _FORMAT or not shard.is_file():
        return None
    return index if shard.stat().st_size == index["bytes"] else None


def _index_of(shard: Path) -> Path:
    return shard.with_suffix(".index.json")


def write(
    folder: str | Path,
    samples: Sequence[Sample],
    stem: str = "data",
    per_shard: int = PER_SHARD,
    rank: int = 0,
    world_size: int = 1,
    max_bad_share: float = 0.05,
) -> str | None:
    """Write samples with their media: ``STEM-00000.tar`` ..., and ``STEM.jsonl``.

    A process writes every ``world_size``-th shard, from shard ``rank``. Existing shards of the same samples and media
    are kept, so the same call continues an interrupted one. More than ``max_bad_share`` unreadable samples are a
    `DataError`. Returns a line that describes the complete set; None if other processes have not finished yet.
    """
    target = _ShardSet(Path(folder), stem, samples, per_shard)
    bad = tried = 0
    try:
        for number in range(rank, target.count, world_size):
            index = target.write(number)
            left_out = index["left_out"]
            tried, bad = tried + len(index["records"]) + len(left_out), bad + len(left_out)
            if fault := too_many_unreadable(stem, bad, tried, max_bad_share, left_out[-1][1] if left_out else ""):
                raise DataError(fault)
        return target.finish()
    except OSError as error:
        raise DataError(
            f"{folder}: shards cannot be written there: {error.strerror or error}; the same command continues"
        ) from error


class _ShardSet:
    """The shards and the JSONL of one set of samples."""

    def __init__(self, folder: Path, stem: str, samples: Sequence[Sample], per_shard: int) -> None:
        self.folder, self.stem, self.samples, self.per_shard = folder, stem, samples, per_shard
        self.count = -(-len(samples) // per_shard)
        self.jsonl = folder / f"{stem}.jsonl"
        content = hash_of_file(samples.path) if isinstance(samples, SampleFile) else [to_record(s) for s in samples]
        if isinstance(samples, SampleFile) and os.path.realpath(self.jsonl) == os.path.realpath(samples.path):
            raise DataError(f"{samples.path}: the shards' JSONL would replace it; name another --output")
        self.hash = hash_of(_FORMAT, content, len(samples), per_shard)

    def shard(self, number: int) -> Path:
        return self.folder / f"{self.stem}-{number:05d}.tar"

    def write(self, number: int) -> dict[str, Any]:
        """Write a shard, unless it already exists with the same samples and media; returns its index."""
        first = number * self.per_shard
        part = [(i, self.samples[i]) for i in range(first, min(first + self.per_shard, len(self.samples)))]
        media = [medium for _, sample in part for medium in sample.files]
        if isinstance(self.samples, SampleFile) and not self.samples.allow_outside:
            for medium in media:
                check_inside(medium.path, self.samples.root)
        status = [os.stat(medium.path) for medium in media if os.path.exists(medium.path)]
        key = hash_of(self.hash, number, [(one.st_size, one.st_mtime_ns) for one in status])
        shard = self.shard(number)
        index = read_index(shard)
        if index is not None and index["key"] == key:
            return index
        for outdated in (self.jsonl, _index_of(shard)):
            outdated.unlink(missing_ok=True)
        index = {"samples_hash": self.hash, "key": key, **_fill(shard, part)}
        write_index(shard, index)
        _log.info("wrote %s: %d samples, left out %d", shard, len(index["records"]), len(index["left_out"]))
        return index

    def finish(self) -> str | None:
        """If every shard is complete, write the JSONL, and delete further shards of an earlier, longer set."""
        count = 0
        left_out: list[tuple[str, str]] = []
        try:
            with atomic_text(self.jsonl) as out:
                for number in range(self.count):
                    index = read_index(self.shard(number))
                    if index is None or index["samples_hash"] != self.hash:
                        raise _IncompleteError
                    count += len(index["records"])
                    left_out += index["left_out"]
                    out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in index["records"])
                if not count:
                    raise DataError(f"{self.jsonl}: none of {len(self.samples)} samples has readable media")
        except _IncompleteError:
            return None
        extra = self.count
        while self.shard(extra).exists():
            _index_of(self.shard(extra)).unlink(missing_ok=True)
            self.shard(extra).unlink()
            extra += 1
        text = f"{self.jsonl}: {count} samples in {self.count} shards"
        if left_out:
            name, cause = left_out[0]
            text += f"; left out {len(left_out)} whose media cannot be read (first {name}: {cause})"
        return text


class _IncompleteError(Exception):
    """Another process has not written all its shards yet."""


def _fill(shard: Path, part: Iterable[tuple[int, Sample]]) -> dict[str, Any]:
    """Write a shard; returns its samples as records. A medium of several samples is stored once."""
    records: list[dict[str, Any]] = []
    left_out: list[tuple[str, str]] = []
    members: dict[_Content, tuple[Any, ...]] = {}  # path in the tar
    locations: dict[_Content, tuple[Any, ...]] = {}  # the tar, offset and size
    with tar_file(shard) as add:
        for position, sample in part:
            try:
                new = {_key(m): _content(m) for m in sample.files if _key(m) not in locations}
            except MediaError as error:
                left_out.append((sample.id, str(error)))
                continue
            for number, (key, (ending, data)) in enumerate(new.items()):
                name = f"{position:09d}.{ending if len(new) == 1 else f'{number}.{ending}'}"
                members[key], locations[key] = (name,), (shard.name, *add(name, data))
            record = json.dumps(_moved(sample, members), ensure_ascii=False)
            add(f"{position:09d}.json", record.encode())
            records.append(_moved(sample, locations))
    return {"left_out": left_out, "records": records}


def _key(medium: Medium) -> _Content:
    return medium.path, medium.offset, medium.size


def _content(medium: Medium) -> tuple[str, bytes]:
    """File ending and bytes of a medium."""
    found = media_content(medium)
    try:
        data = Path(found).read_bytes() if isinstance(found, str) else found
    except OSError as error:
        raise MediaError(medium.path, error.strerror or error) from error
    if not data:
        raise MediaError(medium.path, "the file is empty")
    ending = Path(medium.path).suffix[1:].lower() if medium.offset is None else ""
    return ending if ending.isalnum() and ending != "json" else medium.modality, data


def _moved(sample: Sample, locations: Mapping[_Content, tuple[Any, ...]]) -> dict[str, Any]:
    """A sample as a JSONL record, with its media at other locations."""
    media = (m if m.words else Medium(m.modality, *locations[_key(m)]) for m in sample.media)
    return to_record(replace(sample, media=tuple(media)))
