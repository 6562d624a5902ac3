"""Renderings of the embedded world in memory, and endless training batches for its encoders.

Media are rendered, encoded to a file, opened, and resized or converted to a filterbank, as in normal use. Every
combination of attributes occurs, also held-out ones: encoders may see the entire world, but only one medium at a time.

Shape legend: ``R`` renderings, ``B`` batch, ``A`` attributes, ``S`` side, ``F`` frames of a filterbank, ``M`` mel bins.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lavis_chatbridge.media.audio import open_audio
from lavis_chatbridge.media.image import open_image
from lavis_chatbridge.media.video import open_video
from lavis_chatbridge.processors.audio import fbank
from lavis_chatbridge.processors.pictures import PictureSettings, prepare
from lavis_chatbridge.toyworld import clips, pictures, sounds
from lavis_chatbridge.toyworld.pictures import Pixels, Placement
from lavis_chatbridge.toyworld.world import ATTRIBUTES, Scene, all_scenes

UNKNOWN = -1
"""The label of an attribute that a medium does not have."""

STILL_ATTRIBUTES = tuple(ATTRIBUTES["image"])
SOUND_ATTRIBUTES = tuple(ATTRIBUTES["audio"])
STILLS_PER_CLIP = 6
MEL_BINS = 64
_PLACE = STILL_ATTRIBUTES.index("place")
_LEFT, _RIGHT = (ATTRIBUTES["image"]["place"].index(side) for side in ("left", "right"))
_CUTS = ((256, 0.5), (512, 0.3), (1024, 0.2))  # number of frames of a batch's clips, and frequency
_FRAMES_PER_BATCH = 48 * 256
_LONG_SHARE = 0.25  # share of the sounds with up to 12 s; the others have up to 6 s
_TRACK_SHARE = 0.15  # share of the sounds from a clip's audio track


@dataclass(frozen=True)
class Batch:
    """One step's inputs and labels.

    Attributes:
        inputs: The encoder's arguments.
        labels: ``[B, A]``, `UNKNOWN` if a medium does not have the attribute.
        targets: ``[B, n]`` regression targets from about -1 to 1; ``n`` may be 0.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Stills:
    """Pictures, then frames of clips.

    Attributes:
        pixels: float16 ``[R, 3, S, S]`` the encoder's input.
        labels: ``[R, A]`` in the order of `STILL_ATTRIBUTES`; frames have no size or place.
        places: ``[R, 3]``: the object's centre and radius as fractions of the side.
    """

    pixels: Tensor
    labels: Tensor
    places: Tensor


@dataclass(frozen=True)
class Sounds:
    """Sounds: float16 filterbanks ``[F, M]``, and labels ``[R, A]`` in the order of `SOUND_ATTRIBUTES`."""

    fbanks: list[Tensor]
    labels: Tensor


def label(scene: Scene, names: Sequence[str]) -> list[int]:
    """The index of each attribute's value; `UNKNOWN` if the scene does not have the attribute."""
    facts = scene.facts
    return [ATTRIBUTES[scene.modality][name].index(facts[name]) if name in facts else UNKNOWN for name in names]


def render_stills(count: int, side: int, seed: int) -> Stills:
    """``count`` stills of ``side`` pixels, one half pictures, one half frames of clips."""
    rng = np.random.default_rng(seed)
    settings = PictureSettings(image_size=side)
    pixels = torch.empty(count, 3, side, side, dtype=torch.float16)
    labels, places = [], []
    rendered = itertools.chain(itertools.islice(_pictures(rng), count - count // 2), _frames(rng))
    for row, (scene, still, placement) in zip(pixels, rendered, strict=False):
        row.copy_(prepare(still[None], settings)[0])
        labels.append(label(scene, STILL_ATTRIBUTES))
        places.append((placement.x, placement.y, placement.radius))
    return Stills(pixels, torch.tensor(labels), torch.tensor(places, dtype=torch.float32))


def still_batches(pool: Stills, size: int, seed: int) -> Iterator[Batch]:
    """Endless batches; half of the stills are mirrored (left becomes right), all vary in brightness and contrast."""
    rng = torch.Generator().manual_seed(seed)
    mirrored_place = torch.arange(len(ATTRIBUTES["image"]["place"]))
    mirrored_place[[_LEFT, _RIGHT]] = mirrored_place[[_RIGHT, _LEFT]]
    while True:
        chosen = torch.randint(len(pool.labels), (size,), generator=rng)
        pixels, labels, places = pool.pixels[chosen].float(), pool.labels[chosen], pool.places[chosen]
        mirror = torch.rand(size, generator=rng) < 0.5
        pixels = torch.where(mirror[:, None, None, None], pixels.flip(-1), pixels)
        turned = mirror & (labels[:, _PLACE] != UNKNOWN)
        labels[turned, _PLACE] = mirrored_place[labels[turned, _PLACE]]
        places[mirror, 0] = 1.0 - places[mirror, 0]
        contrast, light = torch.rand(2, size, 1, 1, 1, generator=rng) - 0.5
        yield Batch((pixels * (1 + 0.15 * contrast) + 0.2 * light,), labels, still_targets(places))


def still_targets(places: Tensor) -> Tensor:
    """Centre and radius from ``[R, 3]`` places, scaled to about -1 to 1."""
    return (places - torch.tensor([0.5, 0.5, 0.2])) * torch.tensor([2.5, 2.5, 8.0])


def render_sounds(count: int, seed: int) -> Sounds:
    """``count`` sounds of 2 to 12 s, every combination of attributes equally often."""
    rng = np.random.default_rng(seed)
    blank = clips.render(all_scenes("video")[0], rng, frames=clips.FRAMES[0])
    fbanks, labels = [], []
    for scene in itertools.islice(itertools.cycle(all_scenes("audio")), count):
        seconds = float(rng.uniform(2.0, 12.0 if rng.random() < _LONG_SHARE else 6.0))
        if rng.random() < _TRACK_SHARE:
            file = clips.encode(blank, rng, sounds.render(scene, rng, seconds, rate=16_000))
        else:
            file = sounds.encode(sounds.render(scene, rng, seconds), "wav")
        fbanks.append(fbank(torch.from_numpy(open_audio(file)), MEL_BINS).half())
        labels.append(label(scene, SOUND_ATTRIBUTES))
    return Sounds(fbanks, torch.tensor(labels))


def sound_batches(pool: Sounds, seed: int) -> Iterator[Batch]:
    """Endless batches with about equal numbers of frames: random cuts of 2.6, 5.1 or 10.2 s, with random loudness."""
    rng = np.random.default_rng(seed)
    cuts, shares = zip(*_CUTS, strict=True)
    while True:
        longest = int(rng.choice(cuts, p=shares))
        chosen = rng.integers(0, len(pool.fbanks), _FRAMES_PER_BATCH // longest)
        starts = [int(rng.integers(0, max(0, len(pool.fbanks[i]) - longest) + 1)) for i in chosen]
        clipped = [pool.fbanks[i][start : start + longest] for i, start in zip(chosen, starts, strict=True)]
        gains = rng.uniform(-0.15, 0.15, len(chosen))
        yield sound_batch([clip.float() + float(gain) for clip, gain in zip(clipped, gains, strict=True)], pool, chosen)


def sound_batch(fbanks: Sequence[Tensor], pool: Sounds, chosen: Sequence[int] | np.ndarray) -> Batch:
    """Filterbanks ``[F, M]`` of different lengths, zero-padded, with the labels of the ``chosen`` sounds."""
    frames = torch.tensor([len(one) for one in fbanks])
    padded = torch.nn.utils.rnn.pad_sequence([one.float() for one in fbanks], batch_first=True)
    return Batch((padded, frames), pool.labels[torch.as_tensor(chosen)], torch.zeros(len(fbanks), 0))


def _pictures(rng: np.random.Generator) -> Iterator[tuple[Scene, Pixels, Placement]]:
    for scene in itertools.cycle(all_scenes("image")):
        pixels, placement = pictures.render_placed(scene, rng)
        suffix = "jpg" if rng.random() < 0.6 else "png"
        yield scene, (open_image(pictures.encode(pixels, suffix, rng)) if suffix == "jpg" else pixels), placement


def _frames(rng: np.random.Generator) -> Iterator[tuple[Scene, Pixels, Placement]]:
    for scene in itertools.cycle(all_scenes("video")):
        clip = clips.render(scene, rng)
        decoded = open_video(clips.encode(clip, rng), range)
        for index in rng.choice(len(decoded), STILLS_PER_CLIP, replace=False):
            yield scene, decoded[index], clip.placements[index]
