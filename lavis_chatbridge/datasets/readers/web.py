"""Readers of image and text pairs from the web (CC3M, CC12M, SBU, LAION): tables, JSON lists, webdataset shards."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any

from lavis_chatbridge.config import shown
from lavis_chatbridge.datasets.readers.common import ENDINGS, Origin, Row, begins_with, json_rows, json_value
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.schema import Medium, Sample

_log = logging.getLogger(__name__)

_PER_SHARD = 10_000  # img2dataset's default number of rows per shard, which its file names follow
_PADDING = 1 << 20  # number of bytes after the end marker that are checked


def pairs_tsv(origin: Origin) -> Iterator[Sample]:
    """A TSV of captions and URLs. Option ``columns``: their order if the file has no header line.

    CC3M is published as caption, url; CC12M as url, caption. Media fields: ``row`` (from 0), ``shard`` and ``inner``
    (img2dataset's numbering), ``url_md5``.
    """
    for number, row in enumerate(origin.table("\t", origin.options.get("columns"))):
        if "url" not in row and "URL" not in row:
            raise DataError(
                f"{row.where}: the columns are {', '.join(map(shown, row.values))}, expected url and caption; a file "
                "without a header line needs options: {columns: [caption, url]}"
            )
        yield _pair(origin, row, number, row.name("url", "URL"))


def pairs_json(origin: Origin) -> Iterator[Sample]:
    """A JSON list of pairs: ``url`` or ``image`` with ``caption`` (BLIP's and LAVIS's lists), or SBU's two lists.

    Media fields: those of a TSV, and ``image`` (a path) if the file has it.
    """
    number = 0
    for path in origin.every_file:
        for row in json_rows(path) if begins_with(path, "[") else _sbu_rows(path):
            yield _pair(origin, row, number, row.name("url", "image", "URL"))
            number += 1


def _pair(origin: Origin, row: Row, number: int, address: str) -> Sample:
    shard, inner = divmod(number, _PER_SHARD)
    image = row.values.get("image")
    fields = {"row": number, "shard": shard, "inner": inner, "url_md5": hashlib.md5(address.encode()).hexdigest()}
    media = origin.locate(row.where, image=image if isinstance(image, str) else "", **fields)
    return Sample(str(number), media, (row.text("caption", "TEXT"),))


def _sbu_rows(path: str) -> Iterator[Row]:
    """SBU's file: a list of URLs and a list of captions."""
    urls, captions = json_value(path, "image_urls"), json_value(path, "captions")
    if not isinstance(urls, list) or not isinstance(captions, list) or len(urls) != len(captions):
        raise DataError(f"{path}: expected the lists image_urls and captions, of equal length")
    for number, (url, caption) in enumerate(zip(urls, captions, strict=True)):
        yield Row({"url": url, "caption": caption}, f"{path}: captions[{number}]")


def webdataset(origin: Origin) -> Iterator[Sample]:
    """Shards as img2dataset or webdataset write them: media with a ``.txt``, or a ``.json`` that has a ``caption``.

    A medium stays in its shard; the sample stores its offset and size, so shards must not be compressed. Keys without a
    medium or without a text are left out and counted. macOS' ``._NAME`` members are ignored.
    """
    keys, left_out, first = 0, 0, ""
    for path in origin.every_file:
        try:
            with tarfile.open(path, "r:") as shard:
                files = (m for m in shard if m.isfile() and not m.issparse() and not _base(m).startswith("._"))
                for key, members in itertools.groupby(files, _key):
                    keys += 1
                    name = f"{os.path.basename(path)}/{key}"
                    media, text = _read(shard, members, path)
                    if media and text:
                        yield Sample(name, media, (text,))
                    else:
                        left_out, first = left_out + 1, first or name
                _check_end(shard, path)
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            raise DataError(f"{path}: not an uncompressed tar file: {error}") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if left_out:
        message = "%s: left out %d of %d keys without a medium or without a text; the first is %s"
        _log.warning(message, origin.source, left_out, keys, first)


def _base(member: tarfile.TarInfo) -> str:
    return os.path.basename(member.name)


def _key(member: tarfile.TarInfo) -> str:
    return os.path.join(os.path.dirname(member.name), _base(member).partition(".")[0])


def _read(
    shard: tarfile.TarFile, members: Iterable[tarfile.TarInfo], path: str
) -> tuple[tuple[Medium, ...], str | None]:
    """The media and the text of one key, whose members are adjacent."""
    media, text = [], None
    endings: set[str] = set()
    for member in members:
        ending = _base(member).partition(".")[2].lower()
        if ending in endings and (ending in ENDINGS or ending in ("txt", "json")):
            raise DataError(
                f"{path}: a second .{ending} of one key, {shown(member.name)}; a key has one of each ending"
            )
        endings.add(ending)
        if ending in ENDINGS:
            media.append(Medium(ENDINGS[ending], path, member.offset_data, member.size))
        elif ending == "txt":
            text = _content(shard, member).decode("utf-8", errors="replace").strip()
        elif ending == "json" and text is None:
            text = _caption_in(_content(shard, member), f"{path}: {member.name}")
    return tuple(media), text


def _check_end(shard: tarfile.TarFile, path: str) -> None:
    """Check that nothing follows the last member: tarfile stops silently at a damaged header or a second tar."""
    assert shard.fileobj is not None
    shard.fileobj.seek(shard.offset)
    rest = shard.fileobj.read(_PADDING)
    if rest.strip(b"\0"):
        raise DataError(
            f"{path}: cannot be read from byte {shard.offset} on: a damaged or truncated header, or a second tar; make "
            "this shard again, or leave it out"
        )
    if not rest:
        _log.warning("%s: a tar without an end marker; it may be truncated", path)


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = shard.extractfile(member)
    return b"" if file is None else file.read()


def _caption_in(content: bytes, where: str) -> str | None:
    try:
        record: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    caption = record.get("caption") if isinstance(record, dict) else None
    return Row(record, where).text("caption") if isinstance(caption, str) and caption.strip() else None
