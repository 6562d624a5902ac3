"""Opens containers (mp4, mkv, webm, avi, ogg, mp3 ...) with PyAV, shut off from everything but the one file."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media.limits import DEFAULT_LIMITS, Limits
from lavis_chatbridge.media.source import Source, file_of, head_of, is_file, is_picture, media_errors

if TYPE_CHECKING:
    from av.container import InputContainer

# Playlists (HLS, DASH, concat) are containers to FFmpeg too, and may name other files and addresses: only these are
# read.
_FORMATS = "mov,matroska,avi,ogg,mp3,wav,w64,flac,aiff,au,aac,ac3,amr,mpegts,mpeg,mpegvideo,m4v,flv,asf,caf,h264,hevc"


def open_container(file: str | io.BytesIO, limits: Limits) -> InputContainer:
    """Open a file of a common audio or video format; the decoders refuse frames above ``limits.max_pixels``."""
    import av

    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file", "max_pixels": str(limits.max_pixels)}
    # Tags that are not UTF-8 must not cost the file. PyAV 19 reads them by itself, and has no such argument any more.
    lenient: dict[str, Any] = {} if int(av.__version__.partition(".")[0]) >= 19 else {"metadata_errors": "replace"}
    return av.open(file, "r", options=options, **lenient)


def has_audio_track(source: Source, *, limits: Limits = DEFAULT_LIMITS) -> bool:
    """Whether a file has a sound track (which may be silent). Pictures and arrays have none.

    Raises:
        MediaError: If the file cannot be opened.
    """
    with media_errors(source):
        if not is_file(source):
            return False
        file = file_of(source)
        if is_picture(head_of(file)):
            return False
        with open_container(file, limits) as container:
            return len(container.streams.audio) > 0


def first_stream(container: InputContainer, kind: str, source: object) -> Any:
    """The first video or audio stream; the cover of a sound file is no video.

    Raises:
        MediaError: If there is none.
    """
    import av.stream

    for stream in container.streams:
        cover = stream.disposition & av.stream.Disposition.attached_pic
        if stream.type == kind and not cover and stream.codec_context is not None:
            stream.codec_context.thread_count = 1  # data workers are processes: threads would only fight over the cores
            skipped = getattr(av.stream, "Discard", None)  # PyAV 15, which lmms-eval pins, reads what it does not need
            for other in container.streams:
                if skipped is not None and other.index != stream.index:
                    other.discard = skipped.all
            return stream
    raise MediaError(source, f"it has no {kind} track")
