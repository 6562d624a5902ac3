"""Clips of the embedded world: an object that moves, grows or shrinks in front of a still background.

The input is a `Scene`; start, distance, frame count, frame rate, codec and quality are random. A clip may have an
audio track.

Lengths are fractions of the picture's side.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

from lavis_chatbridge.toyworld import pictures
from lavis_chatbridge.toyworld.pictures import Pixels, Placement
from lavis_chatbridge.toyworld.sounds import Sound
from lavis_chatbridge.toyworld.world import Scene

SIDES = (96, 112, 128)
FRAMES = (8, 24)
RATES = (4, 5, 6, 8, 10, 12)
MARGIN = 0.24
"""The centre of a moving object stays this far from the edges."""

TRAVEL = (0.34, 0.50)
MOVING_RADII = (0.170, 0.225)
NEAR_RADII = (0.265, 0.310)
FAR_RADII = (0.125, 0.150)
_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True)
class Clip:
    """Frames uint8 ``[T, S, S, 3]``, their rate in frames per second, and the object's placement in each."""

    frames: Pixels
    rate: int
    placements: tuple[Placement, ...]


def render(scene: Scene, rng: np.random.Generator, frames: int | None = None) -> Clip:
    """A clip of ``scene`` with ``frames`` frames, by default 8 to 24."""
    facts = scene.facts
    side = int(rng.choice(SIDES))
    count = int(rng.integers(FRAMES[0], FRAMES[1] + 1)) if frames is None else frames
    placements = _course(facts["motion"], count, rng)
    backdrop, noise = pictures.background(rng, side), pictures.grain(rng, side)
    rgb = pictures.colour(facts["colour"], rng)
    drawn = []
    for placement in placements:
        canvas = backdrop.copy()
        pictures.paint(canvas, facts["shape"], rgb, placement)
        turned = np.roll(noise, tuple(rng.integers(0, side, 2)), (0, 1))  # new noise would take longer
        drawn.append(pictures.finish(canvas, turned))
    return Clip(np.stack(drawn), int(rng.choice(RATES)), tuple(placements))


def encode(clip: Clip, rng: np.random.Generator, track: Sound | None = None) -> bytes:
    """An mp4 file's bytes, H.264 or (one in five) MPEG-4 part 2, with ``track``, if given, as AAC."""
    file = io.BytesIO()
    codec, options = "libx264", {"crf": str(int(rng.integers(20, 27))), "preset": "ultrafast", "flags": "+bitexact"}
    if rng.random() < 0.2:
        codec, options = "mpeg4", {"flags": "+bitexact"}
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        picture = container.add_stream(codec, rate=clip.rate, options=options)
        picture.height, picture.width = clip.frames.shape[1:3]
        picture.pix_fmt = "yuv420p"
        picture.codec_context.thread_count = 1  # more threads change the bytes, and are not faster at this size
        if codec == "mpeg4":
            picture.bit_rate = int(rng.integers(300_000, 900_000))
        if track is not None:
            planes = np.ascontiguousarray(np.atleast_2d(track.samples.T))
            audio = av.AudioFrame.from_ndarray(planes, format="fltp", layout="stereo" if len(planes) == 2 else "mono")
            audio.sample_rate, audio.time_base, audio.pts = track.rate, Fraction(1, track.rate), 0
            fast = {"aac_coder": "fast", "flags": "+bitexact"}
            rate, layout = audio.sample_rate, audio.layout
            sound = container.add_stream("aac", rate=rate, layout=layout, bit_rate=64_000, options=fast)
        for frame in clip.frames:
            container.mux(picture.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(picture.encode())
        if track is not None:
            container.mux(sound.encode(audio))
            container.mux(sound.encode())
    return file.getvalue()


def _course(motion: str, count: int, rng: np.random.Generator) -> list[Placement]:
    tilt = pictures.tilt(rng)
    steps = np.linspace(0.0, 1.0, count) ** rng.uniform(0.85, 1.18)  # a slight acceleration or deceleration
    if motion in _DIRECTIONS:
        radius = rng.uniform(*MOVING_RADII)
        travel = rng.uniform(*TRAVEL)
        low = rng.uniform(MARGIN, 1.0 - MARGIN - travel)
        across, down = _DIRECTIONS[motion]
        line = low + travel * (steps if across + down > 0 else 1.0 - steps)
        other = rng.uniform(MARGIN + 0.06, 1.0 - MARGIN - 0.06)
        return [Placement(p, other, radius, tilt) if across else Placement(other, p, radius, tilt) for p in line]
    near, far = rng.uniform(*NEAR_RADII), rng.uniform(*FAR_RADII)
    radii = far + (near - far) * (steps if motion == "grow" else 1.0 - steps)
    x, y = rng.uniform(0.34, 0.66, 2)
    return [Placement(x, y, radius, tilt) for radius in radii]
