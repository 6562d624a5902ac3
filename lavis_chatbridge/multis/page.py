"""One HTML file of samples with their media, which opens without a network: look at data before using it."""

from __future__ import annotations

import base64
import io
import json
import random
import wave
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lavis_chatbridge import media, pages
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.files import write_text
from lavis_chatbridge.multis.annotation import describe, read_annotations
from lavis_chatbridge.multis.statistics import table
from lavis_chatbridge.schema import check_inside, media_path

_PICTURE_WIDTH = 320
_FRAMES = 3
_RATE = 16_000
_SECONDS = 10
_LARGEST_CLIP = 2_000_000


def write_page(
    checked: str | Path,
    media_root: str | Path,
    out: str | Path,
    annotations: str | Path | None = None,
    accepted: int = 40,
    rejected: int = 20,
    seed: int = 0,
) -> int:
    """Write the page.

    Args:
        checked: The folder with ``accepted.jsonl``, ``rejected.jsonl`` and ``statistics.json``.
        media_root: The folder that media paths are relative to.
        out: The HTML file.
        annotations: Adds to each sample the text that its writer had.
        accepted: Number of accepted samples.
        rejected: Number of rejected ones.
        seed: Samples both.

    Returns:
        The number of samples on the page.

    Raises:
        DataError: If the folder is not the output of ``multis check``.
    """
    checked, notes = Path(checked), {}
    if annotations is not None:
        notes = {annotation.id: describe(annotation) for annotation in read_annotations(annotations)}
    try:
        numbers = table(json.loads((checked / "statistics.json").read_text(encoding="utf-8")))
        shown = [
            (status, record)
            for status, count in (("accepted", accepted), ("rejected", rejected))
            for record in _sampled(checked / f"{status}.jsonl", count, seed)
        ]
    except OSError as error:
        raise DataError(f"{checked} is not the output of `chatbridge multis check`: {error}") from error
    cards = [_card(status, record, Path(media_root), notes) for status, record in shown]
    write_text(Path(out), pages.render("multis.html", numbers=numbers, cards=cards), errors="replace")
    return len(cards)


def _sampled(file: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` lines sampled evenly from a file of any length (reservoir sampling), in the file's order."""
    rng = random.Random(seed)
    kept: list[tuple[int, bytes]] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines):
            if len(kept) < count:
                kept.append((number, line))
            elif (place := rng.randrange(number + 1)) < count:
                kept[place] = (number, line)
    return [json.loads(line) for _, line in sorted(kept)]


def _card(status: str, record: Mapping[str, Any], root: Path, notes: Mapping[str, str]) -> dict[str, Any]:
    turns = [(turn["role"], turn["text"]) for turn in record.get("turns", ())]
    item = record.get("item") or record.get("meta", {}).get("item")
    return {
        "status": status,
        "id": record["id"],
        "media": [part for entry in record.get("media", ()) for part in _media(entry, root)],
        "reasons": "; ".join(f"{reason['rule']}: {reason['detail']}" for reason in record.get("reasons", ())),
        "turns": turns or [("assistant", record.get("text", ""))],
        "notes": notes.get(item, ""),
    }


def _media(entry: Mapping[str, Any], root: Path) -> Iterator[tuple[str, str, str]]:
    """The elements that show a medium: ``img``, ``video``, ``audio`` or ``error``; label; data."""
    try:
        path = Path(media_path(entry["path"], str(root), "the sample"))
        check_inside(str(path), str(root))
        if entry["type"] == "image":
            yield "img", "image of the sample", _picture(media.open_image(path))
        elif entry["type"] == "audio":
            yield "audio", "sound of the sample", _sound(media.open_audio(path, rate=_RATE))
        else:
            frames = media.open_video(
                path, lambda count: [(2 * i + 1) * count // (2 * _FRAMES) for i in range(_FRAMES)]
            )
            for number, frame in enumerate(frames, start=1):
                yield "img", f"frame {number} of {_FRAMES}", _picture(frame)
            if path.suffix.lower() in (".mp4", ".webm") and path.stat().st_size <= _LARGEST_CLIP:
                yield "video", "clip of the sample", _data_uri(f"video/{path.suffix.lower()[1:]}", path.read_bytes())
    except (MediaError, DataError) as error:
        yield "error", str(error), ""


def _picture(pixels: np.ndarray) -> str:
    from PIL import Image

    picture, out = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((_PICTURE_WIDTH, _PICTURE_WIDTH))
    picture.save(out, "JPEG", quality=80)
    return _data_uri("image/jpeg", out.getvalue())


def _sound(samples: np.ndarray) -> str:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE)
        file.writeframes((np.clip(samples[: _SECONDS * _RATE], -1, 1) * 32767).astype("<i2").tobytes())
    return _data_uri("audio/wav", out.getvalue())


def _data_uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
