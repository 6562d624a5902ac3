"""Predictions scored by named metrics: percentages, intervals, types of questions, records without truth."""

from __future__ import annotations

import pytest

from lavis_chatbridge.tasks.predictions import Prediction
from lavis_chatbridge.tasks.scoring import captions
from lavis_chatbridge.tasks.scoring.records import score_records, types_of


def record(number: int, said: str, *answers: str, **more: object) -> Prediction:
    return Prediction(sample_id=f"s{number}", prediction=said, answers=list(answers), **more)


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)


def test_answers_overall_and_by_type():
    records = [
        record(0, "Two.", *["2"] * 4, meta={"type": "number"}),
        record(1, "red", *["red"] * 2, *["blue"] * 8, meta={"type": "other", "types": {"asked": ["what", "colour"]}}),
        record(2, "green", *["red"] * 10, meta={"type": "other"}),
    ]
    found = score_records(records, ["vqa_accuracy", "exact_match"], "vqa")
    assert found["scores"] == {"vqa_accuracy": 53.33, "exact_match": pytest.approx(200 / 3)}
    assert (found["metric"], found["headline"]) == ("vqa_accuracy", 53.33)
    assert found["by_type"]["type"] == {
        "number": {"samples": 1, "vqa_accuracy": 100.0, "exact_match": 100.0},
        "other": {"samples": 2, "vqa_accuracy": 30.0, "exact_match": 50.0},
    }
    assert set(found["by_type"]["asked"]) == {"what / colour"}
    low, high = found["intervals"]["vqa_accuracy"]
    assert low < 53.33 < high
    assert (found["samples"], found["unscored"]) == (3, 0)


def test_samples_that_share_a_medium_are_resampled_together():
    def answers(shared: bool) -> list[Prediction]:
        media = [[("image", f"{n // 5 if shared else n}.png")] for n in range(1000)]
        return [record(n, "red" if n // 5 % 2 else "blue", "red", media=media[n]) for n in range(1000)]

    widths = []
    for shared in (False, True):
        low, high = score_records(answers(shared), ["exact_match"])["intervals"]["exact_match"]
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] * 5**0.5, rel=0.1)  # five answers about a picture count as one


def test_captions_are_in_percent_and_by_type(no_java):
    records = [
        Prediction(
            sample_id=str(n), prediction=f"a {w} cat sits", references=[f"a {w} cat sits"], meta={"type": "near-domain"}
        )
        for n, w in enumerate(["red", "blue", "small"])
    ]
    found = score_records([*records, Prediction(sample_id="x", prediction="?")], ["BLEU", "CIDEr", "METEOR"])
    assert found["scores"]["BLEU_1"] == pytest.approx(100.0)
    assert found["headline"] == found["scores"]["BLEU_4"]
    assert set(found["intervals"]) == {"CIDEr"}  # BLEU is no mean over samples
    assert found["by_type"]["type"]["near-domain"] == {"samples": 3, "CIDEr": pytest.approx(found["scores"]["CIDEr"])}
    assert (found["unscored"], found["tokenizer"]) == (1, "python")
    assert found["left_out"]["METEOR"].startswith("Java is not installed")


def test_what_cannot_be_scored_has_its_fault(no_java):
    twice = score_records([record(0, "a", "a"), record(0, "b", "a")], ["exact_match"])
    assert twice == {"samples": 2, "fault": "sample 's0' was predicted twice"}
    assert score_records([record(0, "a")], ["exact_match"])["fault"].startswith("none of 1 predictions has references")
    both = [record(0, "a", "a", index=n) for n in (0, 1)]  # a data set that uses an id twice
    assert score_records(both, ["exact_match"])["scores"] == {"exact_match": 100.0}
    empty = score_records([record(n, "a cat", "", ".") for n in range(2)], ["CIDEr"])
    assert empty["fault"] == "the references of all 2 predictions are empty"


@pytest.mark.parametrize(
    ("meta", "types"),
    [
        ({"type": 0}, {"type": "0"}),
        ({"type": ["a", 1], "question_type": "b"}, {"type": "a / 1", "question type": "b"}),
        ({"type": "", "types": {"turn": 3}}, {"turn": "3"}),
    ],
)
def test_a_type_of_questions_may_be_anything(meta, types):
    assert types_of(record(0, "a", meta=meta)) == types
