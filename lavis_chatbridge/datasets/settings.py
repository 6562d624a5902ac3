"""The section of one data set in a configuration, typed; and the paths that it names."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lavis_chatbridge.datasets.readers import READERS, Origin
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.prompting.pieces import MODALITIES
from lavis_chatbridge.prompting.templates import Templates

DATA_VARIABLE = "CHATBRIDGE_DATA"
WORLD_PREFIX = "chatbridge_world"
"""How the names of the embedded world's data sets begin: a run makes the world first where it is not there."""
OWN_READER = "jsonl"


@dataclass
class DataSettings:
    """What a data set's section may hold; the shipped rows are in ``configs/datasets/*.yaml``."""

    reader: str = OWN_READER
    """Format of the annotation files: ``jsonl`` is our own schema."""
    stage: Literal["auto", "alignment", "instruction"] = "auto"
    """``auto``: samples with turns are instructions, those with captions alone are for alignment."""
    splits: dict[str, Any] = field(default_factory=dict)
    """Split -> its annotation files: a path (or pattern with ``*``), a list, or file's purpose -> path."""
    media: dict[str, str] = field(default_factory=dict)
    """Modality -> path under the data root with a row's fields in braces; not for ``jsonl``, which names its media."""
    data_root: str | None = None
    """The folder that all paths are relative to; null takes ``$CHATBRIDGE_DATA``, else the working directory."""
    media_root: str | None = None
    """For ``jsonl``: the folder its media paths are relative to; null takes the JSONL's own folder."""
    allow_outside: bool = False
    """Accept media outside their root."""
    skip_missing: bool = False
    """Leave samples out whose media are not there, when annotations are converted (web data sets lose addresses)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the reader; ``options.SPLIT`` may hold those of one split."""
    task: str = ""
    """Task of the samples that name none: selects the instruction templates."""
    style: str = ""
    """Answer style of the samples that name none."""
    templates: bool | list[str] = True
    """Ask through instruction templates; a list adds YAML files of your own; false uses questions as they are."""
    reply_end: str = "###"
    """What closes a reply."""
    split_modalities: bool = True
    """Make one source per modality, so that batches do not mix them."""
    limit: int | None = None
    """Use only the first so many samples of each file."""
    ratio: float | None = None
    """Share of the steps, in any unit; null: its share of the samples."""
    parts: list[str] = field(default_factory=list)
    """For a mixture: the data sets it is made of."""
    ratios: dict[str, float] = field(default_factory=dict)
    """For a mixture: share of the steps of each part."""
    vis_processor: dict[str, Any] | None = None
    """Image processors; the model's YAML has them."""
    video_processor: dict[str, Any] | None = None
    """Video processors."""
    audio_processor: dict[str, Any] | None = None
    """Audio processors."""
    text_processor: dict[str, Any] | None = None
    """Caption processors."""
    type: str = "default"
    """LAVIS's key: which default YAML; there is one."""
    data_type: str = "images"
    """LAVIS's key; means nothing here."""

    def check(self) -> Iterable[str]:
        """Contradictions between the keys."""
        if self.reader != OWN_READER and self.reader not in READERS:
            yield f"unknown reader {self.reader!r}; known are {OWN_READER}, {', '.join(READERS)}"
        for kind in self.media:
            if kind not in MODALITIES:
                yield f"media: unknown kind {kind!r}; known are {', '.join(MODALITIES)}"
        if self.reader == OWN_READER and self.media:
            yield "media is for the readers of other formats; a jsonl file names its media itself"
        yield from self._unknown_task()
        if self.limit is not None and self.limit < 1:
            yield f"limit must be at least 1, found {self.limit}"
        for name, ratio in {"ratio": self.ratio or 1.0, **self.ratios}.items():
            if not ratio > 0:
                yield f"the ratio of {name!r} must be positive, found {ratio}"
        unknown = sorted(set(self.ratios) - set(self.parts))
        if unknown:
            yield f"ratios name {', '.join(unknown)}, which parts does not"
        if not self.parts and not any(self.splits.values()):
            yield "splits is missing: name the annotation file of each split, such as {train: my.jsonl}"
        for split, entry in self.splits.items():
            if not _well_formed(entry):
                yield f"splits.{split}: expected a path, a list of paths, or purpose -> path, found {entry!r}"

    def _unknown_task(self) -> Iterable[str]:
        """A task names instruction templates, whichever stage uses them."""
        if not self.task or self.templates is False:
            return
        try:
            known = (Templates.load(*self.templates) if isinstance(self.templates, list) else Templates.default()).tasks
        except ConfigError as error:
            yield str(error)
            return
        if self.task not in known:
            near = difflib.get_close_matches(self.task[:80], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            yield f"task: no instruction template is of {self.task[:80]!r}, {hint} (templates: false takes any name)"

    @property
    def root(self) -> str:
        """The data root."""
        return str(Path(self.data_root or os.environ.get(DATA_VARIABLE) or ".").expanduser())

    def files(self, split: str) -> dict[str, str]:
        """A split's annotation files: purpose -> path under the data root; patterns become what they match."""
        entry = self.splits[split]
        if isinstance(entry, Mapping):
            return {str(role): os.path.join(self.root, path) for role, path in entry.items()}
        paths: list[str] = []
        for path in [entry] if isinstance(entry, str) else entry:
            full = os.path.join(self.root, os.path.expanduser(path))
            paths += sorted(glob.glob(full)) or [full] if "*" in path else [full]
        return {"file": paths[0]} if len(paths) == 1 else {f"file{i}": path for i, path in enumerate(paths)}

    def origin(self, name: str, split: str) -> Origin:
        """What the reader of a split is given.

        Args:
            name: The data set's name.
            split: The split.
        """
        options = {key: value for key, value in self.options.items() if key not in self.splits}
        options |= self.options.get(split) or {}
        return Origin(name, self.files(split), self.root, self.media, options, self.allow_outside)

    @property
    def used_splits(self) -> list[str]:
        """The splits that have files; a split set to null is switched off."""
        return [split for split, entry in self.splits.items() if entry]

    def missing(self) -> list[str]:
        """Every annotation file and media folder that is not there."""
        absent = [path for split in self.used_splits for path in self.files(split).values() if not os.path.isfile(path)]
        for pattern in self.media.values():
            folder = os.path.join(self.root, os.path.dirname(pattern.split("{")[0]))
            if not os.path.isdir(folder):
                absent.append(folder + os.sep)
        return list(dict.fromkeys(absent))


def _well_formed(entry: Any) -> bool:
    if isinstance(entry, Mapping):
        return all(isinstance(path, str) for path in entry.values())
    if isinstance(entry, (list, tuple)):
        return all(isinstance(path, str) for path in entry)
    return entry is None or isinstance(entry, str)
