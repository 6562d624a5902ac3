"""A page of samples with their media, one HTML file that opens without a network: to look at data before using it."""

from __future__ import annotations

import base64
import html
import io
import json
import random
import wave
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lavis_chatbridge import media
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.files import write_text
from lavis_chatbridge.multis.annotation import AnnotationIndex, describe
from lavis_chatbridge.multis.statistics import table
from lavis_chatbridge.schema import check_inside, media_path

_PICTURE_WIDTH = 320
_FRAMES = 3
_RATE = 16_000
_SECONDS = 10
_LARGEST_CLIP = 2_000_000

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --good: #4ade80; --bad: #f87171; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
pre { overflow-x: auto; font-size: .85rem; }
article { border: 1px solid var(--line); border-radius: .5rem; margin: 1rem 0; padding: 1rem; }
article h2 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.media { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; }
.media img, .media video { max-width: 100%; width: 13rem; border-radius: .3rem; }
.accepted h2 span { color: var(--good); } .rejected h2 span, .reasons { color: var(--bad); }
.user { font-weight: 600; margin: .8rem 0 0; } .assistant { margin: .1rem 0 0 1.2rem; white-space: pre-wrap; }
nav { position: sticky; top: 0; background: Canvas; padding: .5rem 0; display: flex; flex-wrap: wrap; gap: .8rem; }
#all:not(.accepted-on) .accepted, #all:not(.rejected-on) .rejected { display: none; }
"""
_SCRIPT = """
for (const box of document.querySelectorAll('nav input')) {
  box.addEventListener('change', () => document.getElementById('all').classList.toggle(box.value + '-on', box.checked));
}
"""


@dataclass(frozen=True)
class PageSettings:
    """What the page shows.

    Args:
        accepted: How many accepted samples.
        rejected: How many of those turned down.
        seed: Draws them.
    """

    accepted: int = 40
    rejected: int = 20
    seed: int = 0


def write_page(
    checked: str | Path,
    media_root: str | Path,
    out: str | Path,
    options: PageSettings | None = None,
    annotations: str | Path | None = None,
) -> int:
    """Write the page.

    Args:
        checked: The folder with ``accepted.jsonl``, ``rejected.jsonl`` and ``statistics.json``.
        media_root: What the media's paths are relative to.
        out: The HTML file.
        options: How many samples, and which.
        annotations: Adds to each sample the text that its writer had.

    Returns:
        How many samples it shows.

    Raises:
        DataError: If the folder has not been made by ``multis check``.
    """
    options = options or PageSettings()
    checked = Path(checked)
    index = AnnotationIndex(annotations) if annotations else None
    try:
        numbers = table(json.loads((checked / "statistics.json").read_text(encoding="utf-8")))
        shown = [
            *(("accepted", record) for record in _draw(checked / "accepted.jsonl", options.accepted, options.seed)),
            *(("rejected", record) for record in _draw(checked / "rejected.jsonl", options.rejected, options.seed)),
        ]
    except OSError as error:
        raise DataError(f"{checked} was not made by `chatbridge multis check`: {error}") from error
    boxes = "".join(
        f"<label><input type=checkbox value={name} checked> {name}</label>" for name in ("accepted", "rejected")
    )
    cards = "".join(_card(status, record, Path(media_root), index) for status, record in shown)
    meta = "<meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
    text = (
        f"<!doctype html><html lang=en><head>{meta}<title>MULTIS samples</title><style>{_STYLE}</style></head><body>"
        f"<h1>MULTIS samples</h1><pre>{html.escape(numbers)}</pre><nav aria-label='which samples'>{boxes}</nav>"
        f"<main id=all class='accepted-on rejected-on'>{cards}</main><script>{_SCRIPT}</script></body></html>\n"
    )
    write_text(Path(out), text, errors="replace")
    return len(shown)


def _draw(file: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` lines drawn evenly from a file of any length (reservoir sampling), in the file's order."""
    rng = random.Random(seed)
    kept: list[tuple[int, str]] = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if len(kept) < count:
                kept.append((number, line))
            elif (place := rng.randrange(number + 1)) < count:
                kept[place] = (number, line)
    return [json.loads(line) for _, line in sorted(kept)]


def _card(status: str, record: Mapping[str, Any], root: Path, index: AnnotationIndex | None) -> str:
    parts = [f"<article class={status}><h2>{html.escape(record['id'])} <span>{status}</span></h2>"]
    parts.append(f"<div class=media>{''.join(_media(record.get('media', ()), root))}</div>")
    reasons = "; ".join(f"{reason['rule']}: {reason['detail']}" for reason in record.get("reasons", ()))
    if reasons:
        parts.append(f"<p class=reasons>{html.escape(reasons)}</p>")
    for turn in record.get("turns", ()):
        role = "user" if turn["role"] == "user" else "assistant"
        parts.append(f"<p class={role}>{html.escape(turn['text'])}</p>")
    if "text" in record:
        parts.append(f"<p class=assistant>{html.escape(record['text'])}</p>")
    item = record.get("item") or record.get("meta", {}).get("item")
    if index is not None and item in index:
        notes = html.escape(describe(index[item]))
        parts.append(f"<details><summary>what its writer knew</summary><pre>{notes}</pre></details>")
    return "".join([*parts, "</article>"])


def _media(entries: Any, root: Path) -> Iterator[str]:
    for entry in entries:
        try:
            path = Path(media_path(entry["path"], str(root), "the sample"))
            check_inside(str(path), str(root))
            if entry["type"] == "image":
                yield _picture(media.open_image(path), "picture of the sample")
            elif entry["type"] == "video":
                yield from _clip(path)
            else:
                yield _sound(media.open_audio(path, rate=_RATE))
        except (MediaError, DataError) as error:
            yield f"<p class=reasons>{html.escape(str(error))}</p>"


def _clip(path: Path) -> Iterator[str]:
    """Three frames, and the clip itself where it is small and of a kind that browsers play."""
    frames = media.open_video(path, lambda count: [(2 * i + 1) * count // (2 * _FRAMES) for i in range(_FRAMES)])
    for number, frame in enumerate(frames, start=1):
        yield _picture(frame, f"frame {number} of {_FRAMES}")
    if path.suffix.lower() in (".mp4", ".webm") and path.stat().st_size <= _LARGEST_CLIP:
        data = _data_uri(f"video/{path.suffix.lower()[1:]}", path.read_bytes())
        yield f"<video controls loop aria-label='clip of the sample' src='{data}'></video>"


def _picture(pixels: np.ndarray, label: str) -> str:
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((_PICTURE_WIDTH, _PICTURE_WIDTH))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=80)
    return f"<img alt='{label}' src='{_data_uri('image/jpeg', out.getvalue())}'>"


def _sound(samples: np.ndarray) -> str:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE)
        file.writeframes((np.clip(samples[: _SECONDS * _RATE], -1, 1) * 32767).astype("<i2").tobytes())
    return f"<audio controls aria-label='sound of the sample' src='{_data_uri('audio/wav', out.getvalue())}'></audio>"


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
