"""Walks through a GIF without decoding: how many frames it has, and whether Pillow can be let at it.

Pillow goes through all blocks of a file to count its frames, however many there are, and takes time that grows with the
square of the number of a comment's blocks: a few megabytes can keep it busy for hours.
"""

from __future__ import annotations

import io
import mmap

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media.source import Deadline

HEADS = (b"GIF87a", b"GIF89a")
_IMAGE, _EXTENSION, _END, _COMMENT = b",!;\xfe"
_MOST_BLOCKS, _MOST_OF_COMMENTS = 2_000_000, 10_000


def count_frames(file: str | io.BytesIO, source: object, most: int, deadline: Deadline) -> int:
    """The frames of a GIF, or ``most + 1`` if there are more (GIF89a specification, sections 17 to 27).

    Args:
        file: A path, or a file object, which stays where it is.
        source: What the file is called in messages.
        most: The walk ends at the frame after these.
        deadline: Until when.

    Raises:
        MediaError: If it is cut into more blocks than any program does, or the time is up.
    """
    if isinstance(file, io.BytesIO):
        with file.getbuffer() as data:
            return _walk(data, source, most, deadline)
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return _walk(mapped, source, most, deadline)


def _walk(data: memoryview | mmap.mmap, source: object, most: int, deadline: Deadline) -> int:
    end = len(data)
    at = 13 + (_colour_table(data[10]) if end > 10 else 0)
    frames = blocks = of_comments = 0
    while at + 10 < end and frames <= most and data[at] != _END:
        deadline.check()
        kind, label = data[at], data[at + 1]
        if kind == _IMAGE:
            frames += 1
            at += 11 + _colour_table(data[at + 9])  # the byte in front of the pixels included
        elif kind == _EXTENSION:
            at += 2
        else:
            at += 1
            continue
        before = blocks
        while at < end and (size := data[at]):
            at += size + 1
            blocks += 1
            if blocks > _MOST_BLOCKS:
                raise MediaError(source, f"it is cut into more than {_MOST_BLOCKS} blocks")
        at += 1
        of_comments += blocks - before if (kind, label) == (_EXTENSION, _COMMENT) else 0
        if of_comments > _MOST_OF_COMMENTS:
            raise MediaError(source, f"its comments are cut into more than {_MOST_OF_COMMENTS} blocks")
    return frames


def _colour_table(flags: int) -> int:
    """Bytes of the colour table that follows these flags."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0
