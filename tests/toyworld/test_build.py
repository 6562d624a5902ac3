"""The embedded world: its language, and its files: true to the plan, the same for the same seed, never incomplete."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from lavis_chatbridge import cli
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.media import open_audio, open_image, open_video
from lavis_chatbridge.prompting.conversation import MODALITIES, Modality
from lavis_chatbridge.schema import Sample, read_jsonl
from lavis_chatbridge.toyworld import build
from lavis_chatbridge.toyworld.build import Sizes, build_world
from lavis_chatbridge.toyworld.language import CAPTIONS, QUESTION_KINDS, caption, fill, terse
from lavis_chatbridge.toyworld.world import ATTRIBUTES, TRIPLES, all_scenes

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


def test_counts_are_those_of_the_plan_and_every_file_opens(world: Path) -> None:
    counts = json.loads((world / "world.json").read_text())["counts"]
    for modality, train in zip(MODALITIES, (14, 8, 8), strict=True):
        for split, count in (("train", train), ("test", 5), ("heldout", 4)):
            assert len(samples(world, f"{modality}_{split}")) == count == counts[f"{modality}_{split}"]
    assert len(samples(world, "joint_test")) == len(QUESTION_KINDS) * 8
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
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--images 2 --videos 1 --sounds 1 --test 1 --heldout 1 --joint 1 --processes 1"
    assert cli.main(["world", "build", str(tmp_path / "w"), *sizes.split()]) == 0
    assert "annotation files" in capsys.readouterr().out
    assert cli.main(["world", "build", str(tmp_path / "v"), "--images", "-1"]) == 2
