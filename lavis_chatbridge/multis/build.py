"""The last stage: task data and chat data become one sharded MULTIS with a manifest of its origins.

The result has one folder per source: ``annotations.jsonl`` in the sample schema, whose media are in
``annotations-NNNNN.tar`` (webdataset shards) or stay where they are. The same inputs give the same samples.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lavis_chatbridge import __version__, config
from lavis_chatbridge.config import Settings
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
    """A folder of the result."""
    licence: str
    """As the manifest states it."""
    samples: list[str] = []
    """JSONL files in the sample schema: task data, or ``accepted.jsonl``."""
    dataset: str | None = None
    """Instead of ``samples``: a public set in its own files, by the name of its row in ``configs/datasets``."""
    split: str = "train"
    """Of ``dataset``."""
    data_root: str | None = None
    """The folder of the files of ``dataset``; null as everywhere (``CHATBRIDGE_DATA``)."""
    media_root: str | None = None
    """The folder that media paths are relative to; null for the folder of each file."""
    task: str = ""
    """Selects the instruction templates of samples that name no task."""
    style: str = ""
    """The answer style of samples that name none."""
    homepage: str = ""
    limit: int | None = None
    """The most samples."""

    def check(self) -> Iterator[str]:
        if bool(self.samples) == bool(self.dataset):
            yield f"source {self.name!r} needs either samples or dataset"
        if not self.name or self.name.startswith(".") or any(sign in self.name for sign in "/\\\0"):
            yield f"{self.name!r} cannot name a folder"


class BuildSettings(Settings):
    """What is built."""

    sources: list[SourceSettings]
    media: Literal["pack", "reference"] = "pack"
    """``pack`` copies the media into tar shards, ``reference`` leaves them where they are."""
    wording: Literal["at_reading", "fixed"] = "at_reading"
    """``at_reading``: the reader samples a template in each epoch; ``fixed``: it is sampled now."""
    templates: list[str] = []
    """Further template files."""
    per_shard: int = shards.PER_SHARD
    """Samples per shard."""
    seed: int = 0
    """Samples the wordings."""
    skip_missing: bool = False
    """Leave out and count samples with missing media, instead of refusing to build."""

    def check(self) -> Iterator[str]:
        for name, count in Counter(source.name for source in self.sources).items():
            if count > 1:
                yield f"{count} sources are named {name!r}"
        if not self.sources:
            yield "sources is empty"


def load_settings(path: str | Path) -> BuildSettings:
    """Build settings from YAML; relative paths in it are relative to the file.

    Raises:
        ConfigError: With every fault.
    """
    from omegaconf import OmegaConf

    base = Path(path).parent
    values: Any = OmegaConf.to_container(config.read_yaml(path), resolve=True)
    options = config.parse(BuildSettings, values, "build")
    sources = []
    for source in options.sources:
        roots = {name: getattr(source, name) for name in ("media_root", "data_root")}
        update: dict[str, Any] = {name: str(base / root) for name, root in roots.items() if root is not None}
        sources.append(source.model_copy(update=update | {"samples": [str(base / file) for file in source.samples]}))
    templates = [str(base / file) for file in options.templates]
    return options.model_copy(update={"sources": sources, "templates": templates})


def build(options: BuildSettings, folder: str | Path) -> dict[str, Any]:
    """Build MULTIS.

    Args:
        options: The sources.
        folder: Must not exist; it appears complete or not at all.

    Returns:
        The manifest, which is also in ``manifest.json``.

    Raises:
        DataError: If the folder exists, a file is not in the schema, or media are missing (checked first).
        PromptError: If a task's templates need a question that a sample lacks.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder} exists; remove it, or build into another folder")
    absent = [str(file) for source in options.sources for file in _inputs(source) if not file.is_file()]
    if absent:
        raise DataError(f"{len(absent)} annotation files are missing: {', '.join(absent)}")
    if not options.skip_missing:
        _check_media(options)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        sources = {source.name: _build_source(source, options, unfinished / source.name) for source in options.sources}
        manifest = {
            "format": 2,
            "made_by": f"lavis-chatbridge {__version__}",
            **options.model_dump(include={"seed", "media", "wording"}),
            "samples": sum(entry["samples"] for entry in sources.values()),
            "sources": sources,
        }
        write_json(unfinished / "manifest.json", manifest)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifest


def _samples(source: SourceSettings) -> Iterator[Sample]:
    if source.dataset is not None:
        row = _row(source)
        every = iter(READERS[row.reader](row.origin(source.dataset, source.split)))
    else:
        every = itertools.chain.from_iterable(read_jsonl(file, source.media_root) for file in source.samples)
    return itertools.islice(every, source.limit)


def _row(source: SourceSettings) -> DataSettings:
    """The row of a public set.

    Raises:
        ConfigError: If there is no such row, or it is a mixture.
    """
    rows: dict[str, Any] = {}
    for file in sorted(_ROWS.glob("*.yaml")):
        rows |= dict(config.read_yaml(file).datasets)
    if source.dataset not in rows:
        raise ConfigError(config.unknown_key(str(source.dataset), rows, "datasets"))
    row = config.parse(DataSettings, {**rows[source.dataset], "data_root": source.data_root}, str(source.dataset))
    if row.reader not in READERS or source.split not in row.used_splits:
        known = ", ".join(row.used_splits) or "none"
        raise ConfigError(f"source {source.name!r}: {source.dataset} has no split {source.split!r}; it has {known}")
    return row


def _inputs(source: SourceSettings) -> list[Path]:
    """The annotation files of a source."""
    if source.dataset is None:
        return [Path(file) for file in source.samples]
    return [Path(file) for files in _row(source).files(source.split).values() for file in files]


def _check_media(options: BuildSettings) -> None:
    every = ((source.name, medium.path) for source in options.sources for s in _samples(source) for medium in s.files)
    missing = [f"{name}: {path}" for name, path in dict.fromkeys(every) if not os.path.isfile(path)]
    if missing:
        more = f" and {len(missing) - _NAMED_FAULTS} more" if len(missing) > _NAMED_FAULTS else ""
        raise DataError(
            f"{len(missing)} media are missing: {'; '.join(missing[:_NAMED_FAULTS])}{more}; correct the paths, or set "
            "skip_missing: true"
        )


def _build_source(source: SourceSettings, options: BuildSettings, folder: Path) -> dict[str, Any]:
    templates = Templates.load(*options.templates)
    if source.dataset is not None:
        row = _row(source)
        source = source.model_copy(update={"task": source.task or row.task, "style": source.style or row.style})
        if row.templates is False:
            templates = Templates({}, {})  # its questions are complete instructions already
    rng = np.random.default_rng([options.seed, *source.name.encode()])
    every = list(_samples(source))
    samples = [
        _worded(s, source, options, templates, rng) for s in every if all(os.path.isfile(m.path) for m in s.files)
    ]
    for name, count in Counter(sample.id for sample in samples).items():
        if count > 1:
            raise DataError(f"{source.name}: the id {name!r} occurs {count} times")
    if options.media == "pack":
        share = 1.0 if options.skip_missing else 0.0
        shards.write(folder, samples, "annotations", options.per_shard, max_bad_share=share)
    else:
        write_jsonl(folder / "annotations.jsonl", samples)
    tasks = Counter(sample.task or str(sample.meta.get("task", "none")) for sample in samples)
    return {
        "licence": source.licence,
        "homepage": source.homepage,
        "samples": len(samples),
        "skipped": len(every) - len(samples),
        "by_task": dict(sorted(tasks.items())),
        "by_modality": dict(sorted(Counter(sample.modality for sample in samples).items())),
        "dataset": source.dataset,
        "made_from": {file.name: hash_of_file(file) for file in _inputs(source)},
        "files": {
            f"{source.name}/{file.name}": {"bytes": file.stat().st_size, "sha256": hash_of_file(file)}
            for file in sorted(folder.iterdir())
        },
    }


def _worded(
    sample: Sample, source: SourceSettings, options: BuildSettings, templates: Templates, rng: np.random.Generator
) -> Sample:
    """The sample with its source, task and style; with ``fixed`` wording also with its request in words."""
    task, style = sample.task or source.task, sample.style or source.style
    sample = replace(sample, source=source.name, task=task, style=style)
    if task not in templates:
        if not sample.turns:
            known = ", ".join(templates.tasks)
            raise DataError(
                f"{source.name}: sample {sample.id!r} has no turns, and no template of task {task!r}; {known}"
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
    # A sample without a task is read without templates; `meta` keeps the task.
    return replace(sample, turns=turns, task="", style="", meta={**sample.meta, "task": task})
