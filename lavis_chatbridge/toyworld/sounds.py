"""Sounds of the embedded world: one voice with a timbre, a pitch and a temporal pattern, over faint noise.

The input is a `Scene`; exact pitch, tempo, loudness, noise, length, sample rate and channels are random. A rising or
falling sound is a sequence of sweeps, so that any few seconds contain its direction.

Shape legend: ``S`` samples, ``C`` channels. Pitches in Hz, lengths in seconds.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import soundfile
from numpy.typing import NDArray

from lavis_chatbridge.toyworld.world import Scene

Floats = NDArray[np.float32]

PITCHES: dict[str, tuple[float, float]] = {"low": (140, 185), "middle": (400, 500), "high": (1100, 1400)}
"""Range of a sound's middle pitch in Hz. Sweeps of `SPAN` octaves around it do not reach the next range."""

SPAN = 0.8
SECONDS = (2.0, 25.0)
RATES = (16_000, 22_050, 32_000, 44_100, 48_000)
_RATE_SHARES = (0.86, 0.06, 0.02, 0.04, 0.02)
_LENGTHS = ((2.0, 5.5), (5.5, 10.5), (10.5, 25.0))
_LENGTH_SHARES = (0.62, 0.26, 0.12)
_HIGHEST = 7_400.0  # Hz: higher partials would be lost or aliased at 16 kHz


@dataclass(frozen=True)
class Sound:
    """A recording: ``samples`` float32 ``[S]`` or ``[S, C]`` in [-1, 1], and its ``rate`` in Hz."""

    samples: Floats
    rate: int


@dataclass(frozen=True)
class _Course:
    """The voice over time, ``[S]`` each: pitch in Hz, level from 0 to 1, seconds since the last onset."""

    pitch: Floats
    level: Floats
    since: Floats


def render(scene: Scene, rng: np.random.Generator, seconds: float | None = None, rate: int | None = None) -> Sound:
    """A recording of ``scene``; length (2 to 25 s) and rate are random by default."""
    facts = scene.facts
    rate = int(rng.choice(RATES, p=_RATE_SHARES)) if rate is None else rate
    if seconds is None:
        seconds = float(rng.uniform(*_LENGTHS[int(rng.choice(len(_LENGTHS), p=_LENGTH_SHARES))]))
    low, high = PITCHES[facts["pitch"]]
    clock = np.arange(round(seconds * rate), dtype=np.float32) / np.float32(rate)
    course = _PATTERNS[facts["pattern"]](rng, rng.uniform(low, high), clock, seconds)
    voice = _TIMBRES[facts["timbre"]](rng, course, rate) * course.level
    return Sound(_record(rng, voice), rate)


def encode(sound: Sound, suffix: str) -> bytes:
    """A sound file's bytes; ``suffix`` is ``"wav"``, ``"flac"`` or ``"mp3"``."""
    file = io.BytesIO()
    subtype = "MPEG_LAYER_III" if suffix == "mp3" else "PCM_16"
    soundfile.write(file, sound.samples, sound.rate, format=suffix.upper(), subtype=subtype)
    return file.getvalue()


def _record(rng: np.random.Generator, voice: Floats) -> Floats:
    """The voice at a random loudness (-28 to -10 dB RMS) with noise at least 20 dB below, in one or two channels."""
    voice = voice / np.float32(np.sqrt(np.mean(voice**2)) + 1e-9)
    loudness = rng.uniform(-28, -10)
    channels = 2 if rng.random() < 0.15 else 1
    gains = rng.uniform(0.5, 1.0, channels) if channels == 2 else np.ones(1)
    floor = _decibels(loudness - rng.uniform(20, 45))
    noise = rng.standard_normal((len(voice), channels), dtype=np.float32) * floor
    mixed = np.clip(voice[:, None] * (gains.astype(np.float32) * _decibels(loudness)) + noise, -0.999, 0.999)
    return mixed if channels == 2 else mixed[:, 0]


def _decibels(level: float) -> np.float32:
    return np.float32(10 ** (level / 20))


# --- Patterns: pitch and level over time. ---


def _steady(rng: np.random.Generator, pitch: float, clock: Floats, seconds: float) -> _Course:
    period = rng.uniform(2.0, 3.2)
    return _Course(np.full_like(clock, pitch), _gate(clock, seconds, 1.0, 0.03), clock % np.float32(period))


def _pulsing(rng: np.random.Generator, pitch: float, clock: Floats, seconds: float) -> _Course:
    period = 1.0 / rng.uniform(2.0, 3.6)
    since = clock % np.float32(period)
    return _Course(np.full_like(clock, pitch), _gate(since, period, rng.uniform(0.42, 0.58), 0.015), since)


def _sweeping(rng: np.random.Generator, pitch: float, clock: Floats, seconds: float, octaves: float) -> _Course:
    period = seconds / max(1, round(seconds / rng.uniform(1.1, 1.8)))
    since = clock % np.float32(period)
    course = pitch * np.exp2((since / np.float32(period) - np.float32(0.5)) * np.float32(octaves))
    return _Course(course.astype(np.float32), _gate(since, period, 0.94, 0.03), since)


def _gate(since: Floats, period: float, open_share: float, edge: float) -> Floats:
    """The level over time: 1 for a share of each period, else 0; ramps of ``edge`` seconds avoid clicks."""
    return np.clip(np.minimum(since, np.float32(period * open_share) - since) / np.float32(edge), 0.0, 1.0)


_PATTERNS: dict[str, Callable[[np.random.Generator, float, Floats, float], _Course]] = {
    "steady": _steady,
    "pulsing": _pulsing,
    "rising": partial(_sweeping, octaves=SPAN),
    "falling": partial(_sweeping, octaves=-SPAN),
}


# --- Timbres: the voice at full level, [S]. ---


def _phase(pitch: Floats, rate: int, start: float = 0.0) -> Floats:
    turns = np.cumsum(pitch, dtype=np.float64) / rate + start
    turns -= np.floor(turns)  # in double precision; much faster than % 1.0
    return turns.astype(np.float32) * np.float32(2 * np.pi)


def _harmonics(pitch: Floats, rate: int, strengths: dict[int, float]) -> Floats:
    """A sum of harmonics, by the recurrence of sin(k x); omits those above `_HIGHEST`."""
    phase = _phase(pitch, rate)
    twice_cos, before, now = 2 * np.cos(phase), np.zeros_like(phase), np.sin(phase)
    top = float(pitch.max())
    voice = np.zeros_like(phase)
    for order in range(1, max(strengths) + 1):
        if order * top > _HIGHEST:
            break
        if order in strengths:
            voice += np.float32(strengths[order]) * now
        before, now = now, twice_cos * now - before
    return voice


def _flute(rng: np.random.Generator, course: _Course, rate: int) -> Floats:
    """Almost a pure tone with vibrato and a little breath."""
    clock = np.arange(len(course.pitch), dtype=np.float32) / np.float32(rate)
    vibrato = np.sin(np.float32(2 * np.pi * rng.uniform(4.5, 6.0)) * clock) * np.float32(rng.uniform(0.004, 0.01))
    voice = _harmonics(course.pitch * (1 + vibrato), rate, {1: 1.0, 2: rng.uniform(0.08, 0.2), 3: 0.04})
    return voice + np.float32(0.02) * rng.standard_normal(len(voice), dtype=np.float32)


def _organ(rng: np.random.Generator, course: _Course, rate: int) -> Floats:
    """Pipes in octaves and a twelfth, all about equally loud."""
    pipes = {
        1: 1.0,
        2: rng.uniform(0.7, 1.0),
        3: rng.uniform(0.3, 0.5),
        4: rng.uniform(0.6, 0.9),
        8: rng.uniform(0.3, 0.6),
    }
    return _harmonics(course.pitch, rate, pipes)


def _buzzer(rng: np.random.Generator, course: _Course, rate: int) -> Floats:
    """All harmonics, with a fast beat that makes it rough."""
    slope = rng.uniform(0.25, 0.45)
    voice = _harmonics(course.pitch, rate, {order: order**-slope for order in range(1, 31)})
    clock = np.arange(len(voice), dtype=np.float32) / np.float32(rate)
    return voice * (1 + np.float32(0.6) * np.sin(np.float32(2 * np.pi * rng.uniform(24, 36)) * clock))


def _bell(rng: np.random.Generator, course: _Course, rate: int) -> Floats:
    """Inharmonic partials that decay after each onset, the high ones faster."""
    top = float(course.pitch.max())
    last = float(course.since.max())
    decay = rng.uniform(0.35, 0.6) * last
    voice = np.zeros_like(course.pitch)
    for ratio, strength, life in ((1.0, 1.0, 1.0), (1.006, 0.5, 1.0), (2.76, 0.7, 0.6), (5.40, 0.5, 0.35)):
        if ratio * top < _HIGHEST:
            fading = np.exp(course.since * np.float32(-1.0 / (decay * life)))
            voice += (
                np.float32(strength) * fading * np.sin(_phase(course.pitch * np.float32(ratio), rate, rng.random()))
            )
    return voice


def _wind(rng: np.random.Generator, course: _Course, rate: int) -> Floats:
    """Band noise around the pitch: a carrier with random amplitude and phase."""
    width = float(course.pitch.mean()) * rng.uniform(0.16, 0.24)
    knots = int(len(course.pitch) / rate * width) + 4
    places = np.linspace(0, knots - 1, len(course.pitch))
    wander = [np.interp(places, np.arange(knots), rng.standard_normal(knots)).astype(np.float32) for _ in range(2)]
    phase = _phase(course.pitch, rate)
    hiss = np.float32(0.03) * rng.standard_normal(len(phase), dtype=np.float32)
    return wander[0] * np.cos(phase) + wander[1] * np.sin(phase) + hiss


_TIMBRES: dict[str, Callable[[np.random.Generator, _Course, int], Floats]] = {
    "flute": _flute,
    "organ": _organ,
    "buzzer": _buzzer,
    "bell": _bell,
    "wind": _wind,
}
