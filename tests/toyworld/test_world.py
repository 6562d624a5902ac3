"""The embedded world: its language, its files, and by independent measurements its media.

Files are true to the plan, the same for the same seed, and never incomplete.
"""

from __future__ import annotations

import colorsys
import hashlib
import itertools
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lavis_chatbridge import cli
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.media import has_audio_track, open_audio, open_image, open_video
from lavis_chatbridge.prompting.conversation import MODALITIES, Modality
from lavis_chatbridge.schema import Sample, read_jsonl
from lavis_chatbridge.toyworld import build, clips, pictures, sounds
from lavis_chatbridge.toyworld.build import Sizes, build_world
from lavis_chatbridge.toyworld.language import CAPTIONS, QUESTION_KINDS, caption, fill, terse
from lavis_chatbridge.toyworld.world import ATTRIBUTES, TRIPLES, Scene, all_scenes

SMALL = Sizes(images=14, videos=8, sounds=8, test=5, heldout=4, joint=8)
OPENERS = {"image": open_image, "video": lambda path: open_video(path, lambda n: range(n)), "audio": open_audio}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world") / "small", SMALL, seed=3, processes=2)


def samples(world: Path, name: str) -> list[Sample]:
    return list(read_jsonl(world / "annotations" / f"{name}.jsonl", root=world))


def files(world: Path) -> dict[str, bytes]:
    return {str(path.relative_to(world)): path.read_bytes() for path in sorted(world.rglob("*")) if path.is_file()}


def facts_in(text: str, modality: Modality) -> dict[str, str]:
    """Attribute -> value, for attributes with exactly one value in ``text``."""
    words = set(re.findall("[a-z]+", text))
    named = {name: [value for value in values if value in words] for name, values in ATTRIBUTES[modality].items()}
    return {name: values[0] for name, values in named.items() if len(values) == 1}


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_caption_of_every_scene_reads_back(modality: Modality) -> None:
    rng = random.Random(0)
    for scene in all_scenes(modality):
        texts = [fill(template, scene) for template in CAPTIONS[modality]]
        for text in [*texts, terse(scene, rng), caption(scene, rng)]:
            assert facts_in(text, modality) == scene.facts
            assert "{" not in text
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)


@pytest.mark.parametrize("modality", MODALITIES)
def test_held_out_triples_leave_every_pair_in_training(modality: Modality) -> None:
    seen = [scene.facts for scene in all_scenes(modality) if not scene.held_out]
    assert 0.08 <= 1 - len(seen) / len(all_scenes(modality)) <= 0.15
    for first, second in itertools.combinations(TRIPLES[modality], 2):
        pairs = {(facts[first], facts[second]) for facts in seen}
        assert len(pairs) == len(ATTRIBUTES[modality][first]) * len(ATTRIBUTES[modality][second])


def test_annotations_are_pinned(world: Path) -> None:
    texts = [path.read_bytes() for path in sorted((world / "annotations").iterdir())]
    assert hashlib.sha256(b"".join(texts)).hexdigest()[:16] == "c122d21e6aef8521"


def test_every_file_opens_and_is_annotated(world: Path) -> None:
    media = {m for path in (world / "annotations").iterdir() for s in read_jsonl(path, world) for m in s.files}
    assert all(OPENERS[medium.modality](medium.path).size > 0 for medium in media)
    rendered = {str(path) for path in world.rglob("*") if path.is_file() and path.suffix not in (".json", ".jsonl")}
    assert {medium.path for medium in media} == rendered


def test_training_has_neither_held_out_combinations_nor_two_media(world: Path) -> None:
    def triples(modality: Modality, split: str) -> set[tuple[str, ...]]:
        return {tuple(s.facts[name] for name in TRIPLES[modality]) for s in samples(world, f"{modality}_{split}")}

    for modality in MODALITIES:
        assert not triples(modality, "heldout") & (triples(modality, "train") | triples(modality, "test"))
        assert {s.held_out for s in samples(world, f"{modality}_heldout")} == {True}
    for path in (world / "annotations").glob("*_train.jsonl"):
        assert all(len(sample.files) == 1 for sample in read_jsonl(path, world))


def test_joint_questions_have_both_media_in_both_orders_and_in_words(world: Path) -> None:
    shown, told = samples(world, "joint_test"), samples(world, "joint_words")
    orders = Counter(sample.modalities for sample in shown)
    assert set(orders) == {("image", "audio"), ("audio", "image"), ("video", "audio"), ("audio", "video")}
    own_track = [sample for sample in shown if sample.media[0].path == sample.media[1].path]
    assert {sample.modalities for sample in own_track} == {("video", "audio")}
    assert Counter(sample.meta["asked"] for sample in shown) == dict.fromkeys(QUESTION_KINDS, 8)
    assert [(one.turns, one.answers) for one in shown] == [(one.turns, one.answers) for one in told]
    for sample in told:
        assert not sample.files
        found = [facts_in(medium.words[0], medium.modality) for medium in sample.media]
        assert {**found[0], **found[1]} == sample.facts


def test_the_same_seed_gives_the_same_bytes_and_another_replaces_the_world(world: Path, tmp_path: Path) -> None:
    folder = build_world(tmp_path / "again", SMALL, seed=3, processes=1)
    assert files(folder) == files(world)
    before = folder.stat().st_ino
    assert build_world(folder, SMALL, seed=3).stat().st_ino == before
    build_world(folder, Sizes(1, 1, 1, 1, 1, 1), seed=4, processes=1)
    assert len(files(folder)) < len(files(world))


def test_an_incomplete_world_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise RuntimeError("interrupted")

    monkeypatch.setattr(build, "render", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        build_world(tmp_path / "world", SMALL, processes=1)
    assert [path.name for path in tmp_path.iterdir()] == [".world.lock"]


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="has other files than an embedded world"):
        build_world(tmp_path, SMALL)
    with pytest.raises(DataError, match=r"thesis\.txt is a file, expected a folder"):
        build_world(tmp_path / "thesis.txt", SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--images 2 --videos 1 --sounds 1 --test 1 --heldout 1 --joint 1 --processes 1"
    assert cli.main(["world", "build", str(tmp_path / "w"), *sizes.split()]) == 0
    assert "annotation files" in capsys.readouterr().out
    assert cli.main(["world", "build", str(tmp_path / "v"), "--images", "-1"]) == 2


# --- renderings

HUES = {"red": 0, "orange": 30, "yellow": 57, "green": 120, "cyan": 180, "blue": 228, "purple": 275, "pink": 330}
PLACES = {"left": (0.27, 0.5), "right": (0.73, 0.5), "top": (0.5, 0.27), "bottom": (0.5, 0.73), "centre": (0.5, 0.5)}


def scene_of(modality: Modality, **facts: str) -> Scene:
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
            wanted = scene_of("image", colour=colour, shape=shape, place=place, size="large")
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
        clip = clips.render(scene_of("video", motion=motion, colour=colour, shape=shape), rng)
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
    clip = clips.render(scene_of("video"), np.random.default_rng(6), frames=9)
    track = sounds.render(scene_of("audio"), np.random.default_rng(7), seconds=2.5, rate=16_000)
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
    samples = sounds.render(scene_of("audio", **facts), rng, seconds, 16_000).samples
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
