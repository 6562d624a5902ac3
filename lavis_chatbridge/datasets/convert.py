"""``chatbridge convert-data``: converts annotations of any format to our JSONL or to shards; builders use it too."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, TypeAlias

import typer

from lavis_chatbridge import config
from lavis_chatbridge.datasets import readers
from lavis_chatbridge.datasets.readers.common import object_rows
from lavis_chatbridge.datasets.readers.own import is_hub_id
from lavis_chatbridge.datasets.settings import OWN_READER, DataSettings
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.files import hash_of, locked, read_json, write_json
from lavis_chatbridge.schema import SCHEMA_VERSION, Sample, SampleFile, folder_of, read_jsonl, write_jsonl

_log = logging.getLogger(__name__)

_SPLIT = "train"

ReaderName: TypeAlias = Annotated[str | None, typer.Option(help="the format; by default detected")]
Root: TypeAlias = Annotated[str | None, typer.Option(help="the folder of relative media paths; default: the file's")]
MediaPatterns: TypeAlias = Annotated[
    list[str], typer.Option(help="image=PATTERN: where media are, with fields in braces")
]
ReaderOptions: TypeAlias = Annotated[list[str], typer.Option(help="KEY=VALUE: settings of the reader")]
AllowOutside: TypeAlias = Annotated[bool, typer.Option("--allow-outside", help="accept media outside the root")]


def converted(name: str, split: str, own: DataSettings, folder: Path) -> Path:
    """The JSONL of a split in ``folder``: converted on first use, and again if files, settings or reader change."""
    target = folder / f"{name}-{split}-{_key(name, split, own)}.jsonl"
    left_out = target.with_suffix(".left_out.json")
    with locked(target):
        if not target.exists():
            _log.info("%s, split %s: converting %s", name, split, ", ".join(own.origin(name, split).every_file))
            write_json(left_out, write_converted(name, split, own, target)[1])
    if absences := read_json(left_out):
        cause = "whose media did not exist when the annotations were converted (skip_missing)"
        _log.warning(
            "%s, split %s: left out %d samples %s; delete %s when there are more", name, split, absences, cause, target
        )
    return target


def write_converted(name: str, split: str, own: DataSettings, target: Path, root: str | None = None) -> tuple[int, int]:
    """Write a split as our JSONL; returns the numbers of samples written and left out (media missing).

    Media stored as bytes in a table are written to a tar file next to it. Paths of media below ``root`` (by default the
    data root) are written relative to it. If no sample can be used, no file is written.
    """
    from lavis_chatbridge.datasets.shards import media_file

    absent: list[str] = []

    def usable() -> Iterator[Sample]:
        count = 0
        with media_file(target.with_suffix(".tar")) as keep:  # complete before the JSONL that refers to it
            origin = own.origin(name, split, keep)
            for sample in readers.READERS[own.reader](origin):
                files = [m.path for m in sample.files if m.offset is None]  # others: in an unfinished tar
                missing = [path for path in files if own.skip_missing and not os.path.exists(path)]
                absent.extend(missing[:1])
                if not missing:
                    count += 1
                    yield sample
            if not count:
                fault, named = f"{name}, split {split}:", ", ".join(origin.every_file)
                if not absent:
                    raise DataError(f"{fault} {named} contains no sample")
                missed = f"none of the {len(absent)} samples of {named} has its media"
                raise DataError(f"{fault} {missed}; the first path is {absent[0]}")

    return write_jsonl(target, usable(), own.root if root is None else root), len(absent)


def _key(name: str, split: str, own: DataSettings) -> str:
    """A hash of all inputs of a conversion: settings, files, reader version."""
    origin = own.origin(name, split)
    also = readers.READS_TOO[own.reader](origin) if own.reader in readers.READS_TOO else None
    files = [path for path in (*origin.every_file, also) if path is not None and os.path.exists(path)]
    states = [(os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]
    made_by = (readers.VERSION, SCHEMA_VERSION, own.reader, states, {k: list(v) for k, v in origin.files.items()})
    made_with = (os.path.abspath(own.root), own.media, origin.options, own.skip_missing, own.allow_outside)
    return hash_of(made_by, made_with)[:16]


def settings_of(
    source: str,
    reader: str | None = None,
    root: str | None = None,
    media: Sequence[str] = (),
    options: Sequence[str] = (),
    allow_outside: bool = False,
) -> DataSettings:
    """The settings for existing annotations of the command line; arguments as in `command`."""
    if wrong := next((word for word in media if "=" not in word), None):
        raise ConfigError(f"--media {wrong}: expected MODALITY=PATTERN, such as image=pictures/{{file_name}}")
    values = {
        "reader": reader or recognised(source),
        "splits": {_SPLIT: source if is_hub_id(source) else os.path.abspath(source)},
        "data_root": root if root is not None else (source if os.path.isdir(source) else folder_of(source)),
        "media": dict(word.split("=", 1) for word in media),
        "options": config.read_options(options),
        "allow_outside": allow_outside,
    }
    own = config.parse(DataSettings, values, "source")
    if missing := own.missing():
        raise DataError(f"{', '.join(missing)} does not exist")
    return own


def recognised(source: str) -> str:
    """The reader of a source, from its file ending or the keys of its first row."""
    if "*" in source:
        source = min(glob.glob(source), default=source)
    ending = Path(source).suffix.lower()
    if not (os.path.exists(source) or is_hub_id(source)):
        raise DataError(f"{source} does not exist")
    if os.path.isdir(source) or ending in (".parquet", ".arrow", ".csv", ".tsv") or is_hub_id(source):
        return "huggingface"
    if ending == ".tar":
        if Path(source).with_suffix(".index.json").exists():
            own = Path(source).with_name(f"{Path(source).stem.rpartition('-')[0]}.jsonl")
            raise DataError(f"{source} is a shard of chatbridge shard: name its JSONL, {own}")
        return "webdataset"
    if ending not in (".json", ".jsonl"):
        raise ConfigError(f"{source}: the format is unknown; set it with --reader ({', '.join(readers.READERS)})")
    try:
        first = next(object_rows(source), None)
    except DataError:
        return OWN_READER
    chat = ("messages", "conversations", "instruction", "prompt")
    return "messages" if first is not None and any(key in first for key in chat) else OWN_READER


def our_jsonl(own: DataSettings, folder: Path) -> Path:
    """The source of `settings_of` as a JSONL of our schema, converted into ``folder`` if needed."""
    first, *others = own.every_file(_SPLIT)
    if own.reader == OWN_READER:
        if others:
            raise ConfigError(f"{first} and {len(others)} more: name one JSONL of our schema")
        return Path(first)
    target = folder / f"{Path(first).stem}.jsonl"
    write_converted(_SPLIT, _SPLIT, own, target)
    return target


def command(
    source: Annotated[str, typer.Argument(help="annotations: a file, a folder, or a hub id ORG/NAME")],
    target: Annotated[Path, typer.Argument(help="a .jsonl, or with --shards a folder")],
    reader: ReaderName = None,
    root: Root = None,
    media: MediaPatterns = [],  # noqa: B006
    options: ReaderOptions = [],  # noqa: B006
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="leave out samples without their media")] = False,
    allow_outside: AllowOutside = False,
    shards: Annotated[bool, typer.Option("--shards", help="write shards with the media instead")] = False,
) -> None:
    """Write annotations of any format as our JSONL, or as shards."""
    from lavis_chatbridge.datasets.shards import write

    own = settings_of(source, reader, root, media, options, allow_outside)
    own = own.model_copy(update={"skip_missing": skip_missing})
    if shards:
        with TemporaryDirectory() as temporary:
            path = our_jsonl(own, Path(temporary))
            print(write(target, SampleFile(path, own.root, allow_outside or own.reader != OWN_READER), path.stem))
        return
    if own.reader == OWN_READER:
        raise ConfigError(f"{source} is a JSONL of our schema already; --shards writes it as shards")
    tar = [target.with_suffix(".tar")] if own.reader == "huggingface" else []  # for media that a table contains
    if taken := [path for path in (target, *tar) if path.exists()]:
        raise ConfigError(f"{taken[0]} exists: name a new file")
    written, left_out = write_converted(_SPLIT, _SPLIT, own, target, root=str(target.parent))
    text = f"{target}: {written} samples, left out {left_out} without their media"
    folder = os.path.abspath(target.parent)
    paths = (os.path.abspath(m.path) for sample in read_jsonl(target, allow_outside=True) for m in sample.files)
    if any(os.path.commonpath([folder, path]) != folder for path in paths):
        text += f"; media are outside {folder}: use it with --allow-outside, or allow_outside: true in its section"
    print(text)
