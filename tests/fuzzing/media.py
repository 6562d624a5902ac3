"""Hostile pictures, videos and sounds: mutated real files, and headers that lie."""

from __future__ import annotations

import functools
import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from PIL import Image

from lavis_chatbridge.media import Limits, has_audio_track, open_audio, open_image, open_video
from tests.fuzzing.mutations import mutated_bytes
from tests.fuzzing.target import Target
from tests.media.making import encoded, photo, sound_file, tone, video_file

LIMITS = Limits(max_pixels=40_000_000, max_seconds=600.0, max_bytes=1 << 29, timeout=8.0)
"""Those of a server, with less time."""
FOLDERS = "FUZZ_MEDIA"
"""Environment variable: folders of real files, which are mutated too."""
_LARGEST = 2_000_000
_SUFFIXES = {
    "image": (".png", ".jpg", ".jpeg", ".gif", ".tif", ".tiff", ".bmp", ".webp"),
    "video": (".mp4", ".avi", ".mkv", ".webm"),
    "audio": (".wav", ".mp3", ".ogg", ".flac"),
}


@functools.cache
def real_files(kind: str) -> tuple[bytes, ...]:
    """Files made here, and those of the folders that ``FUZZ_MEDIA`` names."""
    made = {"image": _pictures, "video": _videos, "audio": _sounds}[kind]()
    for folder in filter(None, os.environ.get(FOLDERS, "").split(os.pathsep)):
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix.lower() in _SUFFIXES[kind] and path.stat().st_size <= _LARGEST:
                made.append(path.read_bytes())
    return tuple(made)


def _pictures() -> list[bytes]:
    picture = Image.fromarray(photo())
    turned = [picture.rotate(9), picture.rotate(30)]
    deep = Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        encoded(picture, "JPEG", exif=exif),
        encoded(picture, "JPEG", progressive=True),
        encoded(picture.convert("CMYK"), "JPEG"),
        encoded(picture.convert("RGBA"), "PNG"),
        encoded(picture.convert("P"), "PNG"),
        encoded(deep, "PNG"),
        encoded(picture, "WEBP"),
        encoded(picture.convert("RGBA"), "WEBP", lossless=True),
        encoded(picture, "WEBP", save_all=True, append_images=turned),
        encoded(picture, "GIF", save_all=True, append_images=turned),
        encoded(picture, "BMP"),
        encoded(picture.convert("1"), "BMP"),
        encoded(picture, "TIFF", compression="tiff_lzw"),
        encoded(picture, "TIFF", compression="tiff_adobe_deflate"),
        encoded(picture, "TIFF"),
        encoded(picture, "PPM"),
        encoded(picture, "PNG", save_all=True, append_images=turned),
    ]


def _videos() -> list[bytes]:
    sound = tone(0.3, 48_000)
    return [
        video_file(10, sound=sound),
        video_file(10, rotation=90),
        video_file(10, form="matroska", sound=sound),
        video_file(6, form="webm", codec="libvpx-vp9", b_frames=0, sound=sound),
        video_file(10, form="avi", codec="mpeg4"),
        video_file(10, form="mpegts"),
        video_file(8, form="mp4", codec="mpeg4"),
    ]


def _sounds() -> list[bytes]:
    sound = tone(0.4, 48_000)
    stereo = np.stack([sound, sound])
    forms = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("WAV", "ULAW"), ("FLAC", None), ("OGG", None)]
    forms += [("OGG", "OPUS"), ("MP3", None), ("AIFF", None), ("CAF", "ALAC_16"), ("AU", None), ("RF64", None)]
    return [sound_file(stereo if number % 2 else sound, 48_000, *form) for number, form in enumerate(forms)]


def _maker(*kinds: str) -> Callable[[random.Random], bytes]:
    def make(rng: random.Random) -> bytes:
        return mutated_bytes(rng.choice(real_files(rng.choice(kinds))), rng)

    return make


def _sound_result(samples: np.ndarray) -> None:
    assert samples.dtype == np.float32
    assert samples.size
    assert np.isfinite(samples).all()


def _feed_image(data: bytes, folder: Path) -> None:
    pixels = open_image(data, at_least=224, limits=LIMITS)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3


def _feed_video(data: bytes, folder: Path) -> None:
    frames = open_video(data, lambda count: [count // 8, count // 2, count - 1], limits=LIMITS)
    assert frames.shape[0] == frames.shape[3] == 3


def _feed_audio(data: bytes, folder: Path) -> None:
    if data[-1] % 8 == 0:
        has_audio_track(data, limits=LIMITS)
    path = folder / "sound"
    path.write_bytes(data)
    _sound_result(open_audio(path if data[-1] % 2 else data, limits=LIMITS))


# ---- pictures that lie


def _png(width: int, height: int, data: bytes, bits: int = 8, colour: int = 0, extra: bytes = b"") -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _zeros(count: int) -> bytes:
    """So many zero bytes as a zlib stream, never in memory whole."""
    packer = zlib.compressobj(9)
    block, pieces = bytes(1 << 20), []
    for _ in range(count >> 20):
        pieces.append(packer.compress(block))
    pieces.append(packer.compress(bytes(count & 0xFFFFF)))
    return b"".join([*pieces, packer.flush()])


def _chunk_bomb(name: bytes, head: bytes) -> bytes:
    content = head + _zeros(1 << 28)
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return _png(4, 4, _zeros(20), extra=chunk)


def _many_frames(count: int) -> bytes:
    """A GIF of so many frames of one pixel."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    frame = b"!\xf9\x04\x00\x00\x00\x00\x00" + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02D\x01\x00"
    return head + frame * count + b";"


def _many_pages(count: int, empty: bool = False, circle: bool = False) -> bytes:
    """A TIFF of so many directories of pages behind its first."""
    data = encoded(Image.new("L", (2, 2)), "TIFF")
    start = struct.unpack_from("<I", data, 4)[0]
    size = 2 + 12 * struct.unpack_from("<H", data, start)[0]
    page = b"\0\0" if empty else data[start : start + size]
    places = range(len(data), len(data) + count * (len(page) + 4), len(page) + 4)
    links = [*places[1:], start if circle else 0]
    pages = b"".join(page + struct.pack("<I", link) for link in links)
    return data[: start + size] + struct.pack("<I", places[0]) + data[start + size + 4 :] + pages


_COMMENT = b"!\xfe" + b"\1a" * 5_000_000 + b"\0"


def _with(data: bytes, place: int, form: str, *values: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, place, *values)
    return bytes(changed)


def _jpeg_size(height: int, width: int) -> bytes:
    data = encoded(Image.fromarray(photo()), "JPEG")
    return _with(data, data.index(b"\xff\xc0") + 5, ">HH", height, width)


def _bmp(width: int, height: int) -> bytes:
    return _with(encoded(Image.fromarray(photo()), "BMP"), 18, "<ii", width, height)


def _gif(width: int, height: int) -> bytes:
    return _with(encoded(Image.fromarray(photo()), "GIF"), 6, "<HH", width, height)


def _tiff_tags(tag: int, value: int) -> bytes:
    data = bytearray(encoded(Image.fromarray(photo()), "TIFF"))
    start = struct.unpack_from("<I", data, 4)[0]
    for entry in range(struct.unpack_from("<H", data, start)[0]):
        place = start + 2 + 12 * entry
        if struct.unpack_from("<H", data, place)[0] == tag:
            struct.pack_into("<HII", data, place + 2, 4, 1, value)
    return bytes(data)


IMAGE_CASES: dict[str, Callable[[], bytes]] = {
    "PNG bomb: 60,000 x 60,000 pixels in 450 kB": lambda: _png(60_000, 60_000, _zeros(60_000 * 7501), bits=1),
    "PNG bomb: 2^31 x 2^31 pixels": lambda: _png(2**31 - 1, 2**31 - 1, _zeros(1000)),
    "PNG: as many pixels as allowed in 39 kB": lambda: _png(8000, 5000, _zeros(5000 * 8001)),
    "PNG with 256 MB of compressed text": lambda: _chunk_bomb(b"zTXt", b"a\0\0"),
    "PNG with a colour profile of 256 MB": lambda: _chunk_bomb(b"iCCP", b"a\0\0"),
    "PNG with 256 MB of international text": lambda: _chunk_bomb(b"iTXt", b"a\0\1\0\0\0"),
    "PNG 100,000 pixels wide": lambda: _png(100_000, 100, _zeros(100 * 100_001)),
    "PNG 100,000 pixels high, 1 wide": lambda: _png(1, 100_000, _zeros(2 * 100_000)),
    "PNG of no width": lambda: _png(0, 10, _zeros(10)),
    "PNG of no height": lambda: _png(10, 0, _zeros(10)),
    "PNG without pixels": lambda: _png(64, 48, b""),
    "JPEG that claims 65,535 x 65,535": lambda: _jpeg_size(65_535, 65_535),
    "JPEG of no height": lambda: _jpeg_size(0, 64),
    "BMP that claims 2^31 rows": lambda: _bmp(64, -(2**31)),
    "BMP of no width": lambda: _bmp(0, 48),
    "GIF that claims 65,535 x 65,535": lambda: _gif(65_535, 65_535),
    "GIF of no size": lambda: _gif(0, 0),
    "GIF that begins with a comment of 5 million blocks": lambda: (
        _many_frames(1)[:19] + _COMMENT + _many_frames(1)[19:]
    ),
    "TIFF 2^31 wide": lambda: _tiff_tags(256, 2**31 - 1),
    "TIFF of 2^32 - 1 samples per pixel": lambda: _tiff_tags(277, 2**32 - 1),
    "TIFF of 2^32 - 1 rows per strip": lambda: _tiff_tags(278, 2**32 - 1),
    "PPM that claims 10^9 x 10^9": lambda: b"P6\n1000000000 1000000000\n255\n" + bytes(100),
    "PPM with a number of 100,000 digits": lambda: b"P6\n" + b"9" * 100_000 + b" 1\n255\n" + bytes(100),
    "one byte": lambda: b"\x89",
    "a terabyte of nothing, named": lambda: b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 0x7FFFFFFF) + b"IHDR" + bytes(13),
}


# ---- videos that lie


def _box(data: bytes, name: bytes, place: int, form: str, *values: int) -> bytes:
    """An mp4 with other numbers at a place of its box of this name."""
    return _with(data, data.index(name) + 4 + place, form, *values)


@functools.cache
def _mp4() -> bytes:
    return video_file(10)


@functools.cache
def _avi() -> bytes:
    return video_file(10, form="avi", codec="mpeg4")


def _mkv_number(element: bytes, content: bytes) -> bytes:
    data = video_file(10, form="matroska")
    place = data.index(element) + len(element)
    size = data[place] & 0x7F
    return data[: place + 1] + content[:size].ljust(size, b"\0") + data[place + 1 + size :]


def _zero_frames(count: int) -> bytes:
    """An mp4 that claims ``count`` frames of no bytes each."""
    data = _mp4()
    return _box(data, b"stsz", 4, ">II", 1, count)


VIDEO_CASES: dict[str, Callable[[], bytes]] = {
    "mp4 that claims 10 hours": lambda: _box(_mp4(), b"mvhd", 12, ">II", 1, 36_000),
    "mp4 that claims 2^31 frames": lambda: _zero_frames(2**31 - 1),
    "mp4 that claims no frames": lambda: _zero_frames(0),
    "mp4 that claims 65,535 x 65,535": lambda: _box(_mp4(), b"avc1", 24, ">HH", 65_535, 65_535),
    "mp4 of no size": lambda: _box(_mp4(), b"avc1", 24, ">HH", 0, 0),
    "mp4 whose frames last no time": lambda: _box(_mp4(), b"stts", 4, ">III", 1, 10, 0),
    "mp4 whose one frame lasts 2^32 units": lambda: _box(_mp4(), b"stts", 4, ">III", 1, 10, 2**32 - 1),
    "mp4 of 2^32 - 1 units a second": lambda: _box(_mp4(), b"mdhd", 12, ">I", 2**32 - 1),
    "mp4 of no units a second": lambda: _box(_mp4(), b"mdhd", 12, ">I", 0),
    "mp4 whose box is larger than the file": lambda: _box(_mp4(), b"moov", -8, ">I", 2**32 - 1),
    "AVI that claims 2^32 - 1 frames": lambda: _with(_avi(), _avi().index(b"avih") + 24, "<I", 2**32 - 1),
    "AVI that claims 2^31 x 2^31": lambda: _with(_avi(), _avi().index(b"strf") + 12, "<ii", 2**31 - 1, 2**31 - 1),
    "AVI of no size": lambda: _with(_avi(), _avi().index(b"strf") + 12, "<ii", 0, 0),
    "AVI of no frames a second": lambda: _with(_avi(), _avi().index(b"strh") + 28, "<II", 0, 0),
    "mkv that claims 10^30 seconds": lambda: _mkv_number(b"\x44\x89", struct.pack(">d", 1e33)),
    "mkv whose duration is no number": lambda: _mkv_number(b"\x44\x89", struct.pack(">d", float("nan"))),
    "mkv that claims 65,535 wide": lambda: _mkv_number(b"\xb0", b"\xff\xff"),
    "GIF of 1,800,000 frames": lambda: _many_frames(1_800_000),
    "GIF of 5,000 frames": lambda: _many_frames(5000),
    "GIF with a comment of 5 million blocks": lambda: _many_frames(1)[:-1] + _COMMENT + _many_frames(1)[19:],
    "GIF whose one frame has 5 million blocks": lambda: _many_frames(1)[:-5] + b"\1a" * 5_000_000 + b"\0;",
    "TIFF of 1,000,000 empty pages": lambda: _many_pages(1_000_000, empty=True),
    "TIFF of 120,000 pages": lambda: _many_pages(120_000),
    "TIFF whose pages go in a circle": lambda: _many_pages(1, circle=True),
    "playlist of another file": lambda: (
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    ),
    "list of other files": lambda: b"ffconcat version 1.0\nfile '/etc/passwd'\n",
}


# ---- sounds that lie


def _wav(rate: int = 16_000, channels: int = 1, bits: int = 16, length: int | None = None, code: int = 1) -> bytes:
    content = bytes(3200)
    stated = len(content) if length is None else length
    head = struct.pack("<HHIIHH", code, channels, rate, rate * 2 & 0xFFFFFFFF, 2, bits)
    riff = b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", stated) + content
    return b"RIFF" + struct.pack("<I", min(2**32 - 1, stated + 36)) + riff


def _flac(samples: int) -> bytes:
    data = bytearray(sound_file(tone(0.4, 16_000), 16_000, "FLAC"))
    data[21] = data[21] & 0xF0 | samples >> 32 & 0x0F
    data[22:26] = (samples & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(data)


@functools.cache
def _long_silence(form: str, hours: float, rate: int = 8000) -> bytes:
    out, block = io.BytesIO(), np.zeros(rate * 60, np.int16)
    with soundfile.SoundFile(out, "w", rate, 1, format=form) as sound:
        for _ in range(round(hours * 60)):
            sound.write(block)
    return out.getvalue()


def _unknown_length(flac: bytes) -> bytes:
    data = bytearray(flac)
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    return bytes(data)


def _sound_in_mp4(hours: float) -> bytes:
    """Silence of so many hours as AAC, whose frames are repeated without being encoded again."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        packets = [packet for _ in range(4) for packet in stream.encode(frame)]
        for number in range(round(hours * 3600 * 8000 / 1024)):
            packet = packets[-1]
            packet.pts = packet.dts = number * 1024
            packet.stream = stream
            container.mux(packet)
    return out.getvalue()


AUDIO_CASES: dict[str, Callable[[], bytes]] = {
    "wav that claims 10 hours": lambda: _wav(length=10 * 3600 * 32_000),
    "wav that claims 2^32 - 1 bytes": lambda: _wav(length=2**32 - 1),
    "wav of no rate": lambda: _wav(rate=0),
    "wav of 2^32 - 1 Hz": lambda: _wav(rate=2**32 - 1),
    "wav of 1 Hz": lambda: _wav(rate=1),
    "wav of 767,957 Hz, a prime": lambda: _wav(rate=767_957),
    "wav of no channels": lambda: _wav(channels=0),
    "wav of 65,535 channels": lambda: _wav(channels=65_535),
    "wav of no bits": lambda: _wav(bits=0),
    "wav of an unknown code": lambda: _wav(code=0xFFFE),
    "wav without sound": lambda: _wav(length=0)[:44],
    "flac that claims 10 hours": lambda: _flac(10 * 3600 * 16_000),
    "flac that claims 2^36 - 1 samples": lambda: _flac(2**36 - 1),
    "flac of 2 hours of silence": lambda: _long_silence("FLAC", 2.0),
    "flac of 2 hours that states no length": lambda: _unknown_length(_long_silence("FLAC", 2.0)),
    "ogg of 1 hour of silence": lambda: _long_silence("OGG", 1.0),
    "mp4 with 10 hours of silence": lambda: _sound_in_mp4(10.0),
    "samples that are no numbers": lambda: sound_file(np.full(1000, np.nan, np.float32), 16_000, "WAV", "FLOAT"),
    "samples that are infinite": lambda: sound_file(np.full(1000, np.inf, np.float32), 16_000, "WAV", "FLOAT"),
    "one byte": lambda: b"R",
}

TARGETS = (
    Target("image", _maker("image"), _feed_image, IMAGE_CASES, megabytes=600),
    Target("video", _maker("video", "video", "image"), _feed_video, VIDEO_CASES, megabytes=600),
    Target("audio", _maker("audio", "audio", "video"), _feed_audio, AUDIO_CASES, megabytes=300),
)
