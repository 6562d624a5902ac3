"""The last stage: task data and chat data become one sharded MULTIS with a manifest of where everything came from.

Layout of the result, one folder per source: ``annotations.jsonl`` in the sample schema, whose media lie inside
``shard-NNNNN.tar`` (offset and size; readable at random) or stay where they are. The tars are webdataset shards as
well: each sample's JSON stands in them beside its media. Building is deterministic: the same inputs give the same
bytes.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import yaml

from lavis_chatbridge import __version__
from lavis_chatbridge import config as settings
from lavis_chatbridge.datasets.readers import READERS
from lavis_chatbridge.datasets.settings import DataSettings
from lavis_chatbridge.errors import ConfigError, DataError, PromptError
from lavis_chatbridge.files import hash_of_file, write_text
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.prompting.templates import Templates
from lavis_chatbridge.schema import Medium, Sample, read_jsonl, to_record

_ROWS = Path(__file__).parents[1] / "configs" / "datasets"
_NAMED_FAULTS = 10
_BLOCK = 512


@dataclass(frozen=True)
class SourceSettings:
    """One source of MULTIS.

    Args:
        name: Its name, a folder of the result.
        samples: JSONL files in the sample schema: task data, or ``accepted.jsonl``.
        dataset: Instead of ``samples``: a public set in its own files, by the name of its row in ``configs/datasets``
            (``multis_vqav2``, ...), which also states its task and style.
        split: The split of ``dataset``.
        data_root: Where the files of ``dataset`` lie; by default as everywhere (``CHATBRIDGE_DATA``).
        licence: Its licence, as the manifest shall state it.
        media_root: What its media paths are relative to; by default the folder of each file.
        task: The task of samples that name none; it selects the instruction templates.
        style: The answer style of samples that name none.
        homepage: Where it comes from.
        limit: No more samples than this.
    """

    name: str
    licence: str
    samples: list[str] = field(default_factory=list)
    dataset: str | None = None
    split: str = "train"
    data_root: str | None = None
    media_root: str | None = None
    task: str = ""
    style: str = ""
    homepage: str = ""
    limit: int | None = None

    def check(self) -> Iterator[str]:
        """Neither or both ways to name the data."""
        if bool(self.samples) == bool(self.dataset):
            yield f"source {self.name!r} needs either samples or dataset"


@dataclass(frozen=True)
class BuildSettings:
    """What is built.

    Args:
        sources: In the order of the result.
        media: ``pack`` copies the media into tar shards, ``reference`` leaves them where they are.
        wording: ``at_reading`` leaves the choice of a template to the reader, who draws one per epoch; ``fixed``
            draws it now.
        templates: Further template files.
        shard_size: Bytes after which a new shard begins.
        seed: Of the drawing.
        skip_missing: Leave out samples whose media are absent, and count them, instead of refusing to build.
    """

    sources: list[SourceSettings]
    media: Literal["pack", "reference"] = "pack"
    wording: Literal["at_reading", "fixed"] = "at_reading"
    templates: list[str] = field(default_factory=list)
    shard_size: int = 1_000_000_000
    seed: int = 0
    skip_missing: bool = False

    def check(self) -> Iterator[str]:
        """Names that clash or that cannot be folders."""
        for name, count in Counter(source.name for source in self.sources).items():
            if count > 1:
                yield f"{count} sources are named {name!r}"
            if not name or name.startswith(".") or any(sign in name for sign in "/\\\0"):
                yield f"{name!r} cannot name a folder"
        if not self.sources:
            yield "sources is empty"


def load_settings(path: str | Path) -> BuildSettings:
    """Build settings from YAML; relative paths in it are relative to the file.

    Raises:
        ConfigError: With every fault.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    options = settings.parse(BuildSettings, values, "build")
    base = path.parent
    sources = [
        dataclasses.replace(
            source,
            samples=[str(base / file) for file in source.samples],
            media_root=str(base / source.media_root) if source.media_root is not None else None,
            data_root=str(base / source.data_root) if source.data_root is not None else None,
        )
        for source in options.sources
    ]
    return dataclasses.replace(options, sources=sources, templates=[str(base / file) for file in options.templates])


def build(options: BuildSettings, folder: str | Path) -> dict[str, Any]:
    """Build MULTIS.

    Args:
        options: The sources.
        folder: Must not exist; appears whole or not at all.

    Returns:
        The manifest, which also lies in ``manifest.json``.

    Raises:
        DataError: If the folder exists, a file is not in the schema, or media are missing (looked for first).
        PromptError: If a task's templates need a question that a sample lacks.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder} exists; remove it, or build into another folder")
    templates = Templates.load(*options.templates)
    absent = [str(file) for source in options.sources for file in _inputs(source) if not file.is_file()]
    if absent:
        raise DataError(f"{len(absent)} annotation files are missing: {', '.join(absent)}")
    missing = _missing_media(options)
    if missing and not options.skip_missing:
        named = "; ".join(f"{source}: {path}" for source, path in missing[:_NAMED_FAULTS])
        more = f" and {len(missing) - _NAMED_FAULTS} more" if len(missing) > _NAMED_FAULTS else ""
        raise DataError(f"{len(missing)} media are missing: {named}{more}; mend the paths, or set skip_missing: true")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    sources = {source.name: _build_source(source, options, templates, unfinished) for source in options.sources}
    manifest = {
        "format": 1,
        "made_by": f"lavis-chatbridge {__version__}",
        "seed": options.seed,
        "media": options.media,
        "wording": options.wording,
        "samples": sum(entry["samples"] for entry in sources.values()),
        "sources": sources,
    }
    write_text(unfinished / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    os.replace(unfinished, folder)
    return manifest


def verify(folder: str | Path) -> list[str]:
    """What of a built MULTIS differs from its manifest: absent files, other hashes. Empty if nothing does.

    Raises:
        DataError: If there is no manifest.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {folder / 'manifest.json'}: {error}") from error
    faults = []
    for source in manifest["sources"].values():
        for name, expected in source["files"].items():
            file = folder / name
            if not file.is_file():
                faults.append(f"{name} is absent")
            elif hash_of_file(file) != expected["sha256"]:
                faults.append(f"{name} has another hash than the manifest states")
    return faults


def _samples(source: SourceSettings) -> Iterator[Sample]:
    if source.dataset is not None:
        row = _row(source)
        every = READERS[row.reader](row.origin(str(source.dataset), source.split))
    else:
        every = itertools.chain.from_iterable(read_jsonl(file, source.media_root) for file in source.samples)
    return itertools.islice(every, source.limit)


def _row(source: SourceSettings) -> DataSettings:
    """The row of a public set, as its builder reads it.

    Raises:
        ConfigError: If there is no such row, or it is a mixture.
    """
    rows: dict[str, Any] = {}
    for file in sorted(_ROWS.glob("*.yaml")):
        rows |= yaml.safe_load(file.read_text(encoding="utf-8"))["datasets"]
    if source.dataset not in rows:
        raise ConfigError(settings.unknown_key(str(source.dataset), rows, "datasets"))
    row = settings.parse(DataSettings, {**rows[source.dataset], "data_root": source.data_root}, str(source.dataset))
    if row.reader not in READERS or source.split not in row.used_splits:
        known = ", ".join(row.used_splits) or "none"
        raise ConfigError(
            f"source {source.name!r}: {source.dataset} has no split {source.split!r} to read; it has {known}"
        )
    return row


def _inputs(source: SourceSettings) -> list[Path]:
    """The annotation files of a source."""
    if source.dataset is None:
        return [Path(file) for file in source.samples]
    return [Path(file) for files in _row(source).files(source.split).values() for file in files]


def _missing_media(options: BuildSettings) -> list[tuple[str, str]]:
    missing: dict[tuple[str, str], None] = {}
    seen: set[str] = set()
    for source in options.sources:
        for sample in _samples(source):
            for medium in sample.media:
                if medium.path not in seen and not os.path.isfile(medium.path):
                    missing[source.name, medium.path] = None
                seen.add(medium.path)
    return list(missing)


def _build_source(source: SourceSettings, options: BuildSettings, templates: Templates, root: Path) -> dict[str, Any]:
    folder = root / source.name
    folder.mkdir()
    if source.dataset is not None:
        row = _row(source)
        source = dataclasses.replace(source, task=source.task or row.task, style=source.style or row.style)
        if row.templates is False:
            templates = Templates({}, {})  # its questions are whole instructions already
    rng = np.random.default_rng([options.seed, *source.name.encode()])
    counts: Counter[str] = Counter()
    ids: set[str] = set()
    shards = _Shards(folder, options.shard_size) if options.media == "pack" else None
    annotations = folder / "annotations.jsonl"
    with annotations.open("w", encoding="utf-8") as out:
        for sample in _samples(source):
            if not all(os.path.isfile(medium.path) for medium in sample.media):
                counts["skipped"] += 1
                continue
            if sample.id in ids:
                raise DataError(f"{source.name}: the id {sample.id!r} stands there twice")
            ids.add(sample.id)
            sample = _worded(sample, source, options, templates, rng)
            if shards is not None:
                sample = shards.add(sample)
            out.write(json.dumps(to_record(sample, str(root.resolve())), ensure_ascii=False) + "\n")
            counts["samples"] += 1
            counts[f"task {sample.task or sample.meta.get('task', '')}"] += 1
            counts[f"modality {sample.modality}"] += 1
    files = [*(shards.close() if shards else []), annotations]
    return {
        "licence": source.licence,
        "homepage": source.homepage,
        "samples": counts["samples"],
        "skipped": counts["skipped"],
        "by_task": _part(counts, "task "),
        "by_modality": _part(counts, "modality "),
        "dataset": source.dataset,
        "made_from": {file.name: hash_of_file(file) for file in _inputs(source)},
        "files": {
            f"{source.name}/{file.name}": {"bytes": file.stat().st_size, "sha256": hash_of_file(file)} for file in files
        },
    }


def _worded(
    sample: Sample, source: SourceSettings, options: BuildSettings, templates: Templates, rng: np.random.Generator
) -> Sample:
    """The sample with its source, task and style; with ``fixed`` wording also with its request in words."""
    task, style = sample.task or source.task, sample.style or source.style
    sample = dataclasses.replace(sample, source=source.name, task=task, style=style)
    if task not in templates:
        if not sample.turns:
            known = ", ".join(templates.tasks)
            raise DataError(
                f"{source.name}: sample {sample.id!r} has no turns, and no template of task {task!r}; known: {known}"
            )
        return sample
    question = sample.turns[0].text if sample.turns else ""
    try:
        request = templates.apply(task, question, style, rng)
    except PromptError as error:
        raise PromptError(f"{source.name}: sample {sample.id!r}: {error}") from error
    if options.wording == "at_reading":
        return sample
    first = Message("user", request, sample.kinds)
    turns = (first, *sample.turns[1:]) if sample.turns else (first, Message("assistant", sample.captions[0]))
    # Without its task the reader leaves the request as it is; the task is kept where no template looks for it.
    return dataclasses.replace(sample, turns=turns, task="", style="", meta={**sample.meta, "task": task})


class _Shards:
    """Media in uncompressed tar files, each medium once per source, each sample's JSON behind its media."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size = folder, size
        self._files: list[Path] = []
        self._places: dict[tuple[str, int | None], tuple[Path, int, int]] = {}
        self._tar: tarfile.TarFile | None = None
        self._count = 0

    def add(self, sample: Sample) -> Sample:
        """Pack a sample's media; returns the sample with their new places."""
        if self._tar is None or self._tar.offset >= self._size:
            self._next()
        key = f"{self._count:09d}"
        self._count += 1
        media = []
        for number, medium in enumerate(sample.media):
            origin = (medium.path, medium.offset)
            if origin not in self._places:
                inside = medium.offset is not None
                suffix = "" if inside else os.path.splitext(medium.path)[1].lower()
                with open(medium.path, "rb") as content:
                    content.seek(medium.offset or 0)
                    part = io.BytesIO(content.read(medium.size)) if inside else content
                    self._places[origin] = self._put(f"{key}.{number}{suffix or f'.{medium.kind}'}", part)
            file, offset, size = self._places[origin]
            media.append(Medium(medium.kind, str(file), offset, size))
        data = json.dumps(to_record(sample), ensure_ascii=False).encode()
        self._put(f"{key}.json", io.BytesIO(data))
        return dataclasses.replace(sample, media=tuple(media))

    def close(self) -> list[Path]:
        """Finish the last shard; returns all of them."""
        if self._tar is not None:
            self._tar.close()
        return self._files

    def _next(self) -> tarfile.TarFile:
        self.close()
        self._files.append(self._folder / f"shard-{len(self._files):05d}.tar")
        self._tar = tarfile.open(self._files[-1], "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        return self._tar

    def _put(self, name: str, content: IO[bytes]) -> tuple[Path, int, int]:
        tar = self._tar or self._next()
        entry = tarfile.TarInfo(name)  # owner, mode and time stay at fixed values, so that builds are reproducible
        entry.size = content.seek(0, os.SEEK_END)
        content.seek(0)
        offset = tar.offset + _BLOCK
        tar.addfile(entry, content)
        return self._files[-1], offset, entry.size


def _part(counts: Counter[str], prefix: str) -> dict[str, int]:
    return {
        key.removeprefix(prefix) or "none": count for key, count in sorted(counts.items()) if key.startswith(prefix)
    }
