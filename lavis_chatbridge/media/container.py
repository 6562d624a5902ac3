"""Opens containers (mp4, mkv, webm, avi, ogg, mp3, wav ...) with PyAV. No other file and no URL is read."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media.source import DEFAULT_LIMITS, Limits, Source, file_of, guarded, head_of, is_file, is_picture

if TYPE_CHECKING:
    from av import AudioStream, VideoStream
    from av.container import InputContainer
    from av.packet import Packet

# FFmpeg would also open playlists (HLS, DASH, concat), which refer to other files and URLs.
_FORMATS = "mov,matroska,avi,ogg,mp3,wav,w64,flac,aiff,au,aac,ac3,amr,mpegts,mpeg,mpegvideo,m4v,flv,asf,caf,h264,hevc"


def open_container(file: str | io.BytesIO, limits: Limits) -> InputContainer:
    """Open a file of a common audio or video format; decoders reject frames above ``limits.max_pixels``."""
    import av

    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file", "max_pixels": str(limits.max_pixels)}
    # A file with tags that are not UTF-8 must still open. PyAV 19 does this by default and has no such argument.
    lenient: dict[str, Any] = {} if int(av.__version__.partition(".")[0]) >= 19 else {"metadata_errors": "replace"}
    return av.open(file, "r", options=options, **lenient)


@guarded
def has_audio_track(source: Source, *, limits: Limits = DEFAULT_LIMITS) -> bool:
    """Whether a file has an audio track (which may be silent). Images and arrays have none.

    Raises:
        MediaError: If the file cannot be opened.
    """
    if not is_file(source) or is_picture(head_of(file := file_of(source))):
        return False
    with open_container(file, limits) as container:
        return find_stream(container, "audio") is not None


@guarded
def modality_of(source: Source, *, limits: Limits = DEFAULT_LIMITS) -> Literal["image", "video", "audio"]:
    """The modality of a file by its content: a webm or mp4 without a video track is audio.

    Raises:
        MediaError: If the file cannot be opened, or is not an image, video or sound.
    """
    file = file_of(source)
    if is_picture(head_of(file)):
        return "image"
    with open_container(file, limits) as container:
        for modality in ("video", "audio"):
            if find_stream(container, modality) is not None:
                return modality
    raise MediaError(source, "it has neither a video nor an audio track; the file is cut off or damaged")


def find_stream(container: InputContainer, modality: str) -> Any:
    """The first video or audio stream that can be decoded, or None. A sound file's cover image is not a video."""
    import av.stream

    for stream in container.streams:
        cover = stream.disposition & av.stream.Disposition.attached_pic
        if stream.type == modality and not cover and stream.codec_context is not None:
            return stream
    return None


def first_stream(container: InputContainer, modality: str, source: object) -> Any:
    """The first video or audio stream, set to single-threaded decoding; the other streams are discarded.

    Raises:
        MediaError: If the file has none.
    """
    import av.stream

    stream = find_stream(container, modality)
    if stream is None:
        hint = "; it has only sound" if modality == "video" else ""
        if find_stream(container, "audio" if modality == "video" else "video") is None:
            hint = "; the file is cut off or damaged"  # every format read here has one of the two
        raise MediaError(source, f"it has no {modality} track{hint}")
    stream.codec_context.thread_count = 1  # data workers are processes: threads would only compete for the cores
    discard = getattr(av.stream, "Discard", None)  # PyAV 15 has none and reads the other streams too
    for other in container.streams:
        if discard is not None and other.index != stream.index:
            other.discard = discard.all
    return stream


def packets_of(container: InputContainer, stream: AudioStream | VideoStream) -> Iterator[Packet]:
    """The packets of a stream in the order of the file. A read error counts as end of file."""
    import av.error

    try:
        yield from (packet for packet in container.demux(stream) if packet.size > 0)
    except av.error.FFmpegError:
        return
