"""Pictures of every kind open upright, in RGB, and what cannot be opened is one `MediaError`."""

from __future__ import annotations

import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media import Limits, modality_of, open_image, open_video
from tests.media.making import encoded, photo

PHOTO = photo()


def test_pngs_equal_pillows_and_changed_bytes_are_refused() -> None:
    rng = np.random.default_rng(0)
    for level in range(10):
        pixels = rng.integers(0, 256, [*rng.integers(1, 60, 2).tolist(), 3], np.uint8)
        data = encoded(Image.fromarray(pixels), "PNG", compress_level=level)
        assert np.array_equal(open_image(data), pixels)
        changed = bytearray(data)
        changed[rng.integers(data.index(b"IDAT"), len(data) - 12)] ^= 255
        with pytest.raises(MediaError):
            open_image(bytes(changed))


def test_sources_and_formats(tmp_path: Path) -> None:
    path, image = tmp_path / "photo ü.png", Image.fromarray(PHOTO)
    image.save(path)
    files = [encoded(image, form) for form in ("BMP", "TIFF", "PPM")]
    for source in (path, str(path), path.read_bytes(), memoryview(path.read_bytes()), PHOTO, image, *files):
        got = open_image(source)
        assert np.array_equal(got, PHOTO)
        assert got.dtype == np.uint8
        assert got.flags.writeable
    for form in ("JPEG", "WEBP"):
        assert np.abs(open_image(encoded(image, form, quality=95)).astype(int) - PHOTO).mean() <= 4


def test_exif_orientation_is_applied() -> None:
    turned = PHOTO[::-1, ::-1]
    stored = [PHOTO, PHOTO[:, ::-1], turned, PHOTO[::-1], PHOTO.transpose(1, 0, 2), np.rot90(PHOTO, 1)]
    stored += [turned.transpose(1, 0, 2), np.rot90(PHOTO, -1)]
    for orientation, pixels in enumerate(stored, start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.fromarray(np.ascontiguousarray(pixels))
        assert np.array_equal(open_image(encoded(image, "PNG", exif=exif)), PHOTO), orientation


def test_alpha_shows_the_background() -> None:
    pixels = np.dstack([PHOTO, np.full(PHOTO.shape[:2], 255, np.uint8)])
    pixels[:24, :32, 3] = 0
    pixels[:24, 32:, 3] = 128
    for source in (encoded(Image.fromarray(pixels), "PNG"), pixels):
        got = open_image(source)
        assert got[5, 5].tolist() == [255, 255, 255]
        assert np.abs(got[5, 40].astype(int) - [137, 237, 137]).max() <= 1
        assert np.array_equal(got[24:], PHOTO[24:])


def test_palettes_and_gray_with_transparency() -> None:
    palette = Image.fromarray(PHOTO).quantize(16)
    assert np.abs(open_image(encoded(palette, "PNG")).astype(int) - PHOTO).max() <= 8
    index = palette.getpixel((0, 0))
    assert open_image(encoded(palette, "PNG", transparency=index))[2, 2].tolist() == [255, 255, 255]
    gray = Image.fromarray(np.full((8, 8, 2), (60, 0), np.uint8), "LA")
    assert open_image(encoded(gray, "PNG"))[0, 0].tolist() == [255, 255, 255]


def test_wide_gray_and_floats_are_scaled() -> None:
    wide = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    share = (wide / 65535).astype(np.float32)
    image, floats = Image.fromarray(wide), Image.fromarray(share)
    for source in (encoded(image, "PNG"), encoded(image, "TIFF"), wide, share, encoded(floats, "TIFF")):
        assert np.array_equal(open_image(source)[..., 1], np.rint(wide / 257.0))
    with pytest.raises(MediaError, match=r"must lie in \[0, 1\]"):
        open_image(share * 300)


def test_large_jpegs_are_decoded_at_a_fraction() -> None:
    data = encoded(Image.fromarray(photo(960, 1280)), "JPEG")
    assert open_image(data).shape == (960, 1280, 3)
    assert open_image(data, at_least=448).shape == (480, 640, 3)
    assert open_image(data, at_least=100).shape == (120, 160, 3)
    assert open_image(data, at_least=5000).shape == (960, 1280, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused() -> None:
    data = bytearray(encoded(Image.fromarray(PHOTO), "PNG"))
    for height, words in ((900, "100000 x 900 pixels are more than the limit"), (100_000, "DecompressionBomb")):
        data[16:24] = struct.pack(">II", 100_000, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        with pytest.raises(MediaError, match=words):
            open_image(bytes(data))
    for source in (PHOTO, Image.fromarray(PHOTO)):
        with pytest.raises(MediaError, match="limit of 100"):
            open_image(source, limits=Limits(max_pixels=100))


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    os.mkfifo(tmp_path / "pipe.png")
    for source, cause in (
        (tmp_path / "missing.png", "missing.png: there is no such file"),
        (tmp_path / "empty.png", "the file is empty"),
        (tmp_path / "text.png", "not an image of a known format"),
        (tmp_path / "pipe.png", "not a regular file"),
        (tmp_path, "it is a folder"),
        (b"", "it is empty"),
        ("a\0b", "null byte"),
        (7, "cannot read 7: expected a path, bytes, .* found int"),
        (None, "cannot read None: expected .* found None$"),
        (np.zeros((2, 2, 2, 2)), "an image has the shape"),
        (np.zeros((0, 4, 3), np.uint8), "it is 4 x 0 pixels"),
        (np.zeros((4, 4), np.int64), "no standard scale"),
    ):
        with pytest.raises(MediaError, match=cause):
            open_image(source)  # type: ignore[arg-type]


def test_a_file_cut_off_is_refused_whatever_lavis_tells_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for form in ("PNG", "JPEG"):
        data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), form)
        with pytest.raises(MediaError, match="truncated"):
            open_image(data[: len(data) // 2])
        assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_avif_is_read_and_heic_named(tmp_path: Path) -> None:
    if features.check("avif"):
        avif = encoded(Image.fromarray(PHOTO), "AVIF", quality=95)
        assert np.abs(open_image(avif).astype(int) - PHOTO).mean() < 6
        assert open_video(avif, lambda count: [count - 1]).shape == (1, *PHOTO.shape)
        assert modality_of(avif) == "image"
    heic = b"\0\0\0\x18ftypheic" + bytes(200)
    for opened in (open_image, lambda source: open_video(source, lambda count: [0])):
        with pytest.raises(MediaError, match="pillow-heif"):
            opened(heic)


def test_a_decoder_that_hangs_costs_its_medium(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(Image, "open", lambda *_, **__: released.wait(60))
    with pytest.raises(MediaError, match=r"decoding took longer than 0\.2 s"):
        open_image(encoded(Image.fromarray(PHOTO), "PNG"), limits=Limits(timeout=0.2))
    released.set()
    monkeypatch.undo()
    assert open_image(encoded(Image.fromarray(PHOTO), "PNG")).shape == PHOTO.shape
