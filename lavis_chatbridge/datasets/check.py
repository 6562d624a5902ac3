"""``chatbridge check-data FILE``: checks annotations and counts their samples.

Reads every sample and checks that every medium exists (``--decode``: opens it). Continues after faults: counts them by
cause and shows the first ones of each cause with their positions. Only a conversion from another format ends at its
first fault.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, TypeAlias

import typer

from lavis_chatbridge import schema
from lavis_chatbridge.datasets import convert
from lavis_chatbridge.datasets.convert import AllowOutside, MediaPatterns, ReaderName, ReaderOptions, Root
from lavis_chatbridge.datasets.readers.common import stem_of
from lavis_chatbridge.datasets.settings import OWN_READER
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.files import read_lines
from lavis_chatbridge.prompting.conversation import Modality
from lavis_chatbridge.schema import Medium, Sample, check_inside, folder_of, parse_line, read_jsonl

_SHOWN = 5
_RATE = 16_000  # of opened sounds, in Hz
_MALFORMED, _DUPLICATE, _EMPTY = "malformed line", "duplicate id", "empty text"
_MISSING, _UNREADABLE, _OUTSIDE = "missing medium", "unreadable medium", "medium outside the root"
_OVERLONG, _MOST_TOKENS = "overlong text", 512
_SAME_CONTENT, _SAME_NAME = "medium of the evaluation data, by content", "medium of the evaluation data, by name"
_WARNINGS = (_OVERLONG, _EMPTY, _SAME_NAME)
_Fault: TypeAlias = tuple[str, str] | None  # cause and message


@dataclass
class Report:
    """Numbers of samples by modality, task and data set; of distinct media by modality; of faults by cause.

    A sample without a task is counted as ``captions`` or ``conversation``. ``examples`` has the first faults per cause.
    """

    lines: int = 0
    modalities: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    media: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def usable(self) -> bool:
        """Whether training can use the data. Overlong and empty texts and equal names are only warnings."""
        return self.lines > 0 and set(self.faults) <= set(_WARNINGS)

    def add_fault(self, cause: str, example: str) -> None:
        """Count a fault, and keep it as an example if it is one of the first."""
        self.faults[cause] += 1
        if self.faults[cause] <= _SHOWN:
            self.examples[cause].append(example)

    def as_text(self, path: str) -> str:
        lines = [f"{path}: {self.lines} samples"]
        groups = {"modality": self.modalities, "task": self.tasks, "source": self.sources, "files": self.media}
        for title, counts in groups.items():
            lines += [f"  {title:<10}{name:<32}{count:>12}" for name, count in sorted(counts.items())]
        for cause, count in sorted(self.faults.items()):
            lines.append(f"  {'warning' if cause in _WARNINGS else 'FAULT'}: {cause}: {count}")
            lines += [f"      {example}" for example in self.examples[cause]]
            if count > _SHOWN:
                lines.append(f"      ... and {count - _SHOWN} more")
        if not self.lines:
            lines.append("  FAULT: the file has no sample")
        return "\n".join([*lines, "usable" if self.usable else "NOT usable"])


def check_file(
    path: str | Path,
    root: str | Path | None = None,
    decode: bool = False,
    allow_outside: bool = False,
    against: Iterable[Sample] = (),
) -> Report:
    """Check a JSONL file of our schema; a `DataError` if the file itself cannot be read. Arguments as in `command`."""
    base, report, ids = folder_of(path, root), Report(), set()
    media = _Media(None if allow_outside else base, decode, against)
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        report.lines += 1
        try:
            sample = parse_line(line, where, base, allow_outside)
        except DataError as error:
            report.add_fault(_MALFORMED, str(error))
            continue
        if (key := hash((sample.source, sample.id))) in ids:
            report.add_fault(_DUPLICATE, f"{where}: an earlier sample has the id {sample.id!r}")
        ids.add(key)
        report.modalities[sample.modality] += 1
        report.tasks[sample.task or ("conversation" if sample.turns else "captions")] += 1
        if sample.source:
            report.sources[sample.source] += 1
        said = [turn.text for turn in sample.turns]
        longest = max(sum(map(len, said)), *map(len, sample.captions), 0)
        if (tokens := longest // schema.CHARACTERS_PER_TOKEN) > _MOST_TOKENS:
            report.add_fault(_OVERLONG, f"{where}: {longest} characters, about {tokens} tokens")
        if not all(text.strip() for text in (*sample.captions, *said)):
            report.add_fault(_EMPTY, f"{where}: a caption or turn is empty")
        media.check(report, sample, where)
    return report


class _Media:
    """Checks each medium once, and compares it with the media of evaluation data."""

    def __init__(self, root: str | None, decode: bool, against: Iterable[Sample]) -> None:
        self._root, self._decode = root, decode
        self._known: dict[Medium, _Fault] = {}
        self._names: dict[tuple[Modality, str], str] = {}
        self._sizes: dict[int, list[Medium]] = defaultdict(list)
        for medium in dict.fromkeys(medium for sample in against for medium in sample.files):
            if medium.offset is None:
                self._names.setdefault(_name(medium), medium.path)
            if size := _size(medium):
                self._sizes[size].append(medium)

    def check(self, report: Report, sample: Sample, where: str) -> None:
        """Count the media of a sample and their faults."""
        for medium in sample.files:
            if medium not in self._known:
                report.media[medium.modality] += 1
                self._known[medium] = self._fault(medium)
                if shared := self._shared(medium):
                    report.add_fault(shared[0], f"{where}: {medium.path} is {shared[1]}")
            if fault := self._known[medium]:
                report.add_fault(fault[0], f"{where}: {fault[1]}")

    def _fault(self, medium: Medium) -> _Fault:
        try:
            size = os.stat(medium.path).st_size
        except OSError as error:
            return _MISSING, f"{medium.path}: {error.strerror}"
        if size == 0:
            return _UNREADABLE, f"{medium.path}: the file is empty"
        if size < (medium.offset or 0) + (medium.size or 0):
            return _UNREADABLE, f"{medium.path}: {size} bytes are too few"
        if self._root is not None:
            try:
                check_inside(medium.path, self._root)
            except DataError as error:
                return _OUTSIDE, str(error)
        if self._decode:
            try:
                _open(medium)
            except MediaError as error:
                return _UNREADABLE, re.sub(r"^cannot read ", "", str(error))
        return None

    def _shared(self, medium: Medium) -> _Fault:
        """Cause and path of an evaluation medium with the same content, else with the same name (without ending)."""
        if equal := self._sizes.get(_size(medium), []):
            from lavis_chatbridge.datasets.features import content_hash

            own = content_hash(medium)
            for other in equal:
                if content_hash(other) == own:
                    return _SAME_CONTENT, other.path
        if medium.offset is None and _name(medium) in self._names:
            return _SAME_NAME, self._names[_name(medium)]
        return None


def _name(medium: Medium) -> tuple[Modality, str]:
    return medium.modality, stem_of(os.path.basename(medium.path))


def _size(medium: Medium) -> int:
    """Size of a medium in bytes; 0 if it does not exist."""
    if medium.size is None:
        return os.path.getsize(medium.path) if os.path.exists(medium.path) else 0
    return medium.size


def _open(medium: Medium) -> None:
    from lavis_chatbridge import media
    from lavis_chatbridge.datasets.dataset import media_content
    from lavis_chatbridge.media.audio import require_length

    content = media_content(medium)
    if medium.modality == "image":
        media.open_image(content)
    elif medium.modality == "video":
        media.open_video(content, lambda count: sorted({0, count // 2, count - 1}))
    else:
        require_length(content, media.open_audio(content, _RATE), _RATE)


def command(
    file: Annotated[str, typer.Argument(help="annotations: a file, a folder of media, or a hub id ORG/NAME")],
    reader: ReaderName = None,
    root: Root = None,
    media: MediaPatterns = [],  # noqa: B006
    options: ReaderOptions = [],  # noqa: B006
    decode: Annotated[bool, typer.Option("--decode", help="open every medium")] = False,
    allow_outside: AllowOutside = False,
    against: Annotated[list[str], typer.Option(help="evaluation data that must not share media; repeatable")] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> int:
    """Check annotations, and count their samples."""
    with TemporaryDirectory() as folder:
        other: list[Sample] = []
        for number, path in enumerate(against):
            one = convert.settings_of(path, allow_outside=True)
            other += read_jsonl(convert.our_jsonl(one, Path(folder, str(number))), one.root, allow_outside=True)
        own = convert.settings_of(file, reader, root, media, options, allow_outside)
        jsonl = convert.our_jsonl(own, Path(folder, "data"))
        report = check_file(jsonl, own.root, decode, allow_outside or own.reader != OWN_READER, other)
    print(json.dumps({"usable": report.usable, **vars(report)}, indent=1) if as_json else report.as_text(file))
    return 0 if report.usable else 1
