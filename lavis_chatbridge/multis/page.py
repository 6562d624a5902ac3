"""Writes an HTML page of checked samples with their media, for inspection before training."""

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

from lavis_chatbridge import media
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.files import write_text
from lavis_chatbridge.multis.annotation import describe, json_objects, read_annotations
from lavis_chatbridge.multis.check import table
from lavis_chatbridge.pages import render
from lavis_chatbridge.schema import check_inside, media_path

_PICTURE_WIDTH = 320
_FRAMES = 3
_RATE = 16_000
_SECONDS = 10


def write_page(
    checked: str | Path,
    media_root: str | Path,
    out: str | Path,
    accepted: int = 40,
    rejected: int = 20,
    seed: int = 0,
    annotations: str | Path | None = None,
) -> int:
    """Write the page.

    Args:
        checked: The folder of ``multis check``.
        media_root: Folder that media paths are relative to.
        out: The HTML file.
        accepted: Number of accepted samples, sampled by ``seed``.
        rejected: Number of rejected samples.
        seed: See ``accepted``.
        annotations: If given, each sample's description is also shown.

    Returns:
        Number of samples on the page.

    Raises:
        DataError: If ``checked`` is not an output of ``multis check``.
    """
    checked, rng = Path(checked), random.Random(seed)
    notes = {a.id: describe(a) for a in read_annotations(annotations)} if annotations else {}
    try:
        numbers = table(json.loads((checked / "statistics.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{checked} was not made by `chatbridge multis check`: {error}") from error
    cards = []
    for state, count in (("accepted", accepted), ("rejected", rejected)):
        records = [record for _, record in json_objects(checked / f"{state}.jsonl")]
        chosen = sorted(rng.sample(range(len(records)), min(count, len(records))))
        cards += [_card(state, records[index], Path(media_root), notes) for index in chosen]
    write_text(Path(out), render("multis.html", table=numbers, cards=cards), errors="replace")
    return len(cards)


def _card(state: str, record: Mapping[str, Any], root: Path, notes: Mapping[str, str]) -> dict[str, Any]:
    return {
        "state": state,
        "id": record["id"],
        "media": list(_media(record.get("media", ()), root)),
        "reasons": "; ".join(f"{reason['rule']}: {reason['detail']}" for reason in record.get("reasons", ())),
        "turns": record.get("turns") or [{"role": "assistant", "text": record.get("text", "")}],
        "notes": notes.get(record.get("item") or record.get("meta", {}).get("item", "")),
    }


def _media(entries: Any, root: Path) -> Iterator[dict[str, str]]:
    """The media of a sample as ``{"tag", "source"}``, or as ``{"tag": "fault", "source": reason}``."""
    for entry in entries:
        try:
            path = Path(media_path(entry["path"], str(root), "the sample"))
            check_inside(str(path), str(root))
            if entry["type"] == "audio":
                yield {"tag": "audio", "source": _sound(media.open_audio(path, rate=_RATE))}
            elif entry["type"] == "image":
                yield {"tag": "img", "source": _picture(media.open_image(path))}
            else:
                yield from ({"tag": "img", "source": _picture(f)} for f in media.open_video(path, _middles))
        except (MediaError, DataError) as error:
            yield {"tag": "fault", "source": str(error)}


def _middles(count: int) -> list[int]:
    return [(2 * i + 1) * count // (2 * _FRAMES) for i in range(_FRAMES)]


def _picture(pixels: np.ndarray) -> str:
    from PIL import Image

    picture, out = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((_PICTURE_WIDTH, _PICTURE_WIDTH))
    picture.save(out, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def _sound(samples: np.ndarray) -> str:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE)
        file.writeframes((np.clip(samples[: _SECONDS * _RATE], -1, 1) * 32767).astype("<i2").tobytes())
    return f"data:audio/wav;base64,{base64.b64encode(out.getvalue()).decode()}"
