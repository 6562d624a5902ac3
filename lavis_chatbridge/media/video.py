"""Opens videos: a path, bytes or an array become the chosen frames. Only what these need is decoded.

The file is first read without decoding, for the true number of frames (headers may be wrong), and whether and when each
frame is shown, and which are key frames. To decode a chosen frame, decoding starts at the last key frame before it and
skips frames that no other frame refers to.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media.container import first_stream, open_container, packets_of
from lavis_chatbridge.media.image import WHITE, as_bytes, check_size, formats_of, to_rgb, whole_files_only
from lavis_chatbridge.media.source import (
    DEFAULT_LIMITS,
    ChoiceError,
    Deadline,
    Limits,
    Source,
    file_of,
    guarded,
    head_of,
    is_picture,
)

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame

_MOST_PICTURES = 50_000  # frames of an animated image
_KEEP_BYTES = 1 << 28  # packets up to this size in total stay in memory between the two passes
_JUMP_SECONDS = 10  # in a broadcast format, a longer gap separates recordings; it is not a long frame
_LIMITED, _FULL = 1, 2  # FFmpeg's AVColorRange
_BT709, _UNKNOWN_MATRIX, _BT601 = 1, 2, 5  # FFmpeg's AVColorSpace and SWS_CS


@guarded
def open_video(
    source: Source,
    choose: Callable[[int], Sequence[int]],
    *,
    background: tuple[int, int, int] = WHITE,
    limits: Limits = DEFAULT_LIMITS,
) -> np.ndarray:
    """Open chosen frames of a video as a player shows them: upright, in RGB, without frames that an edit list hides.

    Args:
        source: A path, the bytes of a file (an image, animated or not, is a video too), a Pillow image, or an array
            ``[T,H,W,3]`` or ``[T,H,W]`` as `open_image` takes for one image.
        choose: Maps the number of shown frames to the wanted indices, in any order, with repeats allowed. Indices count
            equal parts of the video's time: where the frame rate varies, index ``i`` of ``n`` is the frame that is
            shown in the middle of the ``i``-th of ``n`` parts.
        background: Replaces the transparent parts of an animated image.
        limits: Bounds on its size and on the time of decoding.

    Returns:
        uint8 ``[T,H,W,3]``, one frame per index. The nearest intact frame replaces a damaged one.

    Raises:
        MediaError: If it cannot be opened, or most of the chosen frames are damaged.
        ValueError: If ``choose`` returns no index or one out of range.
    """
    if isinstance(source, np.ndarray):
        return _array_frames(source, choose)
    if isinstance(source, Image.Image):
        shown = source.tell()
        try:
            return _picture_frames(source, source, choose, background, limits)
        finally:
            source.seek(shown)  # the caller closes it
    file = file_of(source)
    head = head_of(file)
    if is_picture(head):
        with whole_files_only(), Image.open(file, formats=formats_of(head, source)) as image:
            return _picture_frames(image, source, choose, background, limits)
    return _container_frames(file, source, choose, limits)


def _chosen(choose: Callable[[int], Sequence[int]], count: int) -> list[int]:
    """The indices that ``choose`` returns for ``count`` frames.

    Raises:
        ChoiceError: If there are none, or one is out of range.
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
    picked = as_bytes(frames[_chosen(choose, len(frames))])
    return np.repeat(picked, 3, axis=3) if picked.shape[3] == 1 else np.ascontiguousarray(picked)


def _picture_frames(
    image: Image.Image,
    source: object,
    choose: Callable[[int], Sequence[int]],
    background: tuple[int, int, int],
    limits: Limits,
) -> np.ndarray:
    """Frames of an animated image; a still one is a video of one frame."""
    check_size(source, image.size, limits)
    deadline = Deadline(source, limits.timeout)
    count, most = getattr(image, "n_frames", 1), min(limits.max_frames, _MOST_PICTURES)
    if count > most:
        raise MediaError(source, f"it has {count} frames, more than the limit of {most}")
    indices = _chosen(choose, count)
    _check_bytes(source, image.size, len(indices), limits)
    pictures: dict[int, np.ndarray] = {}
    for index in range(max(indices) + 1):  # each frame of a GIF builds on the one before
        if count > 1:
            deadline.check()
            image.seek(index)
        if index in indices:
            pictures[index] = np.array(to_rgb(image.copy(), background))
    return np.stack([pictures[index] for index in indices])


def _check_bytes(source: object, size: tuple[int, int], frames: int, limits: Limits) -> None:
    if 3 * size[0] * size[1] * frames > limits.max_bytes:
        raise MediaError(source, f"{frames} frames of {size[0]} x {size[1]} pixels exceed {limits.max_bytes} bytes")


@dataclass(frozen=True)
class _Index:
    """The packets of a video stream in the order of the file: all information that needs no decoding.

    Attributes:
        times: When each frame is displayed, in units of the stream's time base.
        keys: Which are key frames.
        count: Number of shown frames; an edit list hides others.
        order: Positions of the shown frames by time of display; None if the times are unreliable.
        end: When the last frame ends.
        packets: The packets themselves, unless they are too large.
        timed: Whether indices are by time; otherwise frames are counted.
    """

    times: list[int | None]
    keys: list[bool]
    count: int
    order: list[int] | None
    end: int
    packets: list[Packet] | None
    timed: bool

    def time(self, rank: int) -> int:
        """When the ``rank``-th shown frame is displayed."""
        assert self.order is not None
        return self.times[self.order[rank]] or 0

    def ranks(self, indices: list[int]) -> list[int]:
        """The frames shown in the middle of each of the parts ``indices`` of the video's time."""
        if self.order is None or not self.timed or self.count == 1:
            return indices
        shown = np.array([self.time(rank) for rank in range(self.count)])
        first, last = int(shown[0]), int(shown[-1])
        gap = (last - first) / (self.count - 1)
        constant = np.abs(shown - np.linspace(first, last, self.count)).max() < gap / 2
        if constant and self.end < last + 1.5 * gap:
            return indices
        part = ((self.end if self.end > last else last + gap) - first) / self.count
        return [int(np.searchsorted(shown, first + (index + 0.5) * part, "right")) - 1 for index in indices]


def _container_frames(
    file: str | io.BytesIO, source: object, choose: Callable[[int], Sequence[int]], limits: Limits
) -> np.ndarray:
    deadline = Deadline(source, limits.timeout)
    with open_container(file, limits) as container:
        stream = first_stream(container, "video", source)
        index = _read_index(container, stream, source, limits, deadline)
        ranks = index.ranks(_chosen(choose, index.count))
        size = (stream.codec_context.width, stream.codec_context.height)
        check_size(source, size, limits)
        _check_bytes(source, size, len(ranks), limits)
        if index.packets is not None:
            return _decode(stream, index.packets, index, ranks, source, deadline)
    if not isinstance(file, str):
        file.seek(0)
    with open_container(file, limits) as container:
        stream = first_stream(container, "video", source)
        return _decode(stream, _intact(packets_of(container, stream)), index, ranks, source, deadline)


def _intact(packets: Iterable[Packet]) -> Iterator[Packet]:
    return (packet for packet in packets if not packet.is_corrupt)


def _read_index(container: Any, stream: Any, source: object, limits: Limits, deadline: Deadline) -> _Index:
    times: list[int | None] = []
    keys: list[bool] = []
    shown: list[int] = []
    durations: list[int] = []
    kept: list[Packet] | None = []
    total = 0
    for position, packet in enumerate(_intact(packets_of(container, stream))):
        deadline.check()
        times.append(packet.pts)
        keys.append(packet.is_keyframe)
        durations.append(packet.duration or 0)
        if not packet.is_discard:
            shown.append(position)
        total += packet.size
        if kept is not None and total <= _KEEP_BYTES:
            kept.append(packet)
        else:
            kept = None
        if len(times) > limits.max_frames:
            raise MediaError(source, f"it has more than {limits.max_frames} frames")
    if not shown:
        raise MediaError(source, "its video track shows no frames")
    # AVI stores a frame rate but no display times; FFmpeg guesses them in decoding order.
    avi = container.format.name == "avi"
    reordered = avi and stream.codec_context.has_b_frames
    if reordered or None in times or len({times[position] for position in shown}) < len(shown):
        return _Index(times, keys, len(shown), None, 0, kept, False)
    order = sorted(shown, key=lambda position: times[position] or 0)
    sorted_times = np.array([times[position] for position in order])
    longest = float(np.diff(sorted_times).max(initial=0) * stream.time_base)
    jumps = container.format.name in ("mpegts", "mpeg") and longest > _JUMP_SECONDS
    end = int(sorted_times[-1]) + durations[order[-1]]
    return _Index(times, keys, len(shown), order, end, kept, not avi and not jumps)


def _decode(
    stream: Any, packets: Iterable[Packet], index: _Index, chosen: list[int], source: object, deadline: Deadline
) -> np.ndarray:
    ranks = sorted(set(chosen))
    picker = _Picker(source, stream, deadline)
    if index.order is None:
        picker.by_counting(packets, ranks)
    else:
        wanted = {index.time(rank): rank for rank in ranks}
        picker.by_time(packets, _spans(index, ranks), wanted)
        missing = [rank for rank in ranks if rank not in picker.pictures]
        if missing and index.packets is not None:  # with gradual refresh, frames become intact after a key frame
            picker.by_time(index.packets, _spans(index, missing, groups=2), wanted)
    missing = [rank for rank in ranks if rank not in picker.pictures]
    if not picker.pictures or (index.order is not None and len(missing) > len(ranks) // 2):
        raise MediaError(source, picker.fault or "none of the chosen frames could be decoded")
    for rank in missing:
        nearest = min(picker.pictures, key=lambda found: abs(found - rank))
        picker.pictures[rank] = picker.pictures[nearest]
    return np.stack([picker.pictures[rank] for rank in chosen])


def _spans(index: _Index, ranks: list[int], groups: int = 1) -> list[tuple[int, int, set[int]]]:
    """The stretches of the file to decode: first and last position, and the positions of chosen frames among them.

    A frame may be shown before the key frame that it follows in the file (open GOP). It then refers to the previous
    GOP, so decoding starts there. With ``groups`` it starts that many key frames back.
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
        """Decode from the start and count frames, for videos without times. Some packets contain no frame."""
        wanted, count, last = set(ranks), 0, None
        for packet in chain(packets, [None]):  # None flushes the decoder
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
        self._codec.open(strict=False)  # libdav1d (AV1) keeps the ``skip_frame`` setting that it was opened with
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
        pixels = frame.to_ndarray(format="rgb24", width=width, height=height, **_colours(frame))
        self.pictures[rank] = np.ascontiguousarray(_upright(pixels, frame))


def _colours(frame: VideoFrame) -> dict[str, Any]:
    """The frame's own colour matrix and range for the conversion to RGB; PyAV before 17 ignores them."""
    if not frame.format.name.startswith(("yuv", "nv", "p0")):
        return {}
    full = int(frame.color_range) == _FULL or frame.format.name.startswith("yuvj")
    matrix = _BT601 if int(frame.colorspace) == _UNKNOWN_MATRIX else int(frame.colorspace)
    return {
        "src_colorspace": matrix,
        "dst_colorspace": _BT601 if matrix != _BT601 else _BT709,  # PyAV 16 ignores the source's if both are equal
        "src_color_range": _FULL if full else _LIMITED,
        "dst_color_range": _FULL,
    }


def _upright(pixels: np.ndarray, frame: VideoFrame) -> np.ndarray:
    """``pixels`` turned and mirrored as the display matrix says: one of eight orientations.

    FFmpeg's matrix ``a b . c d`` moves pixel (x, y) to (a x + c y, b x + d y).
    """
    import av.sidedata.sidedata

    every: Any = frame.side_data
    side = every.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
    if side is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(side), np.int32)[:5].astype(int)
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
