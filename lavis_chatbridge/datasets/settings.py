"""The section of one data set in a configuration, and the paths that it names."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, field_validator

from lavis_chatbridge.config import Settings, hint, shown, unknown_key
from lavis_chatbridge.datasets.readers import OPTIONS, READERS
from lavis_chatbridge.datasets.readers.common import Origin
from lavis_chatbridge.datasets.readers.own import is_hub_id
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.prompting.conversation import Modality
from lavis_chatbridge.prompting.templates import Templates
from lavis_chatbridge.schema import Medium

DATA_VARIABLE = "CHATBRIDGE_DATA"
WORLD_PREFIX = "chatbridge_world"
"""Name prefix of the embedded world's data sets; a run builds the world if it does not exist."""
OWN_READER = "jsonl"
Files: TypeAlias = str | list[str] | None
Share: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DataSettings(Settings):
    """The keys of a data set's section; those of the shipped data sets are in ``configs/datasets/*.yaml``."""

    reader: str = OWN_READER
    """Format of the annotation files: ``jsonl`` is our own schema."""
    stage: Literal["auto", "alignment", "instruction"] = "auto"
    """``auto``: samples with turns are for instruction tuning, samples with only captions for alignment."""
    splits: dict[str, Files | dict[str, Files]] = {}
    """Split -> its annotation files: a path, a pattern with ``*``, a list of these, or a mapping purpose -> these."""
    media: dict[Modality, str] = {}
    """Modality -> path below the data root, with fields of an annotation in braces; not for ``jsonl``."""
    data_root: str | None = None
    """The folder that all paths are relative to; null means ``$CHATBRIDGE_DATA``, or else the working directory."""
    media_root: str | None = None
    """For ``jsonl``: the folder that its media paths are relative to; null means the JSONL's own folder."""
    allow_outside: bool = False
    """Accept media outside their root."""
    skip_missing: bool = False
    """Leave out samples whose media do not exist when annotations are converted (URLs of web data sets expire)."""
    options: dict[str, Any] = {}
    """The reader's settings; ``options.SPLIT`` has those of one split."""
    task: str = ""
    """Task of samples that have none; selects the instruction templates."""
    style: str = ""
    """Answer style of samples that have none."""
    templates: bool | list[str] = True
    """Put questions into instruction templates; a list adds your own YAML files; false leaves questions unchanged."""
    reply_end: str = "###"
    """The text that ends a reply."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only the first samples of each file."""
    ratio: Share | None = None
    """Share of the steps, in any unit; null: its share of the samples."""
    parts: list[str] = []
    """For a mixture: the names of its data sets."""
    ratios: dict[str, Share] = {}
    """For a mixture: each part's share of the steps."""
    optional: bool = False
    """In a mixture: skip this part, with a warning, if its annotation files do not exist."""
    vis_processor: dict[str, Any] | None = None
    """Image processors; by default the model's."""
    video_processor: dict[str, Any] | None = None
    """Video processors; by default the model's."""
    audio_processor: dict[str, Any] | None = None
    """Audio processors; by default the model's."""
    text_processor: dict[str, Any] | None = None
    """Caption processors; by default the model's."""
    type: str = "default"
    """LAVIS's key for variants of a default YAML; has no effect here, because there is only one."""
    data_type: str = "images"
    """LAVIS's key; has no effect here."""

    @field_validator("splits", "media", "options", "ratios", mode="before")
    @classmethod
    def _null_is_empty(cls, value: Any) -> Any:
        """Null removes the shipped values of this key."""
        return {} if value is None else value

    def check(self) -> Iterable[str]:
        """Yields contradictions between keys."""
        if self.reader not in (known := [OWN_READER, *READERS]):
            yield f"unknown reader {self.reader!r}{hint(self.reader, known)}"
        if self.reader == OWN_READER and self.media:
            yield "media is for readers of other formats; a jsonl file contains the paths of its media"
        yield from self._faulty_options()
        templates = self.instruction_templates() if self.task else None
        if templates is not None and self.task not in templates.tasks:
            nearest = hint(self.task, templates.tasks)
            yield f"task {self.task!r} has no instruction template{nearest} (templates: false accepts any name)"
        if self.ratios and (odd := sorted({*self.ratios} ^ {*self.parts})):
            yield f"ratios names all parts or none, but {', '.join(odd)} is in only one of both"

    def _faulty_options(self) -> Iterator[str]:
        """Yields the options that the reader does not have, also among those of one split."""
        if (known := OPTIONS.get(self.reader)) is None:  # a reader of your own
            return
        common = {key: value for key, value in self.options.items() if key not in self.splits}
        by_split = {f"options.{split}": self.options.get(split) or {} for split in self.splits}
        for where, options in {"options": common, **by_split}.items():
            if not isinstance(options, Mapping):
                yield f"{where}: expected a mapping, the options of this split, found {shown(options)}"
                continue
            for key in sorted({*options} - {*known}):
                none = f"unknown key {where}.{key}: reader {self.reader} has no options"
                yield unknown_key(key, known, where) if known else none

    def instruction_templates(self) -> Templates | None:
        """The instruction templates; None to use questions unchanged."""
        if isinstance(self.templates, list):
            return Templates.load(*self.templates)
        return Templates.load() if self.templates else None

    @property
    def root(self) -> str:
        return str(Path(self.data_root or os.environ.get(DATA_VARIABLE) or ".").expanduser())

    @property
    def used_splits(self) -> list[str]:
        """The splits that have files; a null split is switched off."""
        return [split for split, entry in self.splits.items() if entry]

    def files(self, split: str) -> dict[str, list[str]]:
        """A split's annotation files: purpose (``"file"`` by default) -> paths below the data root.

        Patterns are expanded, and purposes that are null left out.
        """
        entry = self.splits[split]
        purposes = entry if isinstance(entry, Mapping) else {"file": entry}
        found = {str(purpose): self._paths(entry) for purpose, entry in purposes.items() if entry}
        for paths in found.values():
            if twice := [path for i, path in enumerate(paths) if path in paths[:i]]:
                raise ConfigError(f"splits.{split} names {twice[0]} twice: name each file once")
        return found

    def every_file(self, split: str) -> list[str]:
        return [path for paths in self.files(split).values() for path in paths]

    def _paths(self, entry: str | list[str]) -> list[str]:
        paths: list[str] = []
        for path in [entry] if isinstance(entry, str) else entry:
            full = os.path.normpath(os.path.join(self.root, os.path.expanduser(path)))
            if "*" in path:
                paths += sorted(glob.glob(full)) or [full]
            else:
                on_hub = self.reader == "huggingface" and not os.path.isdir(os.path.dirname(full)) and is_hub_id(path)
                paths.append(path if on_hub else full)
        return paths

    def origin(self, name: str, split: str, keep: Callable[[Modality, bytes, str], Medium] | None = None) -> Origin:
        """The reader's input for one split; see `Origin` for ``keep``."""
        options = {key: value for key, value in self.options.items() if key not in self.splits}
        options |= self.options.get(split) or {}
        if self.reader == "huggingface":
            options.setdefault("split", split)
        return Origin(name, self.files(split), self.root, self.media, options, self.allow_outside, keep)

    def missing(self, splits: Iterable[str] | None = None) -> list[str]:
        """The annotation files of some splits (default: all) and the media folders, as far as they do not exist."""
        files = [path for split in splits or self.used_splits for path in self.every_file(split)]
        tables = self.reader == "huggingface"
        absent = [p for p in files if not (os.path.isfile(p) or (tables and (os.path.isdir(p) or is_hub_id(p))))]
        folders = [os.path.join(self.root, os.path.dirname(path.split("{")[0])) for path in self.media.values()]
        absent += [os.path.normpath(folder) + os.sep for folder in folders if not os.path.isdir(folder)]
        return list(dict.fromkeys(absent))


def cache_folder() -> Path:
    """``$CHATBRIDGE_CACHE``, or by default ``lavis-chatbridge`` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lavis-chatbridge")
    return Path(os.environ.get("CHATBRIDGE_CACHE") or default).expanduser()
