"""The reader of webdataset shards: pairs from the web (CC3M, CC12M, SBU, LAION) as img2dataset stores them."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator

from lavis_chatbridge.datasets.readers.common import ENDINGS, Origin, Row
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.schema import Medium, Sample

_log = logging.getLogger(__name__)


def webdataset(origin: Origin) -> Iterator[Sample]:
    """Shards as img2dataset or webdataset write them: media with a ``.txt``, or a ``.json`` that has a ``caption``.

    A medium stays in its shard; the sample stores its offset and size, so shards must not be compressed. Keys without a
    medium or without a text are left out and counted. macOS' ``._NAME`` members are ignored.
    """
    left_out: list[str] = []
    for path in origin.every_file:
        try:
            with tarfile.open(path, "r:") as shard:
                for key, members in itertools.groupby(filter(_is_content, shard), lambda member: _split(member)[0]):
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


def _is_content(member: tarfile.TarInfo) -> bool:
    return member.isfile() and not os.path.basename(member.name).startswith("._")


def _split(member: tarfile.TarInfo) -> tuple[str, str]:
    """Key and ending: ``a`` of ``a.seg.png``, but ``22.05`` of ``22.05.png``, because no ending begins with a digit."""
    folder, name = os.path.split(member.name)
    ending = re.search(r"(\.[A-Za-z_]\w*)*\Z", name).group()  # type: ignore[union-attr]
    return os.path.join(folder, name.removesuffix(ending)), ending[1:].lower()


def _read(shard: tarfile.TarFile, members: Iterable[tarfile.TarInfo], path: str) -> tuple[tuple[Medium, ...], str]:
    """The media and the text of one key, whose members are adjacent."""
    media, text = [], ""
    for member in members:
        ending = _split(member)[1]
        if ending in ENDINGS:
            media.append(Medium(ENDINGS[ending], path, member.offset_data, member.size))
        elif ending == "txt":
            text = _content(shard, member).decode("utf-8", errors="replace").strip()
        elif ending == "json" and not text:
            text = _caption_in(_content(shard, member), f"{path}: {member.name}")
    return tuple(media), text


def _content(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = shard.extractfile(member)
    return b"" if file is None else file.read()


def _caption_in(content: bytes, where: str) -> str:
    try:
        record = Row(json.loads(content), where)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    return record.text("caption", blank=True) if "caption" in record else ""


def _check_end(shard: tarfile.TarFile, path: str) -> None:
    """Check that only padding follows the last member: tarfile stops silently at a damaged header or a second tar."""
    assert shard.fileobj is not None
    shard.fileobj.seek(shard.offset)
    if shard.fileobj.read(1 << 20).strip(b"\0"):
        raise DataError(
            f"{path}: cannot be read from byte {shard.offset} on: a damaged or truncated header, or a second tar; make "
            "this shard again, or leave it out"
        )
