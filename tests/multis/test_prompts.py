"""Annotations in words, prompts, and the vocabulary of things."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.multis.annotation import ITEM_MODALITIES, describe, from_json, read_annotations
from lavis_chatbridge.multis.prompts import DATA_KINDS, PromptBook
from lavis_chatbridge.multis.things import Things

CLIP = {
    "id": "v",
    "media": [{"type": "video", "path": "v.mp4"}, {"type": "audio", "path": "v.wav"}],
    "captions": ["A dog runs."],
    "sound_captions": ["Barking."],
    "tags": ["Dog", "Bark"],
    "frames": [
        {"position": 0.8, "caption": "late"},
        {"position": 0.2, "time": 1.25, "caption": "early", "semantics": {"grass": 0.5, "sky": 0.314}},
        {"position": 0.5, "regions": [{"text": "a ball", "box": [0, 0.25, 0.5, 1]}]},
    ],
}


def test_a_description_is_in_time_order_with_people_first() -> None:
    assert describe(from_json(CLIP, "x")).splitlines() == [
        "What people say about the clip:",
        "- A dog runs.",
        "Frame at 1.2 s: early",
        "  Areas: grass 50 %, sky 31 %",
        "Frame at 50 % of the clip:",
        "  - a ball at [0.00, 0.25, 0.50, 1.00]",
        "Frame at 80 % of the clip: late",
        "What people say about the sound:",
        "- Barking.",
        "Sounds recognised: Dog, Bark",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": "no list"}, "captions: expected a list"),
        ({"caption": ["x"]}, "did you mean 'captions'"),
        ({"media": []}, "at least one medium"),
        ({"media": [{"type": "smell", "path": "x"}]}, "'smell' is not one of"),
    ],
)
def test_a_faulty_annotation_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({**CLIP, **change}) + "\n")
    with pytest.raises(DataError, match=rf"x\.jsonl:1.*{message}"):
        list(read_annotations(tmp_path / "x.jsonl"))


def test_an_image_and_a_sound_are_no_modality_of_the_pipeline() -> None:
    media = [{"type": "image", "path": "a"}, {"type": "audio", "path": "b"}]
    with pytest.raises(DataError, match="audio and image"):
        _ = from_json({**CLIP, "media": media}, "x").modality


@pytest.mark.parametrize("modality", ITEM_MODALITIES)
def test_every_kind_has_three_examples_and_a_prompt(modality: str) -> None:
    book = PromptBook()
    media = [{"type": medium, "path": "x"} for medium in modality.split("+")]
    annotation = from_json({"id": "x", "media": media, "captions": ["A dog {runs}."]}, "x")
    for kind in DATA_KINDS:
        assert len(book.examples[kind, modality]) >= 3
        messages = book.messages(kind, annotation)
        assert "{" not in messages[0]["content"]
        assert messages[-1]["content"].endswith("- A dog {runs}.")
        fewer = book.messages(kind, annotation, shots=1, seed=5)
        assert len(fewer) == 4
        assert fewer == book.messages(kind, annotation, shots=1, seed=5)
    assert book.question("detail", annotation.modality, "x") == book.question("detail", annotation.modality, "x")


def test_a_prompt_folder_is_checked(tmp_path: Path) -> None:
    own = PromptBook().folder
    (tmp_path / "seeds").mkdir()
    (tmp_path / "kinds.yaml").write_text((own / "kinds.yaml").read_text())
    (tmp_path / "seeds" / "image.yaml").write_text((own / "seeds" / "image.yaml").read_text())
    with pytest.raises(ConfigError, match=r"video\.yaml"):
        PromptBook(tmp_path)
    for name in ("video", "audio", "video_audio"):
        (tmp_path / "seeds" / f"{name}.yaml").write_text("[]")
    with pytest.raises(ConfigError, match="conversation of video has 0"):
        PromptBook(tmp_path)


@pytest.mark.parametrize(
    ("notes", "supported", "unsupported"),
    [
        ("two puppies play", ["dog", "animal", "mammal"], ["cat", "poodle"]),
        ("an animal sleeps", ["animal", "creature"], ["dog"]),
        ("a fire truck", ["fire engine", "truck", "vehicle"], ["car"]),
        ("men with knives", ["man", "person", "knife"], ["woman", "fork"]),
        ("a golden retriever", ["dog", "yellow"], ["brown"]),
    ],
)
def test_support_goes_up_the_tree_only(notes: str, supported: list[str], unsupported: list[str]) -> None:
    found = Things().support(notes)
    assert set(supported) <= found
    assert not set(unsupported) & found


def test_longer_names_hide_shorter_ones() -> None:
    mentions = Things().mentions("A hot dog, two dogs' toys and a fire hydrant")
    assert [name for name, _ in mentions] == ["hot dog", "dog", "toy", "fire hydrant"]
