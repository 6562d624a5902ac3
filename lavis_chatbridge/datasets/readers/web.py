"""Readers of web pairs (CC3M, CC12M, SBU, LAION): img2dataset's shards, tables and JSON lists."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator

from lavis_chatbridge.config import shown
from lavis_chatbridge.datasets.readers.common import ENDINGS, Origin, Row, object_rows, table_rows
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.schema import Medium, Sample

_log = logging.getLogger(__name__)
_PER_SHARD = 10_000
"""img2dataset's default number of rows per shard; its file names depend on it."""


def pairs_tsv(origin: Origin) -> Iterator[Sample]:
    """A TSV of captions and URLs. Option ``columns``: their order if the file has no header line.

    CC3M is published as caption, url; CC12M as url, caption. Media fields: ``row`` (from 0), ``shard`` and ``inner``
    (img2dataset's numbering), ``url_md5``.
    """
    rows = (row for path in origin.every_file for row in table_rows(path, "\t", origin.options.get("columns")))
    for number, row in enumerate(rows):
        if "url" not in row:
            raise DataError(
                f"{row.where}: the columns are {', '.join(map(shown, row.values))}, expected url and caption; a file "
                "without a header line needs options: {columns: [caption, url]}"
            )
        yield _pair(origin, row, number)


def pairs_json(origin: Origin) -> Iterator[Sample]:
    """A JSON list or JSONL of ``url`` or ``image`` with ``caption`` (BLIP's and LAVIS's lists), or SBU's two lists.

    Media fields: those of a TSV, and ``image`` (a path) if the file has it.
    """
    rows = (row for path in origin.every_file for row in object_rows(path))
    pairs = (pair for row in rows for pair in (_sbu_pairs(row) if "image_urls" in row else [row]))
    for number, row in enumerate(pairs):
        yield _pair(origin, row, number)


def _sbu_pairs(row: Row) -> Iterator[Row]:
    """The pairs of SBU's file, which has a list of URLs and a list of captions."""
    urls, captions = row.texts("image_urls"), row.texts("captions")
    if len(urls) != len(captions):
        raise DataError(f"{row.where}: {len(urls)} image_urls, but {len(captions)} captions")
    for number, (url, caption) in enumerate(zip(urls, captions, strict=True)):
        yield Row({"url": url, "caption": caption}, f"{row.where}: captions[{number}]")


def _pair(origin: Origin, row: Row, number: int) -> Sample:
    shard, inner = divmod(number, _PER_SHARD)
    fields = {"row": number, "shard": shard, "inner": inner, "image": row.values.get("image") or ""}
    md5 = hashlib.md5(row.name("url", "image").encode()).hexdigest()
    return Sample(str(number), origin.locate(row.where, url_md5=md5, **fields), (row.text("caption"),))


def webdataset(origin: Origin) -> Iterator[Sample]:
    """Shards written by img2dataset or webdataset: media with a ``.txt``, or a ``.json`` that has a ``caption``.

    Media stay in the shard; a sample stores offset and size, so shards must not be compressed. Keys without a medium or
    a text are left out and counted. macOS' ``._NAME`` members are ignored.
    """
    left_out: list[str] = []
    for path in origin.every_file:
        try:
            with tarfile.open(path, "r:") as shard:
                content = (m for m in shard if m.isfile() and not os.path.basename(m.name).startswith("._"))
                for key, members in itertools.groupby(content, lambda member: _split(member)[0]):
                    name = f"{os.path.basename(path)}/{key}"
                    media, text = _read(shard, members, path)
                    if media and text:
                        yield Sample(name, media, (text,))
                    else:
                        left_out.append(name)
                _check_end(shard, path)
        except tarfile.TarError as error:
            raise DataError(f"{path}: not an uncompressed tar file: {error}") from error
    if left_out:
        message = "%s: left out %d keys without a medium or without a text; the first is %s"
        _log.warning(message, origin.dataset, len(left_out), left_out[0])


def _split(member: tarfile.TarInfo) -> tuple[str, str]:
    """Key and ending: ``a`` of ``a.seg.png``, but ``22.05`` of ``22.05.png``, because no ending begins with a digit."""
    folder, name = os.path.split(member.name)
    ending = re.search(r"(\.[A-Za-z_]\w*)*\Z", name).group()  # type: ignore[union-attr]
    return os.path.join(folder, name.removesuffix(ending)), ending[1:].lower()


def _read(shard: tarfile.TarFile, members: Iterable[tarfile.TarInfo], path: str) -> tuple[tuple[Medium, ...], str]:
    """The media and the text of one key, from its adjacent members."""
    found: dict[str, tarfile.TarInfo] = {}
    for member in members:
        if (ending := _split(member)[1]) in found:
            raise DataError(f"{path}: two members are named {member.name}; a key has one member of each ending")
        found[ending] = member
    media = [Medium(ENDINGS[e], path, found[e].offset_data, found[e].size) for e in found if e in ENDINGS]
    text = ""
    if "txt" in found and (file := shard.extractfile(found["txt"])):
        text = file.read().decode("utf-8", errors="replace").strip()
    if not text and "json" in found and (file := shard.extractfile(found["json"])):
        where = f"{path}: {found['json'].name}"
        try:
            record = Row(json.load(file), where)
        except ValueError as error:
            raise DataError(f"{where}: not JSON: {error}") from error
        text = record.text("caption", blank=True) if "caption" in record else ""
    return tuple(media), text


def _check_end(shard: tarfile.TarFile, path: str) -> None:
    """Check that only padding follows the last member: tarfile stops silently at a damaged header or a second tar."""
    assert shard.fileobj is not None
    shard.fileobj.seek(shard.offset)
    if shard.fileobj.read(1 << 20).strip(b"\0"):
        raise DataError(
            f"{path}: cannot be read from byte {shard.offset} on: a damaged or truncated header, or a second tar; make "
            "this shard again, or leave it out"
        )
