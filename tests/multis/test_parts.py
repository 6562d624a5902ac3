"""The small parts: annotations in words, journal, limits, prompts, vocabulary, near duplicates."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.multis.annotation import AnnotationIndex, describe, from_json, read_annotations
from lavis_chatbridge.multis.duplicates import NearDuplicates
from lavis_chatbridge.multis.journal import Journal, read_journal
from lavis_chatbridge.multis.limits import Budget, bound_tokens, estimate_tokens, price_of
from lavis_chatbridge.multis.prompts import DATA_KINDS, MEDIA_KINDS, PromptBook
from lavis_chatbridge.multis.things import Things

CLIP = {
    "id": "v",
    "media": [{"type": "video", "path": "v.mp4"}, {"type": "audio", "path": "v.wav"}],
    "captions": ["A dog runs."],
    "sound_captions": ["Barking."],
    "tags": ["Dog", {"label": "Bark", "score": 0.9}],
    "frames": [
        {"position": 0.8, "caption": "late"},
        {"position": 0.2, "time": 1.25, "caption": "early", "semantics": ["grass", {"label": "sky", "share": 0.314}]},
        {"position": 0.5, "regions": [{"text": "a ball", "box": [0, 0.25, 0.5, 1]}]},
    ],
}


def test_a_description_is_in_time_order_with_people_first() -> None:
    assert describe(from_json(CLIP)).splitlines() == [
        "What people say about the clip:",
        "- A dog runs.",
        "Frame at 1.2 s: early",
        "  Areas: grass, sky 31 %",
        "Frame at 50 % of the clip:",
        "  - a ball at [0.00, 0.25, 0.50, 1.00]",
        "Frame at 80 % of the clip: late",
        "What people say about the sound:",
        "- Barking.",
        "Sounds recognised: Dog, Bark",
    ]


def test_annotations_survive_the_file_and_are_found_by_id(tmp_path: Path) -> None:
    file = tmp_path / "annotations-0.jsonl"
    records = [{**CLIP, "id": name} for name in ("ä", "b", "c")]
    file.write_text("\n".join(json.dumps(from_json(record).to_json()) for record in records) + "\n")
    assert [one.id for one in read_annotations(tmp_path)] == ["ä", "b", "c"]
    index = AnnotationIndex(tmp_path)
    assert (len(index), "b" in index, index.get("z")) == (3, True, None)
    assert index["b"] == from_json({**CLIP, "id": "b"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": "no list"}, "captions: expected a list"),
        ({"caption": ["x"]}, "did you mean 'captions'"),
        ({"media": []}, "at least one medium"),
        ({"frames": [3]}, "expected a list of objects"),
        ({"media": [{"type": "smell", "path": "x"}]}, "'smell' is not one of"),
    ],
)
def test_a_faulty_annotation_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({**CLIP, **change}) + "\n")
    with pytest.raises(DataError, match=message) as error:
        list(read_annotations(file))
    assert "x.jsonl:1" in str(error.value)


def test_an_image_and_a_sound_are_no_modality_of_the_pipeline() -> None:
    media = [{"type": "image", "path": "a"}, {"type": "audio", "path": "b"}]
    with pytest.raises(DataError, match="audio and image"):
        _ = from_json({**CLIP, "media": media}).modality


def test_a_journal_groups_what_waits_and_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: syncs.append(handle) or fsync(handle))

    async def write_many(journal: Journal) -> None:
        await asyncio.gather(*(journal.write({"n": n}) for n in range(200)))

    with Journal(tmp_path / "j.jsonl") as journal:
        asyncio.run(write_many(journal))
    assert sorted(record["n"] for record in read_journal(tmp_path / "j.jsonl")) == list(range(200))
    assert len(syncs) < 20


def test_a_torn_line_is_passed_over_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2, "te')
    assert [record["n"] for record in read_journal(path)] == [1]
    with Journal(path) as journal:
        journal.append({"n": 3})
    assert [record["n"] for record in read_journal(path)] == [1, 3]


def test_a_full_disk_delays_a_write_instead_of_losing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = os.write, []

    def scarce(handle: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) == 1:
            return write(handle, data[:5])
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(handle, data)

    with Journal(tmp_path / "j.jsonl", patience=0.2) as journal:
        monkeypatch.setattr(os, "write", scarce)
        journal.append({"number": 1})
        assert list(read_journal(journal.path)) == [{"number": 1}]
        monkeypatch.setattr(os, "write", lambda handle, data: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(DataError, match="No space left"):
            journal.append({"number": 2})


def test_a_budget_waits_for_what_is_under_way() -> None:
    async def spend() -> list[bool]:
        budget = Budget(10.0)
        assert await budget.reserve(6.0)
        waiting = asyncio.create_task(budget.reserve(6.0))
        await asyncio.sleep(0)
        assert not waiting.done()
        budget.settle(6.0, 3.0)
        second = await waiting
        budget.settle(6.0, 6.0)
        return [second, await budget.reserve(1.5), budget.spent == 9.0]

    assert asyncio.run(spend()) == [True, False, True]


def test_token_numbers_are_bounds_and_estimates() -> None:
    messages = [{"role": "user", "content": "The quick brown fox jumps over 12 extraordinarily lazy dogs, twice."}]
    assert bound_tokens(messages) == 67 + 8
    assert 14 <= estimate_tokens(messages) - 8 <= 18
    assert bound_tokens([{"content": "ß"}]) == 2 + 8


def test_prices_are_found_by_the_longest_prefix(tmp_path: Path) -> None:
    assert price_of("gpt-4o-mini-2024-07-18").input == 0.15
    assert price_of("gpt-4o").cost(1_000_000, 100_000) == 2.5 + 1.0
    with pytest.raises(ConfigError, match="no price for the model 'gpt-4omega'"):
        price_of("gpt-4omega")
    (tmp_path / "p.yaml").write_text("mine: {input: 1, outptu: 2}")
    with pytest.raises(ConfigError, match="did you mean 'output'"):
        price_of("mine", tmp_path / "p.yaml")


def test_every_kind_and_modality_has_three_examples_and_a_prompt() -> None:
    book = PromptBook()
    media = {m: [{"type": kind, "path": "x"} for kind in m.split("+")] for m in MEDIA_KINDS}
    for modality in MEDIA_KINDS:
        for kind in DATA_KINDS:
            assert len(book.examples(kind, modality)) >= 3
            annotation = from_json({"id": "x", "media": media[modality], "captions": ["A dog {runs}."]})
            messages = book.messages(kind, annotation)
            assert "{" not in messages[0]["content"]
            assert messages[-1]["content"].endswith("- A dog {runs}.")
            fewer = book.messages(kind, annotation, shots=1, seed=5)
            assert len(fewer) == 4
            assert fewer == book.messages(kind, annotation, shots=1, seed=5)
    assert book.question("detail", "audio", "x") == book.question("detail", "audio", "x")


def test_prompts_of_ones_own_are_checked_like_ours(tmp_path: Path) -> None:
    own = PromptBook().folder
    (tmp_path / "seeds").mkdir()
    (tmp_path / "kinds.yaml").write_text((own / "kinds.yaml").read_text())
    (tmp_path / "seeds" / "image.yaml").write_text((own / "seeds" / "image.yaml").read_text())
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
    assert [name for name, _ in Things().mentions("A hot dog, two dogs' toys and a fire hydrant")] == [
        "hot dog",
        "dog",
        "toy",
        "fire hydrant",
    ]


def test_near_duplicates_are_told_from_merely_similar_texts() -> None:
    words = [f"word{n}" for n in range(100)]
    index = NearDuplicates(threshold=0.8)
    index.add("base", " ".join(words))
    near = [*words[:50], "changed", *words[51:]]  # 95 of 101 shingles: Jaccard 0.94
    far = [f"other{n}" if n % 8 == 0 else word for n, word in enumerate(words)]  # Jaccard about 0.47
    found = index.find(" ".join(near))
    assert found is not None
    assert found[0] == "base"
    assert abs(found[1] - 95 / 101) < 0.08
    assert index.find(" ".join(far)) is None
    assert index.find("something else altogether") is None
