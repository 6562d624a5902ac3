"""Annotations in words, and prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.multis.annotation import ITEM_MODALITIES, describe, from_json, read_annotations
from lavis_chatbridge.multis.prompts import DATA_KINDS, PromptBook

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
        ({"media": []}, "found no media"),
        ({"media": [{"type": "smell", "path": "x"}]}, "'smell' is not one of"),
        ({"media": [{"type": "image", "path": "a"}, {"type": "audio", "path": "b"}]}, r"found image\+audio"),
    ],
)
def test_a_faulty_annotation_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({**CLIP, **change}) + "\n")
    with pytest.raises(DataError, match=rf"x\.jsonl:1.*{message}"):
        list(read_annotations(tmp_path / "x.jsonl"))


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
        assert len(book.messages(kind, annotation, shots=1)) == 4
        assert messages == book.messages(kind, annotation)
    assert book.question(annotation.modality, "x") == book.question(annotation.modality, "x")


def test_a_prompt_folder_is_checked(tmp_path: Path) -> None:
    words = (PromptBook().folder / "kinds.yaml").read_text()
    (tmp_path / "kinds.yaml").write_text(words)
    with pytest.raises(ConfigError, match=r"seeds/image\.yaml"):
        PromptBook(tmp_path)
    (tmp_path / "kinds.yaml").write_text(words.replace("  reasoning:", "  detial:"))
    with pytest.raises(ConfigError, match="'detial' is not one of"):
        PromptBook(tmp_path)
