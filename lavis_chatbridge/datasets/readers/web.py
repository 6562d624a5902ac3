"""Readers of picture and text pairs from the web (CC3M, CC12M, SBU, LAION): tables, JSON lists, webdataset shards."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lavis_chatbridge.config import shown
from lavis_chatbridge.datasets.readers.common import Origin, Row, begins_with, json_rows, json_value, table_rows
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.prompting.pieces import Modality
from lavis_chatbridge.schema import Medium, Sample

_log = logging.getLogger(__name__)

_LARGEST_TEXT = 1 << 20  # bytes of a caption's member
_PER_SHARD = 10_000  # img2dataset's default number of rows per shard, which its file names follow
_MOST_PADDING = 1 << 20  # bytes of zeros behind the end that are looked at
_KINDS: dict[str, Modality] = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"), "image"),
    **dict.fromkeys(("mp4", "m4v", "mov", "avi", "webm", "mkv", "mpg", "mpeg", "flv", "wmv"), "video"),
    **dict.fromkeys(("wav", "flac", "ogg", "opus", "mp3", "m4a", "aac", "aif", "aiff"), "audio"),
}
_READ = frozenset((*_KINDS, "txt", "json"))


def pairs_tsv(origin: Origin) -> Iterator[Sample]:
    """A TSV of captions and addresses. Option ``columns``: their order where the file has no header line.

    CC3M is published as caption, url; CC12M as url, caption. Media fields: ``row`` (from 0), ``shard`` and ``inner``
    (img2dataset's numbering), ``url_md5``.
    """
    columns = origin.options.get("columns")
    number = 0
    for path in origin.files.values():
        for row in table_rows(path, "\t", columns):
            yield _pair(origin, row, number, row.text("url", "URL"), row.text("caption", "TEXT"))
            number += 1


def pairs_json(origin: Origin) -> Iterator[Sample]:
    """A JSON list of pairs: ``url`` or ``image`` with ``caption`` (BLIP's and LAVIS's lists), or SBU's two lists.

    Media fields: as for a TSV, and ``image`` (a path) where the file has one.
    """
    number = 0
    for path in origin.files.values():
        rows = json_rows(path) if begins_with(path, "[") else _sbu_rows(path)
        for row in rows:
            place = row.text("url", "image", "URL")
            yield _pair(origin, row, number, place, row.text("caption", "TEXT"))
            number += 1


def webdataset(origin: Origin) -> Iterator[Sample]:
    """Shards as img2dataset or webdataset write them: media with a ``.txt`` or a ``.json`` that has a ``caption``.

    A medium stays in its shard; the sample says at which byte it lies. So the shards must not be compressed. Keys
    without a medium or without a text are left out, and the log counts them.
    """
    keys, left_out, first = 0, 0, ""
    for path in origin.files.values():
        try:
            with tarfile.open(path, "r:") as shard:
                for group in _groups(shard, path):
                    keys += 1
                    if group.media and group.text:
                        yield Sample(group.key, tuple(group.media), (group.text,))
                    else:
                        left_out, first = left_out + 1, first or group.key
                _check_end(shard, path)
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: not an uncompressed tar file: {error}") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if left_out:
        _log.warning(
            "%s: left out %d of %d keys, which have no medium or no text beside it; the first is %s",
            origin.source,
            left_out,
            keys,
            first,
        )


def _pair(origin: Origin, row: Row, number: int, place: str, caption: str) -> Sample:
    shard, inner = divmod(number, _PER_SHARD)
    fields = {"row": number, "shard": shard, "inner": inner, "url_md5": hashlib.md5(place.encode()).hexdigest()}
    image = row.values.get("image")
    media = origin.locate(row.where, image=image if isinstance(image, str) else "", **fields)
    return Sample(str(number), media, (caption,))


def _sbu_rows(path: str) -> Iterator[Row]:
    """SBU's file: a list of addresses and a list of captions, side by side."""
    urls, captions = json_value(path, "image_urls"), json_value(path, "captions")
    if not isinstance(urls, list) or not isinstance(captions, list) or len(urls) != len(captions):
        raise DataError(f"{path}: expected the lists image_urls and captions, of equal length")
    for number, (url, caption) in enumerate(zip(urls, captions, strict=True)):
        yield Row({"url": url, "caption": caption}, f"{path}: captions[{number}]")


@dataclass
class _Group:
    """The members of one key, which stand together in a webdataset shard."""

    key: str
    media: list[Medium] = field(default_factory=list)
    text: str | None = None
    suffixes: set[str] = field(default_factory=set)


def _groups(shard: tarfile.TarFile, path: str) -> Iterator[_Group]:
    group, current = None, ""
    for member in shard:
        if not member.isfile() or member.issparse():
            continue
        folder, base = os.path.split(member.name)
        stem, _, suffix = base.partition(".")
        key, suffix = os.path.join(folder, stem), suffix.lower()
        if group is None or key != current:
            if group is not None:
                yield group
            group, current = _Group(f"{os.path.basename(path)}/{key}"), key
        if suffix in group.suffixes and suffix in _READ:
            raise DataError(
                f"{path}: a second .{suffix} of one key, {shown(member.name)}; a key has one of each ending"
            )
        group.suffixes.add(suffix)
        if suffix in _KINDS:
            group.media.append(Medium(_KINDS[suffix], path, member.offset_data, member.size))
        elif suffix == "txt":
            group.text = _content(shard, member, path).decode("utf-8", errors="replace").strip()
        elif suffix == "json" and group.text is None:
            group.text = _caption_in(_content(shard, member, path), f"{path}: {member.name}")
    if group is not None:
        yield group


def _check_end(shard: tarfile.TarFile, path: str) -> None:
    """Look behind the last member: Python takes a damaged header, and a second tar behind the first, for the end.

    Raises:
        DataError: If something stands there that was not read.
    """
    assert shard.fileobj is not None
    shard.fileobj.seek(shard.offset)
    rest = shard.fileobj.read(_MOST_PADDING)
    if rest.strip(b"\0"):
        raise DataError(
            f"{path}: what stands from byte {shard.offset} on cannot be read: a damaged or cut-off header, or a tar "
            "behind the end of another; make this shard anew, or leave it out"
        )
    if not rest:
        _log.warning("%s: a tar without the mark of its end; has it been cut off?", path)


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> bytes:
    if not 0 <= member.size <= _LARGEST_TEXT:
        raise DataError(
            f"{path}: {shown(member.name)} has {member.size} bytes, expected a text of at most {_LARGEST_TEXT}"
        )
    file = shard.extractfile(member)
    return b"" if file is None else file.read()


def _caption_in(content: bytes, where: str) -> str | None:
    try:
        record: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    caption = record.get("caption") if isinstance(record, dict) else None
    return Row(record, where).text("caption") if isinstance(caption, str) and caption.strip() else None
