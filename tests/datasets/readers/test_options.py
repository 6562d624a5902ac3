"""Readers of benchmarks with options: the forms of an answer, and faults that are named by position."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lavis_chatbridge.datasets.readers import READERS, Origin
from lavis_chatbridge.errors import DataError

OPTIONS = ["A. a drum", "B. a flute"]


def read(name: str, folder: Path, content: object, media: dict[str, str] | None = None, **options: object) -> list:
    path = folder / ("rows.csv" if isinstance(content, str) else "rows.json")
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    origin = Origin("toy", {"file": [str(path)]}, str(folder), media or {"audio": "{audio_id}"}, options)
    return list(READERS[name](origin))


@pytest.mark.parametrize(("answer", "correct"), [("A", 0), ("(B)", 1), ("B. a flute", 1), ("a drum", 0)])
def test_an_answer_is_a_letter_or_an_option(tmp_path: Path, answer: str, correct: int) -> None:
    row = {
        "id": "q",
        "audio_id": "./a.wav",
        "question": "Which?",
        "choices": OPTIONS,
        "answer": answer,
        "task": "music",
    }
    [sample] = read("mmau", tmp_path, [row])
    assert sample.meta == {"options": ["a drum", "a flute"], "correct": correct, "types": {"task": "music"}}
    assert sample.answers == (sample.meta["options"][correct],)
    assert sample.turns[0].text.endswith("\nA. a drum\nB. a flute\nAnswer with the letter of the right option.")
    assert sample.media[0].path.endswith("/a.wav")


@pytest.mark.parametrize("answer", ["C", "A horn", ""])
def test_an_answer_that_is_no_option_is_named(tmp_path: Path, answer: str) -> None:
    row = {"id": "q", "audio_id": "a.wav", "question": "Which?", "choices": OPTIONS, "answer": answer}
    with pytest.raises(DataError, match=r"rows.json.*answer .*(none of the options|expected text)"):
        read("mmau", tmp_path, [row])


def test_media_of_av_odyssey_come_in_order_and_its_marks_are_words(tmp_path: Path) -> None:
    row = {
        "question_id": "1", "subfield": "Timbre", "question": "Is [audio2] of [img1]?", "options": OPTIONS,
        "answer": "B",        "image_path": ["i.jpg"], "audio_path": ["1.wav", "2.wav"], "video_path": [],
    }  # fmt: skip
    media = {"image": "x/{path}", "video": "x/{path}", "audio": "x/{path}"}
    [sample] = read("av_odyssey", tmp_path, [row], media)
    assert [medium.path.rpartition("/")[2] for medium in sample.media] == ["i.jpg", "1.wav", "2.wav"]
    assert sample.turns[0].text.startswith("Is (audio 2) of (image 1)?\n")


def test_clips_of_other_classes_and_splits_are_left_out(tmp_path: Path) -> None:
    lines = ["video_id,clip_id,text,label,annotation,mode"]
    lines += [f"v,{n},so,0,{kind},{mode}" for n, (kind, mode) in enumerate(
        [("Positive", "test"), ("Neutral", "test"), ("Negative", "train")])]  # fmt: skip
    media = {"video": "{video_id}/{clip_id}.mp4"}
    chosen = {"classes": ["Negative", "Positive"], "transcript": True}
    [sample] = read("mosi", tmp_path, "\n".join(lines) + "\n", media, **chosen)
    assert (sample.id, sample.answers) == ("v_0", ("Positive",))
    assert sample.turns[0].text.startswith('The speaker says: "so". What is the sentiment')


def test_a_label_that_is_neither_yes_nor_no_is_named(tmp_path: Path) -> None:
    row = {"video_id": "v", "task": "AV Matching", "text": "Do they match?", "label": "Maybe"}
    with pytest.raises(DataError, match="label is 'Maybe', expected Yes or No"):
        read("avhbench", tmp_path, [row], {"video": "{video_id}.mp4"})
    caption = {"video_id": "v", "task": "AV Captioning", "text": "Describe it.", "label": "A dog barks."}
    [sample] = read("avhbench", tmp_path, [caption], {"video": "{video_id}.mp4"}, captions=True)
    assert sample.captions == ("A dog barks.",)
