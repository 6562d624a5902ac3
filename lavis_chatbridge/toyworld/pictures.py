"""Pictures of the embedded world: one coloured object on a noisy background of muted colours.

The input is a `Scene`; everything else (exact position, size, hue, tilt, background, quality) is random.

Lengths are fractions of the picture's side, positions are ``(x, y)`` from the upper left corner.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lavis_chatbridge.toyworld.world import Scene

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

SIDES = (96, 112, 128, 144)
"""Sides of the pictures, in pixels."""

HUES: dict[str, tuple[float, float, float, float]] = {
    "red": (0, 5, 0.85, 1.0),
    "orange": (29, 4, 0.85, 1.0),
    "yellow": (57, 4, 0.80, 1.0),
    "green": (122, 10, 0.75, 1.0),
    "cyan": (182, 6, 0.75, 1.0),
    "blue": (228, 6, 0.80, 1.0),
    "purple": (276, 6, 0.70, 0.95),
    "pink": (330, 5, 0.40, 0.55),
}
"""Colour -> hue and its jitter in degrees, and range of saturation; the ranges of similar colours do not overlap."""

PLACES: dict[str, tuple[float, float]] = {
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "top": (0.5, 0.27),
    "bottom": (0.5, 0.73),
    "centre": (0.5, 0.5),
}
PLACE_JITTER = 0.055

RADII: dict[str, tuple[float, float]] = {"small": (0.150, 0.175), "large": (0.235, 0.265)}


@dataclass(frozen=True)
class Placement:
    """An object's centre, radius, and tilt in radians."""

    x: float
    y: float
    radius: float
    tilt: float = 0.0


def render(scene: Scene, rng: np.random.Generator) -> Pixels:
    """A picture of ``scene``: uint8 ``[S, S, 3]``, with a side of `SIDES`."""
    return render_placed(scene, rng)[0]


def render_placed(scene: Scene, rng: np.random.Generator) -> tuple[Pixels, Placement]:
    """Like `render`, but also returns the exact placement."""
    facts = scene.facts
    side = int(rng.choice(SIDES))
    radius = rng.uniform(*RADII[facts["size"]])
    place = np.asarray(PLACES[facts["place"]]) + rng.uniform(-PLACE_JITTER, PLACE_JITTER, 2)
    x, y = np.clip(place, radius, 1.0 - radius)
    placement = Placement(float(x), float(y), radius, tilt(rng))
    canvas = background(rng, side)
    paint(canvas, facts["shape"], colour(facts["colour"], rng), placement)
    return finish(canvas, grain(rng, side)), placement


def encode(pixels: Pixels, suffix: str, rng: np.random.Generator) -> bytes:
    """A picture file's bytes; ``suffix`` is ``"png"`` or ``"jpg"`` (quality 75 to 95)."""
    file = io.BytesIO()
    if suffix == "png":
        Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    else:
        Image.fromarray(pixels).save(file, format="JPEG", quality=int(rng.integers(75, 96)))
    return file.getvalue()


def colour(name: str, rng: np.random.Generator) -> Floats:
    """A random shade of the colour ``name``: float32 ``[3]``, RGB from 0 to 1."""
    hue, jitter, low, high = HUES[name]
    degrees = hue + rng.uniform(-jitter, jitter)
    rgb = colorsys.hsv_to_rgb(degrees / 360 % 1.0, rng.uniform(low, high), rng.uniform(0.86, 1.0))
    return np.asarray(rgb, dtype=np.float32)


def tilt(rng: np.random.Generator) -> float:
    """A slight tilt in radians, so that a square does not become a diamond, or a cross an X."""
    return float(rng.uniform(-0.2, 0.2))


def background(rng: np.random.Generator, side: int) -> Floats:
    """A background of muted colours with one of five patterns: float32 ``[side, side, 3]``, RGB from 0 to 1."""
    pattern = _PATTERNS[int(rng.integers(len(_PATTERNS)))](rng, side)
    light = rng.uniform(0.12, 0.88)
    contrast = rng.uniform(0.04, 0.16)
    tint = rng.uniform(-0.05, 0.05, 3).astype(np.float32)
    return np.clip(light + contrast * pattern, 0.03, 0.97).astype(np.float32)[..., None] + tint


def grain(rng: np.random.Generator, side: int) -> Floats:
    """Film grain of a random strength: float32 ``[side, side, 3]``."""
    strength = rng.uniform(0.0, 0.045)
    return rng.standard_normal((side, side, 3), dtype=np.float32) * np.float32(strength)


def paint(canvas: Floats, shape: str, rgb: Floats, placement: Placement) -> None:
    """Draw an object onto ``canvas`` in place, with anti-aliased edges and a slight shading from top to bottom."""
    side = canvas.shape[0]
    reach = 1.3 * placement.radius * side
    x, y = placement.x * side, placement.y * side
    left, right = max(0, int(x - reach)), min(side, int(x + reach) + 2)
    top, bottom = max(0, int(y - reach)), min(side, int(y + reach) + 2)
    scale = np.float32(placement.radius * side)
    across = ((np.arange(left, right, dtype=np.float32) + 0.5 - x) / scale)[None, :]
    down = ((np.arange(top, bottom, dtype=np.float32) + 0.5 - y) / scale)[:, None]
    cos, sin = np.float32(np.cos(placement.tilt)), np.float32(np.sin(placement.tilt))
    distance = _DISTANCES[shape](cos * across + sin * down, cos * down - sin * across)
    alpha = np.clip(0.5 - distance * scale, 0.0, 1.0).astype(np.float32)[..., None]
    shaded = rgb * (1.0 - 0.06 * down.astype(np.float32))[..., None]
    window = canvas[top:bottom, left:right]
    window += alpha * (shaded - window)


def finish(canvas: Floats, noise: Floats) -> Pixels:
    """The canvas with its grain as uint8 pixels."""
    return (np.clip(canvas + noise, 0.0, 1.0) * np.float32(255.0) + np.float32(0.5)).astype(np.uint8)


# --- Shapes: signed distance to the edge in units of the radius, negative inside; u points right, v down. ---


def _triangle(u: Floats, v: Floats) -> Floats:
    slanted = np.abs(u) * np.float32(np.cos(np.pi / 6)) - v * np.float32(0.5)
    return np.maximum(slanted, v) - np.float32(0.58)


def _star(u: Floats, v: Floats) -> Floats:
    """Five points. By symmetry, only the straight edge of half a point is computed."""
    outer, inner, half = 1.15, 0.46, np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + half) % (2 * half) - half)
    length = np.hypot(u, v)
    tip, notch = np.array([outer, 0.0]), np.array([inner * np.cos(half), inner * np.sin(half)])
    edge = notch - tip
    normal = np.array([-edge[1], edge[0]]) / np.hypot(*edge)
    normal *= np.sign(normal @ tip)
    return length * (np.cos(angle) * normal[0] + np.sin(angle) * normal[1]) - np.float32(normal @ tip)


def _cross(u: Floats, v: Floats) -> Floats:
    wide, tall, arm, width = np.abs(u), np.abs(v), np.float32(1.0), np.float32(0.31)
    return np.minimum(np.maximum(wide - arm, tall - width), np.maximum(wide - width, tall - arm))


_DISTANCES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "circle": lambda u, v: np.hypot(u, v) - np.float32(0.95),
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - np.float32(0.82),
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - np.float32(0.75)) - np.float32(0.23),
}


# --- Backgrounds: patterns of about -1 to 1, [side, side]. ---


def _slope(angle: float, ramp: Floats) -> Floats:
    return np.float32(np.cos(angle)) * ramp[None, :] + np.float32(np.sin(angle)) * ramp[:, None]


def _gradient(rng: np.random.Generator, side: int) -> Floats:
    return _slope(rng.uniform(0, 2 * np.pi), np.linspace(-1, 1, side, dtype=np.float32))


def _blobs(rng: np.random.Generator, side: int) -> Floats:
    cells = int(rng.integers(3, 9))
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


def _stripes(rng: np.random.Generator, side: int) -> Floats:
    angle, waves, phase = rng.uniform(0, np.pi), rng.uniform(2, 7), rng.uniform(0, 2 * np.pi)
    return np.sin(_slope(angle, np.linspace(0, 2 * np.pi * waves, side, dtype=np.float32)) + np.float32(phase))


def _checks(rng: np.random.Generator, side: int) -> Floats:
    cell, (across, down) = int(rng.integers(7, 25)), rng.integers(0, 25, 2)
    steps = np.arange(side)
    odd = ((steps[None, :] + across) // cell + (steps[:, None] + down) // cell) % 2
    return odd.astype(np.float32) * 1.4 - np.float32(0.7)


_PATTERNS: tuple[Callable[[np.random.Generator, int], Floats], ...] = (
    lambda rng, side: np.zeros((side, side), np.float32),  # flat
    _gradient,
    _blobs,
    _stripes,
    _checks,
)
