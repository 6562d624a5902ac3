"""``chatbridge check-data FILE``: is a JSONL of our schema usable, and what is in it?

Every line is read, every medium looked for (``--decode``: opened), nothing is kept but counts. Faults do not end the
check: all are counted by cause, the first of each are shown with their line.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavis_chatbridge.datasets.files import CHARACTERS_PER_TOKEN
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.schema import Medium, Sample, check_inside, parse_line

_SHOWN = 5
_MALFORMED, _DUPLICATE, _MISSING = "malformed line", "duplicate id", "missing medium"
_UNREADABLE, _OUTSIDE, _OVERLONG, _EMPTY = "unreadable medium", "medium outside the root", "overlong text", "empty text"
_WARNINGS = (_OVERLONG, _EMPTY)


@dataclass
class Report:
    """What a check found.

    Attributes:
        lines: Samples and faulty lines together.
        modalities: Modality -> samples.
        tasks: Task -> samples; ``captions`` and ``conversation`` where a sample names none.
        sources: Source -> samples.
        media: Modality -> distinct files.
        faults: Cause -> how often.
        examples: Cause -> the first few, with their line.
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
        """Whether training can use the file: overlong and empty texts are warnings, all else is not."""
        return self.lines > 0 and not any(count for cause, count in self.faults.items() if cause not in _WARNINGS)

    def add_fault(self, cause: str, example: str) -> None:
        """Count a fault and keep it if it is among the first."""
        self.faults[cause] += 1
        kept = self.examples.setdefault(cause, [])
        if len(kept) < _SHOWN:
            kept.append(example)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        counts = {name: dict(getattr(self, name)) for name in ("modalities", "tasks", "sources", "media", "faults")}
        return {"usable": self.usable, "lines": self.lines, **counts, "examples": self.examples}

    def as_text(self, path: str) -> str:
        """For people."""
        lines = [f"{path}: {self.lines} samples"]
        for title, counts in (("modality", self.modalities), ("task", self.tasks), ("source", self.sources)):
            lines += [f"  {title:<10}{name:<32}{count:>12}" for name, count in sorted(counts.items())]
        lines += [f"  {'files':<10}{name:<32}{count:>12}" for name, count in sorted(self.media.items())]
        for cause, count in sorted(self.faults.items()):
            lines.append(f"  {'warning' if cause in _WARNINGS else 'FAULT'}: {cause}: {count}")
            lines += [f"      {example}" for example in self.examples[cause]]
            if count > len(self.examples[cause]):
                lines.append(f"      ... and {count - len(self.examples[cause])} more")
        lines.append("usable" if self.usable else "NOT usable")
        return "\n".join(lines)


def check_file(
    path: str | Path,
    root: str | Path | None = None,
    decode: bool = False,
    allow_outside: bool = False,
    max_tokens: int = 512,
) -> Report:
    """Check a JSONL file.

    Args:
        path: The file.
        root: The folder that media paths are relative to; without it the file's own.
        decode: Open every medium instead of looking whether it is there.
        allow_outside: Accept media outside the root.
        max_tokens: Longer texts (at about 4 characters a token) are reported; training would cut them.

    Raises:
        DataError: If the file itself cannot be read.
    """
    base = str(root) if root is not None else (os.path.dirname(str(path)) or ".")
    media = _MediaCheck(base, decode, allow_outside)
    report = Report()
    seen: set[int] = set()
    for number, line in _lines(path):
        report.lines += 1
        where = f"{path}:{number}"
        try:
            sample = parse_line(line, where, base, allow_outside)
        except DataError as error:
            report.add_fault(_MALFORMED, str(error))
            continue
        key = hash((sample.source, sample.id))
        if key in seen:
            report.add_fault(_DUPLICATE, f"{where}: id {sample.id!r} stands in an earlier line")
        seen.add(key)
        _count(report, sample)
        _check_texts(report, sample, where, max_tokens)
        for medium in sample.files:
            fault = media(medium)
            if fault is not None:
                report.add_fault(fault[0], f"{where}: {fault[1]}")
    report.media = media.files
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``chatbridge check-data``."""
    parser.add_argument("file", type=Path, help="a JSONL file (docs/data.md has the schema)")
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="what media paths are relative to; default: its folder"
    )
    parser.add_argument("--decode", action="store_true", help="open every medium, not only look whether it is there")
    parser.add_argument("--allow-outside", action="store_true", help="accept media outside the root")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="longest text (default 512)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """``chatbridge check-data``: 0 if the file is usable, 1 if not."""
    report = check_file(args.file, args.root, args.decode, args.allow_outside, args.max_tokens)
    print(json.dumps(report.as_dict(), indent=1) if args.json else report.as_text(str(args.file)))
    return 0 if report.usable else 1


class _MediaCheck:
    """Looks at every medium once, and remembers what was found."""

    def __init__(self, root: str, decode: bool, allow_outside: bool) -> None:
        self.files: Counter[str] = Counter()
        self._root, self._allow_outside = root, allow_outside
        self._look: Callable[[Medium], tuple[str, str] | None] = _decoded if decode else _present
        self._known: dict[tuple, tuple[str, str] | None] = {}
        self._folders: dict[str, bool] = {}

    def __call__(self, medium: Medium) -> tuple[str, str] | None:
        """Cause and message of what is wrong with a medium; None if nothing is."""
        key = (medium.kind, medium.path) if medium.offset is None else (medium.kind, medium.path, medium.offset)
        if key not in self._known:
            self.files[medium.kind] += 1
            self._known[key] = self._outside(medium.path) or self._look(medium)
        return self._known[key]

    def _outside(self, path: str) -> tuple[str, str] | None:
        """Whether links lead out of the root; a folder without a link in its path is looked at once."""
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


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _count(report: Report, sample: Sample) -> None:
    report.modalities[sample.modality] += 1
    report.tasks[sample.task or ("conversation" if sample.turns else "captions")] += 1
    if sample.source:
        report.sources[sample.source] += 1


def _check_texts(report: Report, sample: Sample, where: str, max_tokens: int) -> None:
    texts = [*sample.captions, *[turn.text for turn in sample.turns]]
    longest = max(sum([len(turn.text) for turn in sample.turns]), max(map(len, sample.captions), default=0))
    if longest > max_tokens * CHARACTERS_PER_TOKEN:
        report.add_fault(_OVERLONG, f"{where}: {longest} characters, about {longest // CHARACTERS_PER_TOKEN} tokens")
    for text in texts:
        if not text or text.isspace():
            report.add_fault(_EMPTY, f"{where}: a caption or turn says nothing")


def _present(medium: Medium) -> tuple[str, str] | None:
    try:
        size = os.stat(medium.path).st_size
    except OSError as error:
        return _MISSING, f"{medium.path}: {error.strerror}"
    if size == 0 or (medium.offset is not None and size < medium.offset + (medium.size or 0)):
        return _UNREADABLE, f"{medium.path}: {size} bytes are too few"
    return None


def _decoded(medium: Medium) -> tuple[str, str] | None:
    fault = _present(medium)
    if fault is not None:
        return fault
    from lavis_chatbridge import media
    from lavis_chatbridge.datasets.dataset import media_source

    try:
        source = media_source(medium)
        if medium.kind == "image":
            media.open_image(source)
        elif medium.kind == "video":
            media.open_video(source, lambda count: sorted({0, count // 2, count - 1}))
        else:
            media.open_audio(source)
    except MediaError as error:
        return _UNREADABLE, re.sub(r"^cannot read ", "", str(error))
    return None
