"""Opens pictures: path, bytes, array or Pillow image -> RGB bytes. Knows nothing of models or normalisation."""

from __future__ import annotations

import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media import gif
from lavis_chatbridge.media.limits import DEFAULT_LIMITS, Limits
from lavis_chatbridge.media.source import Deadline, Source, file_of, head_of, media_errors

WHITE = (255, 255, 255)

# Only these decoders are offered a file: Pillow knows others that start programs (EPS) or are hardly ever exercised.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Broken EXIF blocks are common in good photos; a line on stderr for each helps nobody.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(
    source: Source,
    *,
    at_least: int | None = None,
    background: tuple[int, int, int] = WHITE,
    limits: Limits = DEFAULT_LIMITS,
) -> np.ndarray:
    """Open a picture upright, in RGB.

    Args:
        source: A path, the bytes of a file, a Pillow image, or an array: ``[H,W]``, ``[H,W,1]``, ``[H,W,3]`` or
            ``[H,W,4]`` of uint8, uint16 (scaled), bool, or floats in [0, 1]. Of an animation, the first frame.
        at_least: Shortest side that is of use, in pixels. A JPEG that is at least twice as large is then decoded at
            1/2, 1/4 or 1/8 of its size, with both sides still ``at_least`` long: several times faster for large photos.
        background: What shows through where the picture is transparent.
        limits: Bounds on its size.

    Returns:
        uint8 ``[H,W,3]``.

    Raises:
        MediaError: If it cannot be opened.
    """
    with media_errors(source):
        if isinstance(source, np.ndarray):
            check_size(source, source.shape[1::-1] if source.ndim >= 2 else (0, 0), limits)
            return _array_to_rgb(source, background)
        if isinstance(source, Image.Image):
            check_size(source, source.size, limits)
            return np.array(to_rgb(source, background))
        file = file_of(source)
        if head_of(file).startswith(gif.HEADS):
            gif.count_frames(file, source, 0, Deadline(source, limits.timeout))
        with whole_files_only(), Image.open(file, formats=PICTURE_FORMATS) as image:
            check_size(source, image.size, limits)
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            return np.array(to_rgb(image, background))


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """A Pillow image of any mode as an upright RGB image, its transparency filled with ``background``."""
    picture = upright(image)
    if picture.mode != "RGBA":
        return picture
    filled = Image.new("RGB", picture.size, background)
    filled.paste(picture, mask=picture.getchannel("A"))
    return filled


def upright(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode, turned as its EXIF block says, as RGBA if it may be transparent, else as RGB.

    What palette, bit depth, colour space and orientation say is then in the pixels.
    """
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_array_to_rgb(_wide_gray(image), WHITE))  # gray, so nothing shows through
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


@contextmanager
def whole_files_only() -> Iterator[None]:
    """Pillow refuses a file that has been cut off, although LAVIS tells it to fill up what is missing with gray.

    What LAVIS told it holds again as soon as no thread is inside.
    """
    with _truncation.lock:
        if _truncation.inside == 0:
            _truncation.allowed = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _truncation.inside += 1
    try:
        yield
    finally:
        with _truncation.lock:
            _truncation.inside -= 1
            if _truncation.inside == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _truncation.allowed


class _Truncation:
    """Pillow's global switch while this module has turned it off."""

    lock = threading.Lock()
    inside = 0
    allowed = False


_truncation = _Truncation()


def check_size(source: object, size: tuple[int, ...], limits: Limits) -> None:
    """Raises MediaError: If ``size`` (width, height) is not within ``limits``."""
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(source, f"it is {width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise MediaError(source, f"{width} x {height} pixels are more than the limit of {limits.max_pixels}")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none. A broken EXIF block does not make a good picture unreadable."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error):
        return 1


def _wide_gray(image: Image.Image) -> np.ndarray:
    """Gray of 16 or 32 bits or floats, as uint16 or floats in [0, 1].

    Pillow gives 32-bit modes to 16-bit files too, so integers are read on the 16-bit scale; floats beyond 1 on that of
    bytes.
    """
    values = np.array(image)
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        return values / 255.0 if values.max() > 1.0 else values
    return values.clip(0, 65535).astype(np.uint16)


def _array_to_rgb(array: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """An array as uint8 ``[H,W,3]``; see `open_image` for the forms that it may have."""
    pixels = array[..., None] if array.ndim == 2 else array
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise MediaError(array, "a picture has the shape [H,W], [H,W,1], [H,W,3] or [H,W,4]")
    pixels = as_bytes(pixels)
    if pixels.shape[2] == 4:
        alpha = pixels[..., 3:].astype(np.float32) / 255.0
        mixed = pixels[..., :3] * alpha + np.asarray(background, np.float32) * (1.0 - alpha)
        return np.rint(mixed).astype(np.uint8)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else np.array(pixels, order="C")


def as_bytes(values: np.ndarray) -> np.ndarray:
    """Brightness of any common type as uint8.

    Raises:
        MediaError: If the type has no agreed scale, or floats lie outside [0, 1].
    """
    kind: Any = values.dtype
    if kind == np.uint8:
        return values
    if kind == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if kind == np.uint16:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if kind.kind == "f":
        if not np.isfinite(values).all() or values.min(initial=0.0) < -1e-3 or values.max(initial=0.0) > 1.0 + 1e-3:
            raise MediaError(values, "floating-point pixels must lie in [0, 1]")
        return np.rint(values.clip(0.0, 1.0) * 255.0).astype(np.uint8)
    raise MediaError(values, f"type {kind} has no agreed scale; give uint8, uint16, bool or floats in [0, 1]")
