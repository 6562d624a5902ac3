"""``chatbridge check-data FILE``: checks annotations and counts their samples.

Every sample is read and every medium is looked up (``--decode``: opened). The check continues after faults: it counts
them by cause and shows the first of each with their positions.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from lavis_chatbridge.datasets.files import CHARACTERS_PER_TOKEN
from lavis_chatbridge.datasets.readers.common import stem_of
from lavis_chatbridge.datasets.settings import OWN_READER
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.files import read_lines
from lavis_chatbridge.prompting.pieces import Modality
from lavis_chatbridge.schema import Medium, Sample, check_inside, folder_of, parse_line, read_jsonl

_SHOWN = 5
_MALFORMED, _DUPLICATE, _MISSING = "malformed line", "duplicate id", "missing medium"
_UNREADABLE, _OUTSIDE, _OVERLONG, _EMPTY = "unreadable medium", "medium outside the root", "overlong text", "empty text"
_SAME_CONTENT, _SAME_NAME = "medium of the evaluation data, by content", "medium of the evaluation data, by name"
_WARNINGS = (_OVERLONG, _EMPTY, _SAME_NAME)
_Fault: TypeAlias = "tuple[str, str] | None"  # cause and message


@dataclass
class Report:
    """The result of a check.

    Attributes:
        lines: Samples and faulty lines together.
        modalities: Modality -> samples.
        tasks: Task -> samples; ``captions`` and ``conversation`` for samples without a task.
        sources: Source -> samples.
        media: Modality -> distinct files.
        faults: Cause -> number of faults.
        examples: Cause -> the first few, with their position.
    """

    lines: int = 0
    modalities: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    media: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        """Whether training can use the data. Overlong texts, empty texts and equal names are only warnings."""
        return self.lines > 0 and not any(count for cause, count in self.faults.items() if cause not in _WARNINGS)

    def add_fault(self, cause: str, example: str) -> None:
        """Count a fault, and keep it as an example if it is one of the first."""
        self.faults[cause] += 1
        if self.faults[cause] <= _SHOWN:
            self.examples.setdefault(cause, []).append(example)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        counts = {name: dict(getattr(self, name)) for name in ("modalities", "tasks", "sources", "media", "faults")}
        return {"usable": self.usable, "lines": self.lines, **counts, "examples": self.examples}

    def as_text(self, path: str) -> str:
        """For people."""
        lines = [f"{path}: {self.lines} samples"]
        groups = {"modality": self.modalities, "task": self.tasks, "source": self.sources, "files": self.media}
        for title, counts in groups.items():
            lines += [f"  {title:<10}{name:<32}{count:>12}" for name, count in sorted(counts.items())]
        for cause, count in sorted(self.faults.items()):
            lines.append(f"  {'warning' if cause in _WARNINGS else 'FAULT'}: {cause}: {count}")
            lines += [f"      {example}" for example in self.examples[cause]]
            if count > len(self.examples[cause]):
                lines.append(f"      ... and {count - len(self.examples[cause])} more")
        if not self.lines:
            lines.append("  FAULT: there is no sample in it")
        return "\n".join([*lines, "usable" if self.usable else "NOT usable"])


def check_file(
    path: str | Path,
    root: str | Path | None = None,
    decode: bool = False,
    allow_outside: bool = False,
    max_tokens: int = 512,
    against: Iterable[Sample] = (),
) -> Report:
    """Check a JSONL file of our schema.

    Args:
        path: The file.
        root: The folder that media paths are relative to; by default the file's own.
        decode: Open every medium.
        allow_outside: Accept media outside the root.
        max_tokens: Longer texts (at 4 characters per token) are reported; training would truncate them.
        against: Evaluation data; shared media are reported.

    Raises:
        DataError: If the file itself cannot be read.
    """
    base = folder_of(path, root)
    check = _Check(base, decode, allow_outside, max_tokens, against)
    for number, line in read_lines(path):
        if line.strip():
            where = f"{path}:{number}"
            try:
                check.sample(parse_line(line, where, base, allow_outside), where)
            except DataError as error:
                check.report.lines += 1
                check.report.add_fault(_MALFORMED, str(error))
    return check.report


class _Check:
    """Collects the faults of samples; each medium is checked once."""

    def __init__(
        self, root: str, decode: bool, allow_outside: bool, max_tokens: int, against: Iterable[Sample] = ()
    ) -> None:
        self.report = Report()
        self._root, self._decode, self._allow_outside, self._max_tokens = root, decode, allow_outside, max_tokens
        self._seen: set[int] = set()
        self._known: dict[Medium, _Fault] = {}
        self._folders: dict[str, bool] = {}
        self._evaluation = EvaluationMedia(against)

    def sample(self, sample: Sample, where: str) -> None:
        """Count a sample and its faults."""
        report = self.report
        report.lines += 1
        key = hash((sample.source, sample.id))
        if key in self._seen:
            report.add_fault(_DUPLICATE, f"{where}: an earlier sample has the id {sample.id!r}")
        self._seen.add(key)
        report.modalities[sample.modality] += 1
        report.tasks[sample.task or ("conversation" if sample.turns else "captions")] += 1
        if sample.source:
            report.sources[sample.source] += 1
        self._texts(sample, where)
        for medium in sample.files:
            if medium not in self._known:
                report.media[medium.modality] += 1
                self._known[medium] = self._outside(medium.path) or _fault_of(medium, self._decode)
                if shared := self._evaluation.shared(medium):
                    report.add_fault(shared[0], f"{where}: {medium.path} is {shared[1]}")
            if (fault := self._known[medium]) is not None:
                report.add_fault(fault[0], f"{where}: {fault[1]}")

    def _texts(self, sample: Sample, where: str) -> None:
        said = [turn.text for turn in sample.turns]
        longest = max(len("".join(said)), *map(len, sample.captions), 0)
        if longest > self._max_tokens * CHARACTERS_PER_TOKEN:
            tokens = longest // CHARACTERS_PER_TOKEN
            self.report.add_fault(_OVERLONG, f"{where}: {longest} characters, about {tokens} tokens")
        for text in (*sample.captions, *said):
            if not text or text.isspace():
                self.report.add_fault(_EMPTY, f"{where}: a caption or turn is empty")

    def _outside(self, path: str) -> _Fault:
        """The fault if links lead out of the root, else None; folders without links are resolved once."""
        if self._allow_outside:
            return None
        folder = os.path.dirname(path)
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder) == os.path.abspath(folder)
        if self._folders[folder] and not os.path.islink(path):
            return None
        try:
            check_inside(path, self._root)
        except DataError as error:
            return _OUTSIDE, str(error)
        return None


class EvaluationMedia:
    """The media of evaluation data, to find the same ones in training data."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        from lavis_chatbridge.datasets.features import Digests, distinct_media

        self._digests = Digests()
        self._names: dict[tuple[Modality, str], str] = {}
        self._sizes: dict[int, list[Medium]] = {}
        for medium in distinct_media(samples):
            if medium.offset is None:
                self._names.setdefault(_name(medium), medium.path)
            if (size := _size(medium)) > 0:
                self._sizes.setdefault(size, []).append(medium)

    def shared(self, medium: Medium) -> _Fault:
        """Cause and path of an evaluation medium with the same content, or else the same name without ending."""
        for other in self._sizes.get(_size(medium), ()) if self._sizes else ():
            if self._digests.of(other) == self._digests.of(medium):
                return _SAME_CONTENT, other.path
        if medium.offset is None and _name(medium) in self._names:
            return _SAME_NAME, self._names[_name(medium)]
        return None


def command(
    file: Annotated[str, typer.Argument(help="annotations: a file, a folder of media, or a hub id ORG/NAME")],
    reader: Annotated[str | None, typer.Option(help="the format; by default detected")] = None,
    root: Annotated[str | None, typer.Option(help="the folder of relative media paths; default: the file's")] = None,
    media: Annotated[list[str], typer.Option(help="image=PATTERN: where media are, with fields in braces")] = [],  # noqa: B006
    options: Annotated[list[str], typer.Option(help="KEY=VALUE: settings of the reader")] = [],  # noqa: B006
    decode: Annotated[bool, typer.Option("--decode", help="open every medium")] = False,
    allow_outside: Annotated[bool, typer.Option("--allow-outside", help="accept media outside the root")] = False,
    against: Annotated[list[str], typer.Option(help="evaluation data that must not share media; repeatable")] = [],  # noqa: B006
    max_tokens: Annotated[int, typer.Option(help="longest text")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> int:
    """Check annotations, and count their samples."""
    from tempfile import TemporaryDirectory

    from lavis_chatbridge.datasets import convert

    with TemporaryDirectory() as folder:
        other: list[Sample] = []
        for number, path in enumerate(against):
            one = convert.settings_of(path, None, None, [], [], True)
            other += read_jsonl(convert.our_jsonl(one, Path(folder, str(number))), one.root, allow_outside=True)
        own = convert.settings_of(file, reader, root, media, options, allow_outside)
        try:
            jsonl = convert.our_jsonl(own, Path(folder, "data"))
        except DataError as error:
            if own.missing():
                raise
            report = Report()
            report.add_fault(_MALFORMED, str(error))
        else:
            outside = allow_outside or own.reader != OWN_READER
            report = check_file(jsonl, own.root, decode, outside, max_tokens, other)
    print(json.dumps(report.as_dict(), indent=1) if as_json else report.as_text(file))
    return 0 if report.usable else 1


def _name(medium: Medium) -> tuple[Modality, str]:
    return medium.modality, stem_of(os.path.basename(medium.path))


def _size(medium: Medium) -> int:
    """Bytes of a medium; -1 if it is absent."""
    if medium.size is not None:
        return medium.size
    try:
        return os.stat(medium.path).st_size
    except OSError:
        return -1


def _fault_of(medium: Medium, decode: bool) -> _Fault:
    try:
        size = os.stat(medium.path).st_size
    except OSError as error:
        return _MISSING, f"{medium.path}: {error.strerror}"
    if size == 0 or (medium.offset is not None and size < medium.offset + (medium.size or 0)):
        return _UNREADABLE, f"{medium.path}: {size} bytes are too few"
    if not decode:
        return None
    from lavis_chatbridge import media
    from lavis_chatbridge.datasets.dataset import media_content

    try:
        source = media_content(medium)
        if medium.modality == "image":
            media.open_image(source)
        elif medium.modality == "video":
            media.open_video(source, lambda count: sorted({0, count // 2, count - 1}))
        else:
            media.open_audio(source)
    except MediaError as error:
        return _UNREADABLE, re.sub(r"^cannot read ", "", str(error))
    return None
