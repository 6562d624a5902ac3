"""Last stage: task data and chat data become one MULTIS in shards, with a manifest of all sources.

The result has a folder for each source: ``annotations.jsonl`` in the sample schema, and shards with its media. Building
is deterministic: the same inputs give the same bytes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from lavis_chatbridge import __version__
from lavis_chatbridge.config import Settings, parse, unknown_key
from lavis_chatbridge.datasets import shards
from lavis_chatbridge.datasets.readers import READERS
from lavis_chatbridge.datasets.settings import DataSettings
from lavis_chatbridge.errors import ConfigError, DataError, PromptError
from lavis_chatbridge.files import hash_of_file, write_json
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.prompting.templates import Templates
from lavis_chatbridge.schema import Sample, read_jsonl, write_jsonl

_ROWS = Path(__file__).parents[1] / "configs" / "datasets"
_NAMED_FAULTS = 10


class SourceSettings(Settings):
    """One source of MULTIS."""

    name: str
    """Name of the source, and of its folder in the result."""
    licence: str
    """Its licence, for the manifest."""
    samples: list[str] = []
    """JSONL files in the sample schema: task data, or ``accepted.jsonl``."""
    dataset: str | None = None
    """Instead of ``samples``: a public data set by its row in ``configs/datasets`` (``multis_vqav2``)."""
    split: str = "train"
    """The split of ``dataset``."""
    data_root: str | None = None
    """Folder of the files of ``dataset``; null is ``CHATBRIDGE_DATA``."""
    media_root: str | None = None
    """Folder of the media paths; null is the folder of each file."""
    task: str = ""
    """Task of samples without one; it selects the instruction templates."""
    style: str = ""
    """Answer style of samples without one."""
    homepage: str = ""
    limit: int | None = None
    """Most samples."""

    def check(self) -> Iterator[str]:
        """Yield a contradiction between the two ways to name the data."""
        if bool(self.samples) == bool(self.dataset):
            yield f"source {self.name!r} needs either samples or dataset"
        if not self.name or self.name.startswith(".") or any(sign in self.name for sign in "/\\\0"):
            yield f"{self.name!r} cannot name a folder"


class BuildSettings(Settings):
    """What to build."""

    sources: list[SourceSettings]
    media: Literal["pack", "reference"] = "pack"
    """``pack`` copies media into shards; ``reference`` leaves them in place."""
    wording: Literal["at_reading", "fixed"] = "at_reading"
    """``at_reading`` samples an instruction template at each epoch; ``fixed`` samples it now."""
    templates: list[str] = []
    """Further template files."""
    per_shard: int = shards.PER_SHARD
    """Samples in a shard."""
    seed: int = 0
    """Samples the templates."""
    skip_missing: bool = False
    """Skip and count samples whose media are missing, instead of raising an error."""

    def check(self) -> Iterator[str]:
        """Yield names that occur twice, and an empty list of sources."""
        counts = Counter(source.name for source in self.sources)
        yield from (f"{count} sources are named {name!r}" for name, count in counts.items() if count > 1)
        if not self.sources:
            yield "sources is empty"


def load_settings(path: str | Path) -> BuildSettings:
    """Read build settings from YAML; relative paths in it are relative to the file.

    Raises:
        ConfigError: With every fault.
    """
    path = Path(path)
    try:
        options = parse(BuildSettings, yaml.safe_load(path.read_text(encoding="utf-8")), "build")
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error

    def beside(name: str | None) -> str | None:
        return None if name is None else str(path.parent / name)

    sources = [
        source.model_copy(
            update={
                "samples": [beside(file) for file in source.samples],
                "media_root": beside(source.media_root),
                "data_root": beside(source.data_root),
            }
        )
        for source in options.sources
    ]
    return options.model_copy(update={"sources": sources, "templates": [beside(file) for file in options.templates]})


def build(options: BuildSettings, folder: str | Path) -> dict[str, Any]:
    """Build MULTIS.

    Args:
        options: The sources.
        folder: The output folder, written atomically; it must not exist.

    Returns:
        The manifest, which is also in ``manifest.json``.

    Raises:
        DataError: If the folder exists, a file is malformed, or media are missing (all are named).
        PromptError: If a task's templates need a question that a sample lacks.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder} exists; remove it, or choose another folder")
    absent = [str(file) for source in options.sources for file in _inputs(source) if not file.is_file()]
    if absent:
        raise DataError(f"{len(absent)} annotation files are missing: {', '.join(absent)}")
    missing = [] if options.skip_missing else _missing_media(options)
    if missing:
        named = "; ".join(missing[:_NAMED_FAULTS])
        more = f" and {len(missing) - _NAMED_FAULTS} more" if len(missing) > _NAMED_FAULTS else ""
        raise DataError(
            f"{len(missing)} media are missing: {named}{more}; correct the paths, or set skip_missing: true"
        )
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    templates = Templates.load(*options.templates)
    sources = {source.name: _build_source(source, options, templates, unfinished) for source in options.sources}
    manifest = {
        "format": 2,
        "made_by": f"lavis-chatbridge {__version__}",
        "seed": options.seed,
        "media": options.media,
        "wording": options.wording,
        "samples": sum(entry["samples"] for entry in sources.values()),
        "sources": sources,
    }
    write_json(unfinished / "manifest.json", manifest)
    os.replace(unfinished, folder)
    return manifest


def verify(folder: str | Path) -> list[str]:
    """Compare a built MULTIS with its manifest; returns absent and changed files.

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
            if not (folder / name).is_file():
                faults.append(f"{name} is absent")
            elif hash_of_file(folder / name) != expected["sha256"]:
                faults.append(f"{name} has another hash than the manifest states")
    return faults


def _samples(source: SourceSettings) -> Iterator[Sample]:
    if source.dataset is not None:
        row = _row(source)
        every = READERS[row.reader](row.origin(source.dataset, source.split))
    else:
        every = itertools.chain.from_iterable(read_jsonl(file, source.media_root) for file in source.samples)
    return itertools.islice(every, source.limit)


def _row(source: SourceSettings) -> DataSettings:
    """The row of a public data set.

    Raises:
        ConfigError: If there is no such row, or it has no such split.
    """
    rows: dict[str, Any] = {}
    for file in sorted(_ROWS.glob("*.yaml")):
        rows |= yaml.safe_load(file.read_text(encoding="utf-8"))["datasets"]
    name = str(source.dataset)
    if name not in rows:
        raise ConfigError(unknown_key(name, rows, "datasets"))
    row = parse(DataSettings, {**rows[name], "data_root": source.data_root}, name)
    if row.reader not in READERS or source.split not in row.used_splits:
        known = ", ".join(row.used_splits) or "none"
        raise ConfigError(f"source {source.name!r}: {name} has no split {source.split!r} to read; it has {known}")
    return row


def _inputs(source: SourceSettings) -> list[Path]:
    """The annotation files of a source."""
    if source.dataset is None:
        return [Path(file) for file in source.samples]
    return [Path(file) for files in _row(source).files(source.split).values() for file in files]


def _missing_media(options: BuildSettings) -> list[str]:
    paths = ((source.name, medium.path) for source in options.sources for s in _samples(source) for medium in s.files)
    return [f"{name}: {path}" for name, path in dict.fromkeys(paths) if not os.path.isfile(path)]


def _build_source(source: SourceSettings, options: BuildSettings, templates: Templates, root: Path) -> dict[str, Any]:
    if source.dataset is not None:
        row = _row(source)
        source = source.model_copy(update={"task": source.task or row.task, "style": source.style or row.style})
        if row.templates is False:
            templates = Templates({}, {})  # its questions are already complete instructions
    rng = np.random.default_rng([options.seed, *source.name.encode()])
    found = list(_samples(source))
    present = [sample for sample in found if all(os.path.isfile(medium.path) for medium in sample.files)]
    repeated = [name for name, count in Counter(sample.id for sample in present).items() if count > 1]
    if repeated:
        raise DataError(f"{source.name}: the id {repeated[0]!r} occurs twice")
    samples = [_worded(sample, source, options, templates, rng) for sample in present]
    folder = root / source.name
    if options.media == "pack":
        shards.write(folder, samples, "annotations", options.per_shard)
    else:
        write_jsonl(folder / "annotations.jsonl", samples)
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    return {
        "licence": source.licence,
        "homepage": source.homepage,
        "samples": len(samples),
        "skipped": len(found) - len(present),
        "by_task": dict(sorted(Counter(str(s.task or s.meta.get("task", "")) or "none" for s in samples).items())),
        "by_modality": dict(sorted(Counter(sample.modality for sample in samples).items())),
        "dataset": source.dataset,
        "made_from": {file.name: hash_of_file(file) for file in _inputs(source)},
        "files": {
            f"{source.name}/{file.name}": {"bytes": file.stat().st_size, "sha256": hash_of_file(file)} for file in files
        },
    }


def _worded(
    sample: Sample, source: SourceSettings, options: BuildSettings, templates: Templates, rng: np.random.Generator
) -> Sample:
    """The sample with its source, task and style; with ``fixed`` wording also with its instruction."""
    task, style = sample.task or source.task, sample.style or source.style
    sample = dataclasses.replace(sample, source=source.name, task=task, style=style)
    where = f"{source.name}: sample {sample.id!r}"
    if task not in templates:
        if sample.turns:
            return sample
        known = ", ".join(templates.tasks)
        raise DataError(f"{where} has no turns, and no template is of task {task!r}; known: {known}")
    question = sample.turns[0].text if sample.turns else ""
    try:
        request = templates.apply(task, question, style, rng)
    except PromptError as error:
        raise PromptError(f"{where}: {error}") from error
    if options.wording == "at_reading":
        return sample
    first = Message("user", request, sample.modalities)
    turns = (first, *sample.turns[1:]) if sample.turns else (first, Message("assistant", sample.captions[0]))
    # A sample without a task gets no template when it is read; meta keeps the task's name.
    return dataclasses.replace(sample, turns=turns, task="", style="", meta={**sample.meta, "task": task})
