"""Rendered media have the facts of their scenes, by measurements that are independent of the renderers."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest

from lavis_chatbridge.media import has_audio_track, open_audio, open_video
from lavis_chatbridge.prompting.conversation import Modality
from lavis_chatbridge.toyworld import clips, pictures, sounds
from lavis_chatbridge.toyworld.world import ATTRIBUTES, Scene

HUES = {"red": 0, "orange": 30, "yellow": 57, "green": 120, "cyan": 180, "blue": 228, "purple": 275, "pink": 330}
PLACES = {"left": (0.27, 0.5), "right": (0.73, 0.5), "top": (0.5, 0.27), "bottom": (0.5, 0.73), "centre": (0.5, 0.5)}


def scene(modality: Modality, **facts: str) -> Scene:
    """A scene with these facts, and the first value of every other attribute."""
    values = {name: facts.get(name, known[0]) for name, known in ATTRIBUTES[modality].items()}
    return Scene(modality, tuple(values.items()))


def object_mask(pixels: np.ndarray) -> np.ndarray:
    """Where a picture is colourful: the backgrounds are dull."""
    return pixels.max(-1).astype(float) - pixels.min(-1) > 75


def centre_of(mask: np.ndarray) -> tuple[float, float]:
    down, across = np.nonzero(mask)
    return (across.mean() + 0.5) / mask.shape[1], (down.mean() + 0.5) / mask.shape[0]


@pytest.mark.parametrize("shape", ATTRIBUTES["image"]["shape"])
def test_an_object_has_its_colour_and_stands_at_its_place(shape: str) -> None:
    rng = np.random.default_rng(1)
    for colour in HUES:
        for place in PLACES:
            wanted = scene("image", colour=colour, shape=shape, place=place, size="large")
            pixels, placement = pictures.render_placed(wanted, rng)
            mask = object_mask(pixels)
            hue = colorsys.rgb_to_hsv(*pixels[mask].mean(0) / 255)[0] * 360
            assert min(HUES, key=lambda name: abs((hue - HUES[name] + 180) % 360 - 180)) == colour
            x, y = centre_of(mask)
            if shape not in ("star", "triangle"):
                assert (x, y) == pytest.approx((placement.x, placement.y), abs=0.03)
            assert min(PLACES, key=lambda n: (x - PLACES[n][0]) ** 2 + (y - PLACES[n][1]) ** 2) == place


@pytest.mark.parametrize("motion", ATTRIBUTES["video"]["motion"])
def test_a_clip_moves_in_the_direction_of_its_scene(motion: str) -> None:
    rng = np.random.default_rng(5)
    for colour, shape in (("green", "circle"), ("red", "star"), ("pink", "ring")):
        clip = clips.render(scene("video", motion=motion, colour=colour, shape=shape), rng)
        assert clips.FRAMES[0] <= len(clip.frames) <= clips.FRAMES[1]
        decoded = open_video(clips.encode(clip, rng), lambda count: [0, count - 1])
        first, last = (object_mask(frame) for frame in decoded)
        (x0, y0), (x1, y1), growth = centre_of(first), centre_of(last), last.sum() / first.sum()
        expected = {"left": x0 - x1, "right": x1 - x0, "up": y0 - y1, "down": y1 - y0}
        if motion in expected:
            assert expected[motion] > 0.25
            assert 0.7 < growth < 1.4
        else:
            assert (growth if motion == "grow" else 1 / growth) > 2
            assert abs(x1 - x0) + abs(y1 - y0) < 0.08


def test_clip_files_have_all_frames_and_their_track() -> None:
    clip = clips.render(scene("video"), np.random.default_rng(6), frames=9)
    track = sounds.render(scene("audio"), np.random.default_rng(7), seconds=2.5, rate=16_000)
    plain, sounding = (clips.encode(clip, np.random.default_rng(8), sound) for sound in (None, track))
    assert len(open_video(plain, range)) == 9
    assert not has_audio_track(plain)
    assert len(open_audio(sounding)) == pytest.approx(2.5 * 16_000, rel=0.05)


def pitch_track(samples: np.ndarray) -> np.ndarray:
    """The strongest frequency in Hz of every 64 ms that are not near silence."""
    frames = samples[: len(samples) // 1024 * 1024].reshape(-1, 1024)
    frames = frames[frames.std(1) > 0.3 * samples.std()]
    power = np.abs(np.fft.rfft(frames * np.hanning(1024), 8192))
    return np.fft.rfftfreq(8192, 1 / 16_000)[power.argmax(1)]


def mono(rng: np.random.Generator, seconds: float, **facts: str) -> np.ndarray:
    samples = sounds.render(scene("audio", **facts), rng, seconds, 16_000).samples
    return samples if samples.ndim == 1 else samples.mean(1)


@pytest.mark.parametrize("timbre", ["flute", "bell", "wind"])
def test_sounds_have_the_pitch_and_sweep_of_their_scene(timbre: str) -> None:
    rng = np.random.default_rng(10)
    pitches = [np.median(pitch_track(mono(rng, 4, timbre=timbre, pitch=p))) for p in ("low", "middle", "high")]
    assert pitches == sorted(pitches)
    for pattern, sign in (("rising", 1), ("falling", -1)):
        for part in np.split(mono(rng, 12, timbre=timbre, pitch="middle", pattern=pattern), 3):
            steps = np.diff(np.log2(pitch_track(part)))
            assert np.median(sign * steps[np.abs(steps) < 0.3]) > 0.01  # octaves in 64 ms, without the jump back


@pytest.mark.parametrize("timbre", ATTRIBUTES["audio"]["timbre"])
def test_only_pulsing_sounds_fall_silent_again_and_again(timbre: str) -> None:
    rng = np.random.default_rng(11)
    quiet = {}
    for pattern in ATTRIBUTES["audio"]["pattern"]:
        level = mono(rng, 4, timbre=timbre, pattern=pattern).reshape(-1, 320).std(1)  # of every 20 ms
        quiet[pattern] = (level < 0.2 * np.quantile(level, 0.9)).mean()
    assert quiet["pulsing"] > 0.3
    assert timbre == "bell" or max(quiet["steady"], quiet["rising"], quiet["falling"]) < 0.2  # bells fade
