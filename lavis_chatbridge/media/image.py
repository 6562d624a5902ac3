"""Opens images from a path, bytes, an array or a Pillow image, as RGB bytes. Pixels are not normalised."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media.source import DEFAULT_LIMITS, Limits, Source, file_of, guarded, head_of, is_heif

# Pillow's other decoders start programs (EPS) or are rarely tested.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Broken EXIF blocks are common in good photos; a line on stderr for each is noise.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


@guarded
def open_image(
    source: Source,
    *,
    at_least: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> np.ndarray:
    """Open an image: upright, in RGB, with transparent parts white.

    Args:
        source: A path, the bytes of a file, a Pillow image, or an array: ``[H,W]``, ``[H,W,1]``, ``[H,W,3]`` or
            ``[H,W,4]`` of uint8, uint16 (scaled), bool, or floats in [0, 1]. An animation gives its first frame.
        at_least: Shortest useful side, in pixels. A JPEG at least twice as large is decoded at 1/2, 1/4 or 1/8 of its
            size, with both sides at least ``at_least`` long: several times faster for large photos.
        limits: Bounds on its size.

    Returns:
        uint8 ``[H,W,3]``.

    Raises:
        MediaError: If it cannot be opened.
    """
    if isinstance(source, np.ndarray):
        check_size(source, source.shape[1::-1] if source.ndim >= 2 else (0, 0), limits)
        return _array_to_rgb(source)
    with opened(source) as image:
        check_size(source, image.size, limits)
        if image is not source:
            if (pixels := _plain_png(source, image)) is not None:
                return pixels
            if at_least is not None:
                image.draft(None, (at_least, at_least))
        return np.array(to_rgb(image))


@contextmanager
def opened(source: Source) -> Iterator[Image.Image]:
    """Yield a file as a Pillow image. A source that is a Pillow image is yielded itself; its owner closes it.

    Raises:
        MediaError: If it is an AVIF or HEIC image and no installed package reads these.
    """
    if isinstance(source, Image.Image):
        shown = source.tell()
        yield source
        source.seek(shown)
        return
    file = file_of(source)
    head = head_of(file)
    formats = _heif_formats(head, source) if is_heif(head) else _FORMATS
    # LAVIS makes Pillow fill the missing part of a truncated file with gray; here it raises.
    allowed, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with Image.open(file, formats=formats) as image:
            yield image
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = allowed


def _plain_png(source: Source, image: Image.Image) -> np.ndarray | None:
    """Decode an intact 8-bit RGB PNG with FFmpeg, in 60 % of Pillow's time; None for any other file."""
    if image.format != "PNG" or image.mode != "RGB" or "exif" in image.info or getattr(image, "n_frames", 1) > 1:
        return None
    file = file_of(source)
    data = file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
    if b"IEND" not in data[-12:] or b"eXIf" in data[-65_536:]:
        return None
    import av.error

    codec = av.CodecContext.create("png", "r")
    codec.thread_count, codec.options = 1, {"err_detect": "crccheck+explode"}
    try:
        frames = codec.decode(av.Packet(data))
    except av.error.FFmpegError:
        return None
    return frames[0].to_ndarray() if frames and frames[0].format.name == "rgb24" else None


def _heif_formats(head: bytes, source: object) -> tuple[str, ...]:
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    found = tuple(name for name in ("AVIF", "HEIF") if name in Image.OPEN)
    if head[8:10] == b"av" and "AVIF" not in found:
        raise MediaError(source, "it is an AVIF image, which needs Pillow 11.3 or later")
    if head[8:10] == b"he" and "HEIF" not in found:
        raise MediaError(source, "it is a HEIC image: install pillow-heif to read it, or save it as JPEG")
    return found


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a Pillow image of any mode to upright RGB, with transparent parts white."""
    picture = upright(image)
    if picture.mode != "RGBA":
        return picture
    filled = Image.new("RGB", picture.size, "white")
    filled.paste(picture, mask=picture.getchannel("A"))
    return filled


def upright(image: Image.Image) -> Image.Image:
    """Rotate a Pillow image of any mode by its EXIF orientation; RGBA if it may be transparent, else RGB.

    A broken EXIF block counts as none.
    """
    image.load()
    with suppress(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error):
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else it would only copy the pixels
            image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow also uses its 32-bit modes for 16-bit gray
        values = np.nan_to_num(np.array(image, np.float32), posinf=0.0, neginf=0.0)
        full = 65535 if image.mode != "F" else 255 if values.max() > 1 else 1
        return Image.fromarray(_array_to_rgb((values / full).clip(0.0, 1.0)))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def check_size(source: object, size: tuple[int, ...], limits: Limits) -> None:
    """Raise a `MediaError` if ``size`` (width, height) exceeds ``limits``."""
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(source, f"it is {width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise MediaError(source, f"{width} x {height} pixels are more than the limit of {limits.max_pixels}")


def _array_to_rgb(array: np.ndarray) -> np.ndarray:
    """An array, as accepted by `open_image`, as uint8 ``[H,W,3]``."""
    pixels = array[..., None] if array.ndim == 2 else array
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise MediaError(array, "an image has the shape [H,W], [H,W,1], [H,W,3] or [H,W,4]")
    pixels = as_bytes(pixels)
    if pixels.shape[2] == 4:
        return np.array(to_rgb(Image.fromarray(pixels)))
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else np.array(pixels, order="C")


def as_bytes(values: np.ndarray) -> np.ndarray:
    """Pixel values of any common type as uint8.

    Raises:
        MediaError: If the type has no standard scale, or floats lie outside [0, 1].
    """
    dtype: Any = values.dtype
    if dtype == np.uint8:
        return values
    if dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if dtype == np.uint16:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if dtype.kind == "f":
        if not np.isfinite(values).all() or values.min(initial=0.0) < -1e-3 or values.max(initial=0.0) > 1.0 + 1e-3:
            raise MediaError(values, "floating-point pixels must lie in [0, 1]")
        return np.rint(values.clip(0.0, 1.0) * 255.0).astype(np.uint8)
    raise MediaError(values, f"type {dtype} has no standard scale; use uint8, uint16, bool or floats in [0, 1]")
