"""Pictures of every kind open upright, in RGB, and what cannot be opened is one `MediaError`."""

from __future__ import annotations

import os
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media import Limits, modality_of, open_image, open_video
from tests.media.making import encoded, photo

PHOTO = photo()


@pytest.mark.parametrize(
    ("form", "options", "difference"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("PPM", {}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 4),
        ("WEBP", {"quality": 95}, 4),
    ],
)
def test_formats(form: str, options: dict, difference: float) -> None:
    got = open_image(encoded(Image.fromarray(PHOTO), form, **options))
    assert got.shape == PHOTO.shape
    assert np.abs(got.astype(int) - PHOTO).mean() <= difference


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


def test_sources(tmp_path: Path) -> None:
    path = tmp_path / "photo ü.png"
    Image.fromarray(PHOTO).save(path)
    for source in (path, str(path), path.read_bytes(), memoryview(path.read_bytes()), PHOTO, Image.fromarray(PHOTO)):
        got = open_image(source)
        assert np.array_equal(got, PHOTO)
        assert got.dtype == np.uint8
        assert got.flags.writeable


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    stored = {
        1: PHOTO,
        2: PHOTO[:, ::-1],
        3: PHOTO[::-1, ::-1],
        4: PHOTO[::-1],
        5: PHOTO.transpose(1, 0, 2),
        6: np.rot90(PHOTO, 1),
        7: PHOTO[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PHOTO, -1),
    }[orientation]
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(open_image(encoded(image, "PNG", exif=exif)), PHOTO)


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


def _png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100_000))), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused() -> None:
    with pytest.raises(MediaError, match="100000 x 900 pixels are more than the limit"):
        open_image(_png_claiming(100_000, 900))
    with pytest.raises(MediaError):
        open_image(_png_claiming(100_000, 100_000))
    for source in (PHOTO, Image.fromarray(PHOTO)):
        with pytest.raises(MediaError, match="limit of 100"):
            open_image(source, limits=Limits(max_pixels=100))


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    os.mkfifo(tmp_path / "pipe.png")
    cases = {
        "missing.png": "there is no such file",
        "empty.png": "the file is empty",
        "text.png": "not an image of a known format",
        "pipe.png": "not a regular file",
        ".": "it is a folder",
    }
    for name, cause in cases.items():
        with pytest.raises(MediaError, match=cause) as caught:
            open_image(tmp_path / name)
        assert str(tmp_path) in caught.value.source
    good = encoded(Image.fromarray(PHOTO), "PNG")
    for source in (b"", b"hello", good[:-40], 7, None, "a\0b", np.zeros((2, 2, 2, 2)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(MediaError):
            open_image(source)  # type: ignore[arg-type]
    with pytest.raises(MediaError, match="no standard scale"):
        open_image(np.zeros((4, 4), np.int64))


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
    begin = time.monotonic()
    with pytest.raises(MediaError, match=r"decoding took longer than 0\.2 s"):
        open_image(encoded(Image.fromarray(PHOTO), "PNG"), limits=Limits(timeout=0.2))
    assert time.monotonic() - begin < 10
    released.set()
    monkeypatch.undo()
    assert open_image(encoded(Image.fromarray(PHOTO), "PNG")).shape == PHOTO.shape
