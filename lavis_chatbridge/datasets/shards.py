"""Shards: samples and their media in webdataset's tar files, with a JSONL that says at which byte each medium lies.

A shard is a function of the annotation file and its number alone, so any number of processes can share the work, and an
interrupted run goes on where it stopped. A shard appears whole or not at all, and counts only once its index is there;
the JSONL and the manifest come last, and go first when a shard is written anew. Training reads that JSONL like any
other, in the annotation file's order. Nothing here decodes a medium.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lavis_chatbridge.datasets.cache import held, remove_abandoned
from lavis_chatbridge.datasets.dataset import SourceGroup, media_source
from lavis_chatbridge.datasets.files import SampleFile
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.files import atomic_file, read_json
from lavis_chatbridge.media.source import file_of, media_errors
from lavis_chatbridge.schema import Medium, Sample, check_inside, parse_record, to_record

_log = logging.getLogger(__name__)

PER_SHARD = 1000
_FORMAT = "chatbridge-shard-1"
_NAMED = 20  # samples left out that a manifest names
_TRIES_BEFORE_JUDGING = 20
_BLOCK = 1 << 20
_IN_AN_INDEX = frozenset(("key", "samples", "media", "left_out", "bytes", "sha256", "records"))

_Content: TypeAlias = "tuple[str, int | None, int | None]"  # path, offset, size: one medium, whatever it is used as


@dataclass(frozen=True)
class ShardSet:
    """What shards of one annotation file are made of, and where they go.

    Args:
        folder: Where shards, JSONL and manifest lie.
        stem: What their names begin with.
        samples: The annotation file.
        indices: ``[n]`` which of its samples, ascending; all without it.
        per_shard: Samples of a shard.
    """

    folder: Path
    stem: str
    samples: SampleFile
    indices: np.ndarray | None = None
    per_shard: int = PER_SHARD

    def __len__(self) -> int:
        return len(self.samples) if self.indices is None else len(self.indices)

    @property
    def count(self) -> int:
        """How many shards there will be."""
        return -(-len(self) // self.per_shard)

    @property
    def jsonl(self) -> Path:
        """The file that training reads."""
        return self.folder / f"{self.stem}.jsonl"

    @property
    def manifest(self) -> Path:
        """Counts and hashes; it is there once everything else is."""
        return self.folder / f"{self.stem}.manifest.json"

    @cached_property
    def stamp(self) -> str:
        """Changes with the annotation file, the choice of samples, and the samples per shard."""
        chosen = "all" if self.indices is None else _digest(np.asarray(self.indices, dtype=np.int64).tobytes())
        return _digest(f"{_FORMAT}:{self.per_shard}:{chosen}:{sha256_of(Path(self.samples.path))}".encode())

    def shard(self, number: int) -> Path:
        """The tar file of a number."""
        return self.folder / f"{self.stem}-{number:05d}.tar"

    def index(self, number: int) -> Path:
        """What is known of a shard: counts, hash, and its samples."""
        return self.folder / f"{self.stem}-{number:05d}.index.json"

    def part(self, number: int) -> list[tuple[int, Sample]]:
        """A shard's samples, each with its position in the annotation file."""
        places = range(number * self.per_shard, min(len(self), (number + 1) * self.per_shard))
        positions = places if self.indices is None else [int(self.indices[place]) for place in places]
        return [(position, self.samples[position]) for position in positions]


def shard_sets(group: SourceGroup, folder: Path, split: str, per_shard: int = PER_SHARD) -> list[ShardSet]:
    """The shards of one split: one set per data set and annotation file, which keeps training's sources what they are.

    Args:
        group: The split, as a builder makes it.
        folder: The data set's shards go to ``folder/DATASET/SPLIT``.
        split: The split's name.
        per_shard: Samples of a shard.

    Raises:
        DataError: If a source does not come from a file.
    """
    files: dict[tuple[str, str], list[Any]] = {}
    for source in group.sources:
        if not isinstance(source.samples, SampleFile):
            raise DataError(f"{source.name}: only samples of a file can be written to shards")
        files.setdefault((source.name.split("/")[0], source.samples.path), []).append(source)
    stems = _stems(list(files))
    sets = []
    for (name, path), sources in files.items():
        parts = [source.indices for source in sources]
        indices = None if any(part is None for part in parts) else np.sort(np.concatenate(parts))
        if indices is not None and len(indices) == len(sources[0].samples):
            indices = None
        sets.append(ShardSet(folder / name / split, stems[name, path], sources[0].samples, indices, per_shard))
    return sets


def _stems(files: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """A name for the shards of each data set's annotation file: the file's own, numbered where that is taken."""
    given = Counter((name, Path(path).stem) for name, path in files)
    taken = {place for place, count in given.items() if count == 1}
    stems = {}
    for number, (name, path) in enumerate(files):
        stem = Path(path).stem
        if given[name, stem] > 1:
            stem = next(new for n in count(number) if (name, new := f"{stem}-{n}") not in taken)
            taken.add((name, stem))
        stems[name, path] = stem
    return stems


def write_shards(
    sets: Sequence[ShardSet],
    rank: int = 0,
    world_size: int = 1,
    max_bad_share: float = 0.05,
    verify: bool = False,
) -> list[ShardSet]:
    """Write this process's shards that are not there yet, and the manifest of every set that is then complete.

    Args:
        sets: All sets, the same in every process.
        rank: This process writes every ``world_size``-th shard, from ``rank`` on.
        world_size: Number of processes.
        max_bad_share: Stop when more than this share of the samples has media that cannot be read.
        verify: Compare the hashes of what is there, and make anew what differs.

    Returns:
        The complete sets: all of them for the last process, perhaps fewer for those before.

    Raises:
        DataError: If too many media cannot be read, a set has no readable sample, a medium lies outside its root, the
            folder cannot be written to, or an annotation file lies where a set's JSONL goes.
    """
    for chosen in sets:
        if os.path.realpath(chosen.jsonl) == os.path.realpath(chosen.samples.path):
            raise DataError(f"{chosen.samples.path}: the shards' JSONL would replace it; name another --output")
    try:
        _write_own(sets, rank, world_size, max_bad_share, verify)
        return [chosen for chosen in sets if _finish(chosen, verify)]
    except OSError as error:
        folder = ", ".join(dict.fromkeys(str(chosen.folder) for chosen in sets))
        raise DataError(
            f"{folder}: shards cannot be written there: {error.strerror or error}; the same command goes on where it "
            "stopped"
        ) from error


def _write_own(sets: Sequence[ShardSet], rank: int, world_size: int, max_bad_share: float, verify: bool) -> None:
    """Write this process's shards; arguments and errors as those of `write_shards`."""
    units = [(chosen, number) for chosen in sets for number in range(chosen.count)]
    tried = bad = 0
    for chosen, number in units[rank::world_size]:
        index = _shard(chosen, number, verify)
        tried += index["samples"] + len(index["left_out"])
        bad += len(index["left_out"])
        if tried >= _TRIES_BEFORE_JUDGING and bad > max_bad_share * tried:
            last = f"; the last one: {index['left_out'][-1][1]}" if index["left_out"] else ""
            raise DataError(
                f"{chosen.samples.path}: {bad} of {tried} samples have media that cannot be read, more than the "
                f"{max_bad_share:.0%} that --max-bad-share allows{last}"
            )


def _shard(chosen: ShardSet, number: int, verify: bool) -> dict[str, Any]:
    """The index of a shard, which is written unless it is there for the same samples and media."""
    part = chosen.part(number)
    key = _key(chosen, number, part)
    index = _standing(chosen, number)
    target = chosen.shard(number)
    if index is not None and index["key"] == key and (not verify or sha256_of(target) == index["sha256"]):
        return index
    for stale in (chosen.manifest, chosen.jsonl, chosen.index(number)):  # what they say is about to be true no longer
        stale.unlink(missing_ok=True)
    with _whole(target) as temporary:
        index = {"format": _FORMAT, "stamp": chosen.stamp, "key": key, **_fill(temporary, target.name, chosen, part)}
    _write_lines(chosen.index(number), [json.dumps(index, ensure_ascii=False)])
    _log.info("wrote %s: %d samples, left out %d", target, index["samples"], len(index["left_out"]))
    return index


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """As `atomic_file`; other processes leave the temporary file alone until it has the target's name."""
    with ExitStack() as until_published, atomic_file(target) as temporary:
        until_published.enter_context(held(temporary))
        yield temporary


def _write_lines(target: Path, lines: Iterable[str]) -> None:
    with _whole(target) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def _standing(chosen: ShardSet, number: int) -> dict[str, Any] | None:
    """The index of a shard that is whole and of this annotation file, else None."""
    index, target = read_json(chosen.index(number)), chosen.shard(number)
    if not isinstance(index, dict) or (index.get("format"), index.get("stamp")) != (_FORMAT, chosen.stamp):
        return None
    if not _IN_AN_INDEX.issubset(index):
        return None
    return index if target.is_file() and target.stat().st_size == index["bytes"] else None


def _key(chosen: ShardSet, number: int, part: Iterable[tuple[int, Sample]]) -> str:
    """Changes with a shard's samples and with size or time of their media."""
    digest = hashlib.sha256(f"{chosen.stamp}:{number}".encode())
    for path in dict.fromkeys(medium.path for _, sample in part for medium in sample.files):
        try:
            status = os.stat(path)
            digest.update(f"{status.st_size}:{status.st_mtime_ns};".encode())
        except OSError:
            digest.update(b"missing;")
    return digest.hexdigest()


def _fill(path: Path, name: str, chosen: ShardSet, part: Iterable[tuple[int, Sample]]) -> dict[str, Any]:
    """Write a tar; returns counts, hash, and the samples with their media's places in it.

    A medium of several samples is stored once, with the first of them.
    """
    from webdataset.writer import TarWriter

    kept: list[Sample] = []
    left_out: list[tuple[str, str]] = []
    members: dict[_Content, str] = {}
    with open(path, "wb") as file, TarWriter(file, user="", group="", encoder=False, mtime=0) as tar:
        for position, sample in part:
            try:
                new = _read(sample, chosen, members)
            except MediaError as error:
                left_out.append((sample.id, str(error)))
                continue
            key = f"{position:09d}"
            contents: dict[str, bytes] = {}
            for content, (extension, data) in new.items():
                extension = extension if len(new) == 1 else f"{len(contents)}.{extension}"
                contents[extension], members[content] = data, f"{key}.{extension}"
            own = {content: Medium("image", members[content]) for content in map(_content, sample.files)}
            record = _with_places(sample, own)
            tar.write({"__key__": key, **contents, "json": json.dumps(record, ensure_ascii=False).encode()})
            kept.append(sample)
    with tarfile.open(path, "r:") as written:
        offsets = {member.name: (member.offset_data, member.size) for member in written}
    places = {content: Medium("image", name, *offsets[member]) for content, member in members.items()}
    counts = {"samples": len(kept), "media": len(members), "left_out": left_out}
    hashed = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return counts | hashed | {"records": [_with_places(sample, places) for sample in kept]}


def _read(sample: Sample, chosen: ShardSet, stored: Mapping[_Content, str]) -> dict[_Content, tuple[str, bytes]]:
    """Extension and bytes of a sample's media, but for those that are stored already."""
    found: dict[_Content, tuple[str, bytes]] = {}
    for medium in sample.files:
        content = _content(medium)
        if content in stored or content in found:
            continue
        if not chosen.samples.allow_outside:
            check_inside(medium.path, chosen.samples.root)
        data = media_source(medium)
        if isinstance(data, str):
            with media_errors(data):
                data = Path(str(file_of(data))).read_bytes()
        suffix = Path(medium.path).suffix[1:].lower() if medium.offset is None else ""
        found[content] = (suffix if suffix.isalnum() and suffix != "json" else medium.kind, data)
    return found


def _content(medium: Medium) -> _Content:
    return medium.path, medium.offset, medium.size


def _with_places(sample: Sample, places: Mapping[_Content, Medium]) -> dict[str, Any]:
    """A sample as the schema's object, its files at other places."""
    media = [m if m.words else replace(places[_content(m)], kind=m.kind) for m in sample.media]
    return to_record(replace(sample, media=tuple(media)))


def _finish(chosen: ShardSet, verify: bool) -> bool:
    """Write JSONL and manifest if every shard is there; returns whether they are."""
    if _is_finished(chosen, verify):
        return True
    indexes = []
    for number in range(chosen.count):  # one after the other: of a large set, the records do not fit into memory
        index = _standing(chosen, number)
        if index is None:
            return False
        indexes.append({key: value for key, value in index.items() if key != "records"})
    if not any(index["samples"] for index in indexes):
        raise DataError(f"{chosen.samples.path}: none of its {len(chosen)} samples has media that can be read")
    modalities: Counter[str] = Counter()
    records = (to_record(sample, str(chosen.folder.absolute())) for sample in _all_samples(chosen, modalities))
    _write_lines(chosen.jsonl, (json.dumps(record, ensure_ascii=False) for record in records))
    _tidy(chosen)
    _write_lines(chosen.manifest, [json.dumps(_manifest(chosen, indexes, modalities), ensure_ascii=False, indent=1)])
    return True


def _is_finished(chosen: ShardSet, verify: bool) -> bool:
    """Whether JSONL and manifest are there and of these samples; with ``verify`` also whether the JSONL is whole."""
    known = read_json(chosen.manifest)
    if not isinstance(known, dict) or known.get("stamp") != chosen.stamp or not chosen.jsonl.is_file():
        return False
    return not verify or known.get("jsonl") == _hashed(chosen.jsonl)


def _hashed(path: Path) -> dict[str, str]:
    return {"name": path.name, "sha256": sha256_of(path)}


def _all_samples(chosen: ShardSet, modalities: Counter[str]) -> Iterator[Sample]:
    for number in range(chosen.count):
        index = _standing(chosen, number)
        if index is None:
            raise DataError(f"{chosen.shard(number)}: another process has begun to write it anew; repeat this command")
        for record in index["records"]:
            sample = parse_record(record, str(chosen.index(number)), str(chosen.folder))
            modalities[sample.modality] += 1
            yield sample


def _manifest(chosen: ShardSet, indexes: Sequence[Mapping[str, Any]], modalities: Mapping[str, int]) -> dict[str, Any]:
    left_out = [entry for index in indexes for entry in index["left_out"]]
    return {
        "format": _FORMAT,
        "stamp": chosen.stamp,
        "samples": sum(index["samples"] for index in indexes),
        "modalities": dict(sorted(modalities.items())),
        "media": sum(index["media"] for index in indexes),
        "bytes": sum(index["bytes"] for index in indexes),
        "left_out": len(left_out),
        "left_out_first": left_out[:_NAMED],
        "jsonl": _hashed(chosen.jsonl),
        "shards": [
            {"name": chosen.shard(number).name} | {key: index[key] for key in ("samples", "media", "bytes", "sha256")}
            for number, index in enumerate(indexes)
        ],
    }


def _tidy(chosen: ShardSet) -> None:
    """Remove what runs that were killed, or that had more shards, left behind."""
    stem = re.escape(chosen.stem)
    shard = re.compile(rf"{stem}-(\d{{5,}})\.(tar|index\.json)")
    unfinished = re.compile(rf"\.{stem}(-\d{{5,}})?\.(tar|index\.json|jsonl|manifest\.json)\.\w+\.tmp")
    for path in chosen.folder.iterdir():
        match = shard.fullmatch(path.name)
        if match and int(match[1]) >= chosen.count:
            path.unlink(missing_ok=True)
        elif unfinished.fullmatch(path.name):
            remove_abandoned(path)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
