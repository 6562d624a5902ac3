"""Opens chosen frames of videos from a path, bytes or an array, and decodes no more than necessary.

The file is first read without decoding, to find the true number of frames (headers may be wrong), their display times,
and the key frames. Decoding of a chosen frame starts at the last key frame before it, and skips frames that no other
frame depends on.

Every fault is a `MediaError`. The loader of training and evaluation catches it and skips the sample; chat and server
report it to the user.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media.container import first_stream, open_container, packets_of
from lavis_chatbridge.media.image import as_bytes, check_size, opened, to_rgb
from lavis_chatbridge.media.source import (
    DEFAULT_LIMITS,
    Limits,
    Source,
    file_of,
    guarded,
    head_of,
    is_file,
    is_picture,
)

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame

Choose = Callable[[int], Sequence[int]]

_LIMITED, _FULL = 1, 2  # FFmpeg's AVColorRange
_BT709, _UNKNOWN_MATRIX, _BT601 = 1, 2, 5  # FFmpeg's AVColorSpace and SWS_CS


@guarded
def open_video(source: Source, choose: Choose, *, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """Open chosen frames of a video as a player shows them: upright, with square pixels, in RGB.

    Frames hidden by an edit list are ignored.

    Args:
        source: A path, the bytes of a file (an image, animated or not, is a video too), a Pillow image, or an array
            ``[T,H,W,3]`` or ``[T,H,W]`` with the types that `open_image` accepts.
        choose: Maps the number of shown frames to the wanted indices, in any order, with repeats allowed. The video's
            time is divided into ``n`` equal parts, one per frame; index ``i`` is the frame shown in the middle of the
            ``i``-th part. This matters only if the frame rate varies.
        limits: Bounds on its size and on the time of decoding.

    Returns:
        uint8 ``[T,H,W,3]``, one frame per index. A damaged frame is replaced by the nearest intact one.

    Raises:
        MediaError: If it cannot be opened, or most of the chosen frames are damaged.
    """
    if isinstance(source, np.ndarray):
        frames = source[..., None] if source.ndim == 3 else source
        if frames.ndim != 4 or 0 in frames.shape or frames.shape[3] not in (1, 3):
            raise MediaError(source, "a video has the shape [T,H,W], [T,H,W,1] or [T,H,W,3]")
        chosen = as_bytes(frames[list(choose(len(frames)))])
        return np.repeat(chosen, 3, axis=3) if chosen.shape[3] == 1 else np.ascontiguousarray(chosen)
    if is_file(source) and not is_picture(head_of(file := file_of(source))):
        return _container_frames(file, source, choose, limits)
    return _picture_frames(source, choose, limits)


def _picture_frames(source: Source, choose: Choose, limits: Limits) -> np.ndarray:
    """Frames of an animated image; a still one is a video of one frame."""
    with opened(source) as image:
        count = getattr(image, "n_frames", 1)
        chosen = _chosen(choose, count, image.size, source, limits)
        pictures: dict[int, np.ndarray] = {}
        for index in range(max(chosen) + 1):  # each frame of a GIF depends on the one before
            if count > 1:
                image.seek(index)
            if index in chosen:
                pictures[index] = np.array(to_rgb(image.copy()))
        return np.stack([pictures[index] for index in chosen])


def _container_frames(file: str | io.BytesIO, source: object, choose: Choose, limits: Limits) -> np.ndarray:
    with open_container(file, limits) as container:
        video = _Video(container, source, limits)
        chosen = _chosen(choose, len(video.order), video.size, source, limits)
        if container.format.name != "avi":  # AVI has a constant frame rate, but FFmpeg may report uneven times
            chosen = video.ranks(chosen)
        video.decode(sorted(set(chosen)))
        pictures, missing = video.pictures, set(chosen) - set(video.pictures)
        if not pictures or (video.timed and len(missing) > len(set(chosen)) // 2):
            raise MediaError(source, "most of the chosen frames cannot be decoded")
        for rank in missing:
            pictures[rank] = pictures[min(pictures, key=lambda found: abs(found - rank))]
        return np.stack([pictures[rank] for rank in chosen])


def _chosen(choose: Choose, count: int, size: tuple[int, int], source: object, limits: Limits) -> list[int]:
    """The indices that ``choose`` returns for ``count`` frames of ``size``."""
    check_size(source, size, limits)
    if count > limits.max_frames:
        raise MediaError(source, f"it has more than {limits.max_frames} frames")
    chosen = list(choose(count))
    if 3 * size[0] * size[1] * len(chosen) > limits.max_bytes:
        frames = f"{len(chosen)} frames of {size[0]} x {size[1]} pixels"
        raise MediaError(source, f"{frames} exceed {limits.max_bytes} bytes")
    return chosen


class _Video:
    """A video stream and its decoder. A frame's rank is its number among the shown frames, by display time.

    Attributes:
        packets: In file order (as much memory as the file).
        order: Rank -> packet position; in file order if display times are unreliable.
        timed: Whether the display times are reliable.
        size: Width and height as shown, with square pixels.
        pictures: Rank -> decoded frame, uint8 ``[H,W,3]``.
    """

    def __init__(self, container: InputContainer, source: object, limits: Limits) -> None:
        from av.video.reformatter import VideoReformatter

        stream = first_stream(container, "video", source)
        intact = (packet for packet in packets_of(container, stream) if not packet.is_corrupt)
        self.packets = list(islice(intact, limits.max_frames + 1))
        self.order = [position for position, packet in enumerate(self.packets) if not packet.is_discard]
        if not self.order:
            raise MediaError(source, "its video track shows no frames")
        shown = {self.packets[position].pts for position in self.order}
        # AVI stores a frame rate but no display times; FFmpeg guesses them in decoding order.
        guessed = container.format.name == "avi" and stream.codec_context.has_b_frames
        untimed = any(packet.pts is None for packet in self.packets)
        self.timed = not guessed and not untimed and len(shown) == len(self.order)
        if self.timed:
            self.order.sort(key=lambda position: self.packets[position].pts or 0)
        self.pictures: dict[int, np.ndarray] = {}
        self._codec, self._reformatter = stream.codec_context, VideoReformatter()
        self._aspect = float(stream.sample_aspect_ratio or 1)  # width of a pixel in units of its height
        self.size = (round(self._codec.width * self._aspect), self._codec.height)

    def time(self, rank: int) -> int:
        """The display time of a frame, in units of the stream's time base."""
        return self.packets[self.order[rank]].pts or 0

    def ranks(self, indices: list[int]) -> list[int]:
        """The frames shown in the middle of each of the parts ``indices`` of the video's time."""
        count = len(self.order)
        if not self.timed or count == 1:
            return indices
        shown = np.array([self.time(rank) for rank in range(count)])
        first, last = int(shown[0]), int(shown[-1])
        end = last + (self.packets[self.order[-1]].duration or 0)
        gap = (last - first) / (count - 1)
        constant = np.abs(shown - np.linspace(first, last, count)).max() < gap / 2
        if constant and end < last + 1.5 * gap:
            return indices
        part = ((end if end > last else last + gap) - first) / count
        return [int(np.searchsorted(shown, first + (index + 0.5) * part, "right")) - 1 for index in indices]

    def decode(self, ranks: list[int]) -> None:
        """Decode these frames into ``pictures``, except damaged ones."""
        if self.timed:
            self._by_time(ranks)
            if missing := [rank for rank in ranks if rank not in self.pictures]:
                self._by_time(missing, groups=2)  # with gradual refresh, frames are intact only after a while
            return
        # Without times, decode from the start. Packets may have no frame: then the previous frame is repeated.
        count, last = 0, None
        for frame in (frame for packet in chain(self.packets, [None]) for frame in self._frames(packet)):
            if count in ranks:
                self._keep(count, frame)
            if count == ranks[-1]:
                return
            count, last = count + 1, frame
        if last is not None:
            self._keep(count - 1, last)

    def _by_time(self, ranks: list[int], groups: int = 1) -> None:
        self._codec.open(strict=False)  # libdav1d (AV1) keeps the ``skip_frame`` setting that it was opened with
        wanted = {self.time(rank): rank for rank in ranks}
        positions = [self.order[rank] for rank in ranks]
        for first, last in self._spans(positions, groups):
            for position, packet in enumerate([*self.packets[first : last + 1], None], start=first):
                if packet is not None:
                    self._codec.skip_frame = "DEFAULT" if position in positions else "NONREF"
                for frame in self._frames(packet):
                    if frame.pts in wanted:
                        self._keep(wanted[frame.pts], frame)
            self._codec.flush_buffers()

    def _spans(self, positions: list[int], groups: int) -> list[tuple[int, int]]:
        """The ranges of packets (first, last) to decode for the frames at ``positions``.

        In an open GOP some frames come after a key frame in the file but are shown before it. They need the previous
        group, so decoding starts there. With ``groups``, decoding starts that many key frames earlier.
        """
        spans: list[tuple[int, int]] = []
        for last in sorted(positions):
            time, first, left = self.packets[last].pts or 0, last, groups
            while first > 0:
                left -= self.packets[first].is_keyframe and (self.packets[first].pts or 0) <= time
                if left == 0:
                    break
                first -= 1
            while spans and first <= spans[-1][1]:
                first = min(first, spans.pop()[0])
            spans.append((first, last))
        return spans

    def _frames(self, packet: Packet | None) -> list[VideoFrame]:
        """The frames of a packet, none if it is damaged; None flushes the decoder."""
        import av.error

        try:
            return list(self._codec.decode(packet))
        except av.error.FFmpegError:
            return []

    def _keep(self, rank: int, frame: VideoFrame) -> None:
        if not self.pictures:  # a header may state another size; later frames are scaled to the first one's
            self.size = (round(frame.width * self._aspect), frame.height)
        shown = self._reformatter.reformat(frame, *self.size, "rgb24", **_colours(frame))
        self.pictures[rank] = np.ascontiguousarray(_upright(shown.to_ndarray(), frame))


def _colours(frame: VideoFrame) -> dict[str, Any]:
    """Arguments to convert to RGB with the frame's own colour matrix and range, which PyAV before 17 ignores."""
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
    """Rotate and mirror ``pixels`` by the frame's display matrix (one of eight orientations).

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


def frame_indices(count: int, frames: int, rng: np.random.Generator | None = None) -> list[int]:
    """``frames`` indices into a video of ``count`` frames, evenly spaced and in order.

    A shorter video repeats its last frame (original: ``data.py`` of the training reader). Each index is a random one of
    its segment with ``rng`` (training), and the middle one without (evaluation).
    """
    lengthened = list(range(count)) + [count - 1] * (frames - count)
    return one_of_each(lengthened, frames, rng)


def uniform_frame_indices(count: int, frames: int) -> list[int]:
    """The first frame of each of ``frames`` equal segments, at most ``count`` (original: the demo's processor)."""
    taken = min(count, frames)
    return [index * count // taken for index in range(taken)]


def one_of_each(items: Sequence[int], chunks: int, rng: np.random.Generator | None = None) -> list[int]:
    """Split ``items`` into ``chunks`` runs and take one item of each: a random one with ``rng``, else the middle one.

    There must be at least ``chunks`` items. The runs' lengths differ by at most one; longer runs come first.
    """
    length, surplus = divmod(len(items), chunks)
    ends = [length * chunk + min(chunk, surplus) for chunk in range(chunks + 1)]
    runs = [items[start:end] for start, end in pairwise(ends)]
    if rng is None:
        return [run[(len(run) + 1) // 2 - 1] for run in runs]
    return [run[int(rng.integers(len(run)))] for run in runs]
