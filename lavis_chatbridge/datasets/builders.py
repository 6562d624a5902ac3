"""LAVIS builders: one class for each data set in ``configs/datasets/*.yaml``.

These files have the default values of a data set's section: its reader, its paths under the data root, and its stage.
Annotations in other formats are converted to our schema once, into the cache folder. Only tables of the
Hugging Face hub are downloaded.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from omegaconf import DictConfig, OmegaConf

from lavis_chatbridge import config
from lavis_chatbridge.datasets.convert import converted
from lavis_chatbridge.datasets.dataset import SampleDataset, SplitDataset
from lavis_chatbridge.datasets.settings import DATA_VARIABLE, OWN_READER, WORLD_PREFIX, DataSettings, cache_folder
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.processors.base import SECTIONS, load_processors
from lavis_chatbridge.prompting.conversation import Modality
from lavis_chatbridge.schema import SampleFile

_log = logging.getLogger(__name__)

_SHARED_WITH_PARTS = ("data_root", "limit", "allow_outside", "skip_missing", "reply_end", "templates")
_FIRST = 64  # samples of a source that are compared with its settings


class ChatBridgeBuilder(BaseDatasetBuilder):
    """Builds the splits of one data set, from its section ``cfg`` merged over `DEFAULTS`."""

    NAME: ClassVar[str] = ""
    DEFAULTS: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, cfg: DictConfig | Mapping[str, Any] | str | None = None) -> None:
        if isinstance(cfg, str):
            cfg = OmegaConf.load(cfg).datasets[self.NAME]
        self.config = config.merged(OmegaConf.create(dict(self.DEFAULTS)), cfg or {})
        self.settings = _parse(self.config, f"datasets.{self.NAME}")
        self.data_type = self.settings.data_type

    @classmethod
    def check_config(cls, cfg: Mapping[str, Any], where: str) -> None:
        """Raise a `ConfigError` with every fault and missing file of a section, before anything is loaded.

        The files of the embedded world are checked later: a run may build the world first.
        """
        parsed = _parse(cfg, where)
        if not cls.NAME.startswith(WORLD_PREFIX) and (fault := _missing(where, parsed)):
            raise ConfigError(fault)

    @classmethod
    def split_names(cls, cfg: Mapping[str, Any]) -> list[str]:
        """The splits of a section's data set; a mixture has only a training split."""
        parsed = _parse(cfg, f"datasets.{cls.NAME}")
        return ["train"] if parsed.parts else parsed.used_splits

    def build_datasets(self) -> dict[str, SplitDataset]:
        """All splits; a `DataError` names all missing files."""
        if fault := _missing(f"datasets.{self.NAME}", self.settings):
            raise DataError(fault)
        return self.build()

    def build(self, splits: Iterable[str] | None = None) -> dict[str, SplitDataset]:
        """The given splits, or all."""
        if self.settings.parts:
            return {"train": self._mixture()}
        processors = load_processors(self.settings.model_dump(include={*SECTIONS.values()}, exclude_none=True))
        found = {}
        for split in self.settings.used_splits:
            if splits is None or split in splits:
                train = split == "train"
                own = {modality: both["train" if train else "eval"] for modality, both in processors.items()}
                sources = []
                for file in self._files(split):
                    numbers = np.unique(file.modality).tolist()
                    for number in sorted(numbers, key=file.modalities.__getitem__):  # a batch has one modality
                        name, indices = self.NAME, None
                        if len(numbers) > 1:
                            name += f"/{file.modalities[number]}"
                            indices = np.flatnonzero(file.modality == number)
                        sources.append(SampleDataset(name, file, self.settings, train, own, indices))
                _make_names_unique(sources)
                self._warn_of_unused_task(sources)
                found[split] = SplitDataset(self.NAME, sources, self.settings.ratio)
                sizes = ", ".join(f"{source.name} {len(source)}" for source in sources)
                _log.info("%s, split %s: %d samples (%s)", self.NAME, split, len(found[split]), sizes)
        return found

    def media_of(self, splits: Iterable[str]) -> dict[str, set[Modality]]:
        """Split -> the modalities of its media, for the given splits that exist."""
        built = self.build(splits)
        return {name: set().union(*(source.modalities for source in split.sources)) for name, split in built.items()}

    def _files(self, split: str) -> list[SampleFile]:
        """The split's samples; files in other formats are first converted to one JSONL of our schema."""
        own, cache = self.settings, cache_folder()
        if own.reader != OWN_READER:
            path = converted(self.NAME, split, own, cache / "converted")
            outside = own.allow_outside or own.reader == "huggingface"  # extracted to the cache folder
            return [SampleFile(path, own.root, outside, cache, own.limit)]
        opened = []
        for name in own.every_file(split):
            root = os.path.dirname(name) if own.media_root is None else os.path.join(own.root, own.media_root)
            opened.append(SampleFile(name, root or ".", own.allow_outside, cache, own.limit))
        return opened

    def _warn_of_unused_task(self, sources: Iterable[SampleDataset]) -> None:
        own = self.settings
        message = "%s: captions are for alignment, which ignores task: %s; set stage: instruction to use its templates"
        for source in sources:
            first = (source.sample(index) for index in range(min(len(source), _FIRST)))
            if own.stage == "auto" and own.task and not all(sample.turns for sample in first):
                _log.warning(message, source.name, own.task)

    def _mixture(self) -> SplitDataset:
        own = self.settings
        sources = []
        for name, part in _parts(own).items():
            if _is_absent(part.settings):
                _log.warning("%s: left out %s, whose files do not exist (optional: true)", self.NAME, name)
                continue
            split = part.build(["train"])["train"]
            for source in split.sources:
                source.ratio = own.ratios[name] * len(source) / len(split) if own.ratios else None
            sources += split.sources
        if not sources:
            raise DataError(f"datasets.{self.NAME}: the files of all parts are missing ({', '.join(own.parts)})")
        return SplitDataset(self.NAME, sources, own.ratio)


def _register() -> None:
    """Register a builder for every data set of ``configs/datasets/*.yaml``."""
    for path in sorted((Path(__file__).resolve().parents[1] / "configs" / "datasets").glob("*.yaml")):
        sections: Any = OmegaConf.to_container(OmegaConf.load(path))
        for name, defaults in sections["datasets"].items():
            fields = {"NAME": name, "DEFAULTS": defaults or {}, "DATASET_CONFIG_DICT": {"default": str(path)}}
            registry.register_builder(name)(type(f"{name}_builder", (ChatBridgeBuilder,), fields))


def require_files(datasets_cfg: Mapping[str, Any]) -> None:
    """Raise a `DataError` that names the missing files of all data sets in a configuration."""
    builders = {name: registry.get_builder_class(name) for name in datasets_cfg}
    own = {name: b(datasets_cfg[name]) for name, b in builders.items() if issubclass(b or object, ChatBridgeBuilder)}
    faults = (_missing(f"datasets.{name}", builder.settings) for name, builder in own.items())
    if missing := "; ".join(filter(None, faults)):
        raise DataError(missing)


def _parse(cfg: Any, where: str) -> DataSettings:
    parsed = config.parse(DataSettings, cfg, where)
    if not parsed.parts and not parsed.used_splits:
        raise ConfigError(
            f"{where}: splits is missing: name the annotation file of each split, such as {{train: my.jsonl}}"
        )
    return parsed


def _parts(own: DataSettings) -> dict[str, ChatBridgeBuilder]:
    """The builders of a mixture's parts: their defaults, overridden by the mixture's shared settings."""
    shared = own.model_dump(include={*_SHARED_WITH_PARTS, *SECTIONS.values()}, exclude_defaults=True)
    known = [n for n in registry.list_datasets() if issubclass(registry.get_builder_class(n), ChatBridgeBuilder)]
    parts = {}
    for name in own.parts:
        if name not in known:
            raise ConfigError(f"parts: {config.unknown_key(name, known, 'datasets')}")
        builder = registry.get_builder_class(name)
        complete = {"templates": False} if builder.DEFAULTS.get("templates") is False else {}  # complete instructions
        parts[name] = builder({**shared, **complete})
    return parts


def _is_absent(own: DataSettings) -> bool:
    """Whether a part of a mixture is optional and has no annotation files."""
    return own.optional and not any(map(os.path.isfile, own.every_file("train")))


def _missing(where: str, own: DataSettings) -> str:
    """The error text for missing files, with the data root and the keys that set it; "" if none is missing."""
    parts = [part.settings for part in _parts(own).values()]
    missing = own.missing() + [path for part in parts if not _is_absent(part) for path in part.missing(["train"])]
    if not missing:
        return ""
    root = f"data root {os.path.abspath(own.root)}; {where}.data_root, env.data_root or ${DATA_VARIABLE} sets another"
    files = ", ".join(dict.fromkeys(missing))
    return f"{where}: missing files or folders ({root}): {files}. docs/data.md has the layout"


def _make_names_unique(sources: list[SampleDataset]) -> None:
    """Make the sources' names unique: append the modality, or if that is not enough, the file's name."""
    counts = Counter(source.name for source in sources)
    equal = [source for source in sources if counts[source.name] > 1]
    names = [f"{source.name}/{source.sample(0).modality}" for source in equal]
    if len(set(names)) < len(names):
        names = [f"{source.name}/{Path(source.samples.path).stem}" for source in equal]
    for source, name in zip(equal, names, strict=True):
        source.name = name


_register()
