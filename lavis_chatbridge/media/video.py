"""Opens videos: path, bytes or array -> the chosen frames. Decodes nothing that they do not need.

The file is first read without decoding: that gives the true number of frames (headers may lie), the time of each and
which of them stand alone. A chosen frame then costs the decoding of its predecessors from the last frame that stands
alone, without those that no other frame refers to.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media import gif
from lavis_chatbridge.media.container import first_stream, open_container
from lavis_chatbridge.media.image import PICTURE_FORMATS, WHITE, as_bytes, check_size, to_rgb, whole_files_only
from lavis_chatbridge.media.limits import DEFAULT_LIMITS, Limits
from lavis_chatbridge.media.source import Deadline, Source, file_of, head_of, is_picture, media_errors

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame

_MOST_PICTURES = 50_000  # frames of an animated picture
_KEEP_BYTES = 1 << 28  # compressed packets up to this size stay in memory between the two passes


def open_video(
    source: Source,
    choose: Callable[[int], Sequence[int]],
    *,
    background: tuple[int, int, int] = WHITE,
    limits: Limits = DEFAULT_LIMITS,
) -> np.ndarray:
    """Open chosen frames of a video, upright, in RGB.

    Args:
        source: A path, the bytes of a file (a picture, animated or not, is a video too), a Pillow image, or an array
            ``[T,H,W,3]`` or ``[T,H,W]`` as `open_image` takes for one picture.
        choose: From the number of frames in the file to the indices wanted, in any order, repeats allowed.
        background: What shows through where an animated picture is transparent.
        limits: Bounds on its size and on the time of decoding.

    Returns:
        uint8 ``[T,H,W,3]``, one frame per index. Where single frames are damaged, the nearest whole one stands for
        them.

    Raises:
        MediaError: If it cannot be opened, or most of the chosen frames are damaged.
        ValueError: If ``choose`` returns no index or one that does not exist.
    """
    with media_errors(source, passing=(ChoiceError,)):
        if isinstance(source, np.ndarray):
            return _array_frames(source, choose)
        if isinstance(source, Image.Image):
            shown = source.tell()
            try:
                return _picture_frames(source, source, choose, background, limits)
            finally:
                source.seek(shown)  # it is the caller's
        file = file_of(source)
        head = head_of(file)
        if is_picture(head):
            if head.startswith(gif.HEADS):
                most = min(limits.max_frames, _MOST_PICTURES)
                if gif.count_frames(file, source, most, Deadline(source, limits.timeout)) > most:
                    raise MediaError(source, f"it has more frames than the limit of {most}")
            with whole_files_only(), Image.open(file, formats=PICTURE_FORMATS) as image:
                return _picture_frames(image, source, choose, background, limits)
        return _container_frames(file, source, choose, limits)


class ChoiceError(ValueError):
    """The caller's ``choose`` is at fault, not the file."""


def chosen(choose: Callable[[int], Sequence[int]], count: int) -> list[int]:
    """The indices that ``choose`` returns for ``count`` frames.

    Raises:
        ChoiceError: If there are none, or one that does not exist.
    """
    try:
        indices = [int(index) for index in choose(count)]
    except Exception as error:
        raise ChoiceError(f"choosing from {count} frames failed: {error}") from error
    if not indices or min(indices) < 0 or max(indices) >= count:
        raise ChoiceError(f"of {count} frames, {indices} were chosen")
    return indices


def _array_frames(array: np.ndarray, choose: Callable[[int], Sequence[int]]) -> np.ndarray:
    frames = array[..., None] if array.ndim == 3 else array
    if frames.ndim != 4 or 0 in frames.shape or frames.shape[3] not in (1, 3):
        raise MediaError(array, "a video has the shape [T,H,W], [T,H,W,1] or [T,H,W,3]")
    picked = as_bytes(frames[chosen(choose, len(frames))])
    return np.repeat(picked, 3, axis=3) if picked.shape[3] == 1 else np.ascontiguousarray(picked)


def _picture_frames(
    image: Image.Image,
    source: object,
    choose: Callable[[int], Sequence[int]],
    background: tuple[int, int, int],
    limits: Limits,
) -> np.ndarray:
    """Frames of an animated picture; a still one is a video of one frame."""
    check_size(source, image.size, limits)
    deadline = Deadline(source, limits.timeout)
    most = min(limits.max_frames, _MOST_PICTURES)
    count = _count_pictures(image, most, deadline)
    if count > most:
        raise MediaError(source, f"it has more frames than the limit of {most}")
    indices = chosen(choose, count)
    _check_bytes(source, image.size, len(indices), limits)
    pictures: dict[int, np.ndarray] = {}
    for index in range(max(indices) + 1):  # each frame of a GIF builds on the one before
        if count > 1:
            deadline.check()
            image.seek(index)
        if index in indices:
            pictures[index] = np.array(to_rgb(image.copy(), background))
    return np.stack([pictures[index] for index in indices])


def _count_pictures(image: Image.Image, most: int, deadline: Deadline) -> int:
    """How many frames an animated picture has, or ``most + 1`` if there are more.

    Pillow would go through all pages of a TIFF to count them, however many there are.
    """
    if image.format != "TIFF":
        return getattr(image, "n_frames", 1)
    count = 1
    with suppress(EOFError):
        while count <= most:
            deadline.check()
            image.seek(count)
            count += 1
    image.seek(0)
    return count


def _check_bytes(source: object, size: tuple[int, int], frames: int, limits: Limits) -> None:
    needed = 3 * size[0] * size[1] * frames
    if needed > limits.max_bytes:
        raise MediaError(source, f"{frames} frames of {size[0]} x {size[1]} pixels exceed {limits.max_bytes} bytes")


@dataclass(frozen=True)
class _Index:
    """The frames of a track, in the order of the file: what is known without decoding.

    ``packets`` holds the compressed frames themselves unless they are too many. ``order`` lists positions in the file
    by time of display; it is None where the times cannot be trusted.
    """

    times: list[int | None]
    keys: list[bool]
    packets: list[Packet] | None
    order: list[int] | None


def _container_frames(
    file: str | io.BytesIO, source: object, choose: Callable[[int], Sequence[int]], limits: Limits
) -> np.ndarray:
    deadline = Deadline(source, limits.timeout)
    with open_container(file, limits) as container:
        stream = first_stream(container, "video", source)
        index = _read_index(container, stream, source, limits, deadline)
        indices = chosen(choose, len(index.times))
        size = (stream.codec_context.width, stream.codec_context.height)
        check_size(source, size, limits)
        _check_bytes(source, size, len(indices), limits)
        if index.packets is not None:
            return _decode(stream, index.packets, index, indices, source, deadline)
    if not isinstance(file, str):
        file.seek(0)
    with open_container(file, limits) as container:
        stream = first_stream(container, "video", source)
        return _decode(stream, _packets(container, stream), index, indices, source, deadline)


def _packets(container: Any, stream: Any) -> Iterator[Packet]:
    """The frames of a track in the order of the file, compressed; where reading fails, the file ends."""
    import av.error

    try:
        for packet in container.demux(stream):
            if packet.size > 0 and not packet.is_corrupt:
                yield packet
    except av.error.FFmpegError:
        return


def _read_index(container: Any, stream: Any, source: object, limits: Limits, deadline: Deadline) -> _Index:
    times: list[int | None] = []
    keys: list[bool] = []
    kept: list[Packet] | None = []
    total = 0
    for packet in _packets(container, stream):
        deadline.check()
        times.append(None if packet.is_discard else packet.pts)
        keys.append(packet.is_keyframe)
        total += packet.size
        if kept is not None and total <= _KEEP_BYTES:
            kept.append(packet)
        else:
            kept = None
        if len(times) > limits.max_frames:
            raise MediaError(source, f"it has more than {limits.max_frames} frames")
    if not times:
        raise MediaError(source, "its video track holds no frames")
    known = [time for time in times if time is not None]
    # AVI stores no times of display: for codecs that reorder frames they come out in the order of decoding.
    reordered = container.format.name == "avi" and stream.codec_context.has_b_frames
    trusted = len(known) == len(times) == len(set(known)) and not reordered
    order = sorted(range(len(times)), key=lambda position: times[position] or 0) if trusted else None
    return _Index(times, keys, kept, order)


def _decode(
    stream: Any, packets: Iterable[Packet], index: _Index, indices: list[int], source: object, deadline: Deadline
) -> np.ndarray:
    ranks = sorted(set(indices))
    picker = _Picker(source, stream, deadline)
    if index.order is None:
        picker.by_counting(packets, ranks)
    else:
        wanted = {_time(index, rank): rank for rank in ranks}
        picker.by_time(packets, _spans(index, ranks), wanted)
        missing = [rank for rank in ranks if rank not in picker.pictures]
        if missing and index.packets is not None:  # where key frames stand alone only after a while: gradual refresh
            picker.by_time(index.packets, _spans(index, missing, groups=2), wanted)
    missing = [rank for rank in ranks if rank not in picker.pictures]
    if not picker.pictures or (index.order is not None and len(missing) > len(ranks) // 2):
        raise MediaError(source, picker.fault or "none of the chosen frames could be decoded")
    for rank in missing:
        nearest = min(picker.pictures, key=lambda found: abs(found - rank))
        picker.pictures[rank] = picker.pictures[nearest]
    return np.stack([picker.pictures[index] for index in indices])


def _time(index: _Index, rank: int) -> int:
    """When the ``rank``-th frame is displayed."""
    assert index.order is not None
    time = index.times[index.order[rank]]
    assert time is not None
    return time


def _spans(index: _Index, ranks: list[int], groups: int = 1) -> list[tuple[int, int, set[int]]]:
    """The stretches of the file to decode: first and last position, and the positions of chosen frames among them.

    A frame may precede, in time, the key frame that it follows in the file (open groups of pictures): it then refers
    to the group before, so decoding starts there; with ``groups`` at the last but so many.
    """
    assert index.order is not None
    spans: list[tuple[int, int, set[int]]] = []
    for wanted in sorted(index.order[rank] for rank in ranks):
        start, left = wanted, groups
        while start > 0:
            left -= index.keys[start] and (index.times[start] or 0) <= (index.times[wanted] or 0)
            if left == 0:
                break
            start -= 1
        chosen = {wanted}
        while spans and start <= spans[-1][1]:
            first, _, earlier = spans.pop()
            start, chosen = min(first, start), chosen | earlier
        spans.append((start, wanted, chosen))
    return spans


class _Picker:
    """Decodes packets and keeps the chosen frames as ``pictures``: rank in time -> uint8 ``[H,W,3]``."""

    def __init__(self, source: object, stream: Any, deadline: Deadline) -> None:
        self.pictures: dict[int, np.ndarray] = {}
        self.fault: str | None = None
        self._source, self._codec, self._deadline = source, stream.codec_context, deadline
        self._size: tuple[int, int] | None = None

    def by_counting(self, packets: Iterable[Packet], ranks: list[int]) -> None:
        """Decode from the start and count, where times are no guide. Some packets hold no frame of their own."""
        wanted, count, last = set(ranks), 0, None
        for packet in _then_none(packets):
            for frame in self._frames(packet):
                if count in wanted:
                    self._keep(count, frame)
                count, last = count + 1, frame
            if count > ranks[-1]:
                return
        if last is not None and count - 1 not in self.pictures:
            self._keep(count - 1, last)

    def by_time(
        self, packets: Iterable[Packet], spans: list[tuple[int, int, set[int]]], wanted: dict[int, int]
    ) -> None:
        """Decode the ``spans`` only; ``wanted`` maps the time of each chosen frame to its rank."""
        self._codec.open(strict=False)  # libdav1d (AV1) keeps for good what it is told to skip when it is opened
        remaining = iter(spans)
        span = next(remaining, None)
        for position, packet in enumerate(packets):
            if span is None:
                return
            first, last, chosen = span
            if position < first:
                continue
            self._codec.skip_frame = "DEFAULT" if position in chosen else "NONREF"
            self._keep_wanted(packet, wanted)
            if position == last:
                self._keep_wanted(None, wanted)
                self._codec.flush_buffers()
                span = next(remaining, None)
        if span is not None:
            self._keep_wanted(None, wanted)

    def _keep_wanted(self, packet: Packet | None, wanted: dict[int, int]) -> None:
        for frame in self._frames(packet):
            rank = None if frame.pts is None else wanted.get(frame.pts)
            if rank is not None:
                self._keep(rank, frame)

    def _frames(self, packet: Packet | None) -> list[VideoFrame]:
        import av.error

        self._deadline.check()
        try:
            return list(self._codec.decode(packet))
        except av.error.FFmpegError as error:
            self.fault = self.fault or f"{type(error).__name__}: {error.strerror}"
            return []

    def _keep(self, rank: int, frame: VideoFrame) -> None:
        self._size = self._size or (frame.width, frame.height)
        width, height = self._size
        pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
        turns = round(frame.rotation / 90) % 4
        self.pictures[rank] = np.ascontiguousarray(np.rot90(pixels, turns))


def _then_none(packets: Iterable[Packet]) -> Iterator[Packet | None]:
    """The packets and, at the end, the sign for the decoder to hand out what it still holds."""
    yield from packets
    yield None
