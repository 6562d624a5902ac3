"""One HTML page that opens without a network: scores, loss curves, and examples with their media inside the file.

It lays out what it is given; it knows neither where the figures come from nor what they mean.
"""

from __future__ import annotations

import base64
import html
import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lavis_chatbridge.prompting.pieces import Modality

WIDTH, HEIGHT, MARGIN = 640, 220, 44

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --accent: #2563eb; --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --accent: #7aa2f7; --good: #4ade80; --bad: #f87171; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } caption { text-align: left; padding: .3rem 0; }
.scroll { overflow-x: auto; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
.gallery { padding: 0; list-style: none; }
.gallery li { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; }
img, video { width: 100%; border-radius: .3rem; image-rendering: auto; } audio { width: 100%; }
.right { color: var(--good); } .wrong { color: var(--bad); } .said { font-weight: 600; }
svg { max-width: 100%; height: auto; } svg text { fill: currentColor; font-size: 12px; }
"""


@dataclass(frozen=True)
class Example:
    """One medium or several, what the model said, and what is true."""

    media: tuple[tuple[Modality, Path], ...]
    said: str
    truth: str
    right: bool
    asked: str = ""


@dataclass(frozen=True)
class Curve:
    """A loss curve: ``points`` are (step, value)."""

    title: str
    points: tuple[tuple[float, float], ...]


@dataclass
class Page:
    """What the page shows, in this order."""

    title: str
    lead: str
    tables: list[tuple[str, list[str], list[list[str]]]] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    galleries: list[tuple[str, list[Example]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def render(page: Page) -> str:
    """The page as one HTML document without outside references."""
    parts = [f"<h1>{_text(page.title)}</h1>", f"<p>{_text(page.lead)}</p>"]
    parts += [_table(*table) for table in page.tables]
    parts += [_curve(curve) for curve in page.curves if len(curve.points) > 1]
    for heading, examples in page.galleries:
        cards = "".join(_card(example) for example in examples)
        parts.append(f"<h2>{_text(heading)}</h2><ul class=gallery>{cards}</ul>")
    parts += [f"<p>{_text(note)}</p>" for note in page.notes]
    meta = "<meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
    head = f"{meta}<title>{_text(page.title)}</title>"
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _text(words: str) -> str:
    return html.escape(words)


def _table(heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope=col>{_text(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<h2>{_text(heading)}</h2><div class=scroll>{table}</div>"


def _curve(curve: Curve) -> str:
    steps, values = zip(*curve.points, strict=True)
    low, high = min(values), max(values)
    span_x, span_y = (steps[-1] - steps[0]) or 1.0, (high - low) or 1.0

    def place(step: float, value: float) -> str:
        x = MARGIN + (step - steps[0]) / span_x * (WIDTH - 2 * MARGIN)
        y = HEIGHT - MARGIN - (value - low) / span_y * (HEIGHT - 2 * MARGIN)
        return f"{x:.1f},{y:.1f}"

    line = " ".join(place(step, value) for step, value in curve.points)
    labels = (
        f"<text x=4 y={MARGIN}>{high:.2f}</text><text x=4 y={HEIGHT - MARGIN}>{low:.2f}</text>"
        f"<text x={MARGIN} y={HEIGHT - 12}>step {steps[0]:g}</text>"
        f"<text x={WIDTH - MARGIN} y={HEIGHT - 12} text-anchor=end>step {steps[-1]:g}</text>"
    )
    shape = f"<polyline points='{line}' fill=none stroke='var(--accent)' stroke-width=2 />"
    label = _text(f"{curve.title}: from {values[0]:.3f} to {values[-1]:.3f}")
    drawing = f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' width={WIDTH} role=img aria-label='{label}'>{labels}{shape}</svg>"
    return f"<h2>{_text(curve.title)}</h2>{drawing}"


def _card(example: Example) -> str:
    verdict = "right" if example.right else "wrong"
    asked = f"<p>{_text(example.asked)}</p>" if example.asked else ""
    media = "".join(_medium(kind, path) for kind, path in example.media)
    said = f"<p class='said {verdict}'>{_text(example.said) or '(nothing)'}</p>"
    return f"<li>{media}{asked}{said}<p>Truth: {_text(example.truth)} ({verdict})</p></li>"


def _medium(kind: Modality, path: Path) -> str:
    guessed = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    data = f"data:{guessed};base64,{base64.b64encode(path.read_bytes()).decode()}"
    if kind == "image":
        return f"<img alt='picture of the example' src='{data}'>"
    if kind == "video":
        return f"<video controls loop muted aria-label='clip of the example' src='{data}'></video>"
    return f"<audio controls aria-label='sound of the example' src='{data}'></audio>"
