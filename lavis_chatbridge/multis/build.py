"""Last stage: combines task data and chat data into MULTIS: shards, and a manifest of all sources.

The output has a folder per source: ``annotations.jsonl`` in the sample schema, and shards with the media. The same
inputs give the same bytes.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from lavis_chatbridge import __version__
from lavis_chatbridge.config import Settings, parse, read_yaml, unknown_key
from lavis_chatbridge.datasets import shards
from lavis_chatbridge.datasets.readers import READERS
from lavis_chatbridge.datasets.settings import DataSettings
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.files import hash_of_file, write_json
from lavis_chatbridge.schema import Sample, read_jsonl

_SECTIONS = Path(__file__).parents[1] / "configs" / "datasets"


class SourceSettings(Settings):
    """One source of MULTIS."""

    name: str
    """Name of the source, and of its folder in the output."""
    licence: str
    """Its licence, for the manifest."""
    samples: list[str] = []
    """JSONL files in the sample schema: task data, or ``accepted.jsonl``."""
    dataset: str | None = None
    """Instead of ``samples``: a public data set, as named in ``configs/datasets`` (``multis_vqav2``)."""
    split: str = "train"
    """The split of ``dataset``."""
    data_root: str | None = None
    """Folder of the files of ``dataset``; null: ``$CHATBRIDGE_DATA``."""
    media_root: str | None = None
    """Folder that media paths are relative to; null: the folder of each file."""
    task: str = ""
    """Task of samples that have none; selects the instruction templates."""

    def check(self) -> Iterator[str]:
        if bool(self.samples) == bool(self.dataset):
            yield f"source {self.name!r} needs either samples or dataset"
        if not self.name or self.name.startswith(".") or "/" in self.name:
            yield f"{self.name!r} cannot name a folder"

    @cached_property
    def section(self) -> DataSettings | None:
        """The settings of ``dataset`` from ``configs/datasets``; None without one."""
        if self.dataset is None:
            return None
        sections: dict[str, Any] = {}
        for file in sorted(_SECTIONS.glob("*.yaml")):
            sections |= yaml.safe_load(file.read_text(encoding="utf-8"))["datasets"]
        if self.dataset not in sections:
            raise ConfigError(unknown_key(self.dataset, sections, "datasets"))
        section = parse(DataSettings, {**sections[self.dataset], "data_root": self.data_root}, self.dataset)
        if section.reader not in READERS or self.split not in section.used_splits:
            known = ", ".join(section.used_splits) or "none"
            raise ConfigError(f"source {self.name!r}: {self.dataset} has no split {self.split!r}; it has {known}")
        return section

    @property
    def files(self) -> list[Path]:
        """The source's annotation files."""
        files = self.samples if self.section is None else itertools.chain(*self.section.files(self.split).values())
        return [Path(file) for file in files]

    def read(self) -> Iterator[Sample]:
        """The source's samples.

        If the questions are complete instructions, the task moves to ``meta``, so that training adds no template.
        """
        if (section := self.section) is None:
            for sample in itertools.chain.from_iterable(read_jsonl(file, self.media_root) for file in self.samples):
                yield replace(sample, source=self.name, task=sample.task or self.task)
            return
        for sample in READERS[section.reader](section.origin(str(self.dataset), self.split)):
            task, style = sample.task or self.task or section.task, sample.style or section.style
            if section.templates is False:
                yield replace(sample, source=self.name, task="", meta={**sample.meta, "task": task})
            else:
                yield replace(sample, source=self.name, task=task, style=style)


class BuildSettings(Settings):
    """The sources of MULTIS."""

    sources: list[SourceSettings] = Field(min_length=1)
    skip_missing: bool = False
    """Skip and count samples with missing media, instead of raising an error."""

    def check(self) -> Iterator[str]:
        counts = Counter(source.name for source in self.sources)
        yield from (f"{count} sources are named {name!r}" for name, count in counts.items() if count > 1)


def load_settings(path: str | Path) -> BuildSettings:
    """Read build settings from YAML; relative paths in it are relative to the file."""
    folder, options = Path(path).parent, parse(BuildSettings, read_yaml(path), "build")
    sources = []
    for source in options.sources:
        roots = {"media_root": source.media_root, "data_root": source.data_root}
        changes: dict[str, Any] = {name: root and str(folder / root) for name, root in roots.items()}
        changes["samples"] = [str(folder / file) for file in source.samples]
        sources.append(source.model_copy(update=changes))
    return options.model_copy(update={"sources": sources})


def build(options: BuildSettings, folder: str | Path) -> dict[str, Any]:
    """Build MULTIS, and return the manifest. ``folder`` is written atomically; it must not exist."""
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder} exists; remove it, or choose another folder")
    if absent := [str(file) for source in options.sources for file in source.files if not file.is_file()]:
        raise DataError(f"{len(absent)} annotation files are missing: {', '.join(absent)}")
    checked = [] if options.skip_missing else options.sources
    media = ((one.name, file.path) for one in checked for sample in one.read() for file in sample.files)
    if missing := [f"{name}: {path}" for name, path in dict.fromkeys(media) if not os.path.isfile(path)]:
        named = "; ".join(missing[:10])
        raise DataError(f"{len(missing)} media are missing: {named}; correct the paths, or set skip_missing: true")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    entries = {source.name: _write(source, unfinished / source.name) for source in options.sources}
    manifest = {
        "made_by": f"lavis-chatbridge {__version__}",
        "samples": sum(entry["samples"] for entry in entries.values()),
        "sources": entries,
    }
    write_json(unfinished / "manifest.json", manifest)
    os.replace(unfinished, folder)
    return manifest


def _write(source: SourceSettings, folder: Path) -> dict[str, Any]:
    """Write a source to its folder, and return its entry for the manifest."""
    found = list(source.read())
    samples = [sample for sample in found if all(os.path.isfile(medium.path) for medium in sample.files)]
    if repeated := [one for one, count in Counter(sample.id for sample in samples).items() if count > 1]:
        raise DataError(f"{source.name}: the id {repeated[0]!r} occurs twice")
    shards.write(folder, samples, "annotations")
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    tasks = Counter(str(sample.task or sample.meta.get("task") or "none") for sample in samples)
    return {
        **source.model_dump(include={"licence", "dataset"}),
        "samples": len(samples),
        "skipped": len(found) - len(samples),
        "by_task": dict(sorted(tasks.items())),
        "by_modality": dict(sorted(Counter(sample.modality for sample in samples).items())),
        "made_from": {file.name: hash_of_file(file) for file in source.files},
        "files": {f"{source.name}/{f.name}": {"bytes": f.stat().st_size, "sha256": hash_of_file(f)} for f in files},
    }
