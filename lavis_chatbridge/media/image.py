"""Opens images: a path, bytes, an array or a Pillow image become RGB bytes. Knows no model and no normalisation."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media.source import DEFAULT_LIMITS, Limits, Source, file_of, guarded, head_of, is_heif

WHITE = (255, 255, 255)

# Pillow's other decoders start programs (EPS) or are rarely tested.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Broken EXIF blocks are common in good photos; a line on stderr for each is noise.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


@guarded
def open_image(
    source: Source,
    *,
    at_least: int | None = None,
    background: tuple[int, int, int] = WHITE,
    limits: Limits = DEFAULT_LIMITS,
) -> np.ndarray:
    """Open an image upright, in RGB.

    Args:
        source: A path, the bytes of a file, a Pillow image, or an array: ``[H,W]``, ``[H,W,1]``, ``[H,W,3]`` or
            ``[H,W,4]`` of uint8, uint16 (scaled), bool, or floats in [0, 1]. An animation gives its first frame.
        at_least: Shortest useful side, in pixels. A JPEG at least twice as large is decoded at 1/2, 1/4 or 1/8 of its
            size, with both sides at least ``at_least`` long: several times faster for large photos.
        background: Replaces transparent parts.
        limits: Bounds on its size.

    Returns:
        uint8 ``[H,W,3]``.

    Raises:
        MediaError: If it cannot be opened.
    """
    if isinstance(source, np.ndarray):
        check_size(source, source.shape[1::-1] if source.ndim >= 2 else (0, 0), limits)
        return _array_to_rgb(source, background)
    if isinstance(source, Image.Image):
        check_size(source, source.size, limits)
        return np.array(to_rgb(source, background))
    file = file_of(source)
    with whole_files_only(), Image.open(file, formats=formats_of(head_of(file), source)) as image:
        check_size(source, image.size, limits)
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        return np.array(to_rgb(image, background))


def formats_of(head: bytes, source: object) -> tuple[str, ...]:
    """Pillow's decoders for a file that begins with ``head``.

    Raises:
        MediaError: If it is an AVIF or HEIC image and no installed package reads these.
    """
    if not is_heif(head):
        return PICTURE_FORMATS
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


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """A Pillow image of any mode as an upright RGB image, with ``background`` in its transparent parts."""
    picture = upright(image)
    if picture.mode != "RGBA":
        return picture
    filled = Image.new("RGB", picture.size, background)
    filled.paste(picture, mask=picture.getchannel("A"))
    return filled


def upright(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode, turned as its EXIF block says, as RGBA if it may be transparent, else as RGB.

    Palette, bit depth, colour space and orientation are applied to the pixels.
    """
    image.load()
    with suppress(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error):
        image = ImageOps.exif_transpose(image)  # a broken EXIF block does not make a good image unreadable
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_array_to_rgb(_wide_gray(image), WHITE))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return image


@contextmanager
def whole_files_only() -> Iterator[None]:
    """Make Pillow raise on truncated files: LAVIS sets it to fill the missing part with gray."""
    allowed, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = allowed


def check_size(source: object, size: tuple[int, ...], limits: Limits) -> None:
    """Raises MediaError: If ``size`` (width, height) is not within ``limits``."""
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(source, f"it is {width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise MediaError(source, f"{width} x {height} pixels are more than the limit of {limits.max_pixels}")


def _wide_gray(image: Image.Image) -> np.ndarray:
    """Gray of 16 or 32 bits or floats, as uint16 or floats in [0, 1].

    Pillow opens 16-bit files in 32-bit modes too, so integers are scaled as 16-bit ones; floats above 1 are scaled as
    bytes.
    """
    values = np.array(image)
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        return values / 255.0 if values.max() > 1.0 else values
    return values.clip(0, 65535).astype(np.uint16)


def _array_to_rgb(array: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """An array in one of the forms of `open_image` as uint8 ``[H,W,3]``."""
    pixels = array[..., None] if array.ndim == 2 else array
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise MediaError(array, "an image has the shape [H,W], [H,W,1], [H,W,3] or [H,W,4]")
    pixels = as_bytes(pixels)
    if pixels.shape[2] == 4:
        alpha = pixels[..., 3:].astype(np.float32) / 255.0
        mixed = pixels[..., :3] * alpha + np.asarray(background, np.float32) * (1.0 - alpha)
        return np.rint(mixed).astype(np.uint8)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else np.array(pixels, order="C")


def as_bytes(values: np.ndarray) -> np.ndarray:
    """Brightness of any common type as uint8.

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
