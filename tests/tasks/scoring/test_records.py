"""Records scored by named metrics: percentages, types of questions, records without truth."""

from __future__ import annotations

import pytest

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.tasks.scoring import captions
from lavis_chatbridge.tasks.scoring.records import announce, score_records, scores_or_fault, type_of


def record(number: int, said: str, *answers: str, kind: object = None) -> dict:
    meta = {} if kind is None else {"type": kind}
    return {"sample_id": f"s{number}", "prediction": said, "answers": list(answers), "references": [], "meta": meta}


def test_answers_overall_and_by_type():
    records = [
        record(0, "Two.", *["2"] * 4, kind="number"),
        record(1, "red", *["red"] * 2, *["blue"] * 8, kind="other"),
        record(2, "green", *["red"] * 10, kind="other"),
    ]
    found = score_records(records, ["vqa_accuracy", "exact_match"], "vqa")
    assert found["scores"] == {"vqa_accuracy": 53.33, "exact_match": pytest.approx(200 / 3)}
    assert found["headline"] == 53.33
    assert found["by_type"]["vqa_accuracy"] == {"number": 100.0, "other": 30.0}
    assert found["by_type"]["exact_match"] == {"number": 100.0, "other": 50.0}
    assert (found["samples"], found["unscored"]) == (3, 0)


def test_captions_are_in_percent_and_java_is_asked_for_first(monkeypatch, caplog):
    monkeypatch.setattr(captions, "_java_fault", lambda heap: "no Java")
    records = [
        {"sample_id": str(n), "prediction": f"a {word} cat sits", "references": [f"a {word} cat sits"]}
        for n, word in enumerate(["red", "blue", "small"])
    ]
    found = score_records([*records, {"sample_id": "x", "prediction": "?", "references": []}], ["BLEU", "METEOR"])
    assert found["scores"]["BLEU_1"] == pytest.approx(100.0)
    assert found["headline"] == found["scores"]["BLEU_4"]
    assert (found["unscored"], found["tokenizer"], found["left_out"]) == (1, "python", {"METEOR": "no Java"})
    assert set(announce(["METEOR", "exact_match"])) == {"ptb", "METEOR"}
    assert "METEOR is not available here: no Java" in caplog.text
    assert announce(["exact_match"]) == {}


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(DataError, match="'s0' was predicted twice"):
        score_records([record(0, "a", "a"), record(0, "b", "a")], ["exact_match"])
    with pytest.raises(DataError, match="none of 1 predictions"):
        score_records([record(0, "a")], ["exact_match"])
    with pytest.raises(DataError, match="prediction 0 has no sample_id"):
        score_records([{"caption": "a"}], ["exact_match"])


def test_what_is_no_record_is_a_fault_and_no_accident():
    both = [{**record(0, "a", "a"), "index": n} for n in (0, 1)]  # a data set that uses an id twice
    assert score_records(both, ["exact_match"])["scores"] == {"exact_match": 100.0}
    with pytest.raises(DataError, match="'s0' was predicted twice"):
        score_records([*both, both[0]], ["exact_match"])
    with pytest.raises(DataError, match="prediction 1 is 7, expected text"):
        score_records([record(0, "a", "a"), {**record(1, "a", "a"), "prediction": 7}], ["exact_match"])
    with pytest.raises(DataError, match=r"prediction 0 is to be compared with .7., expected texts"):
        score_records([{**record(0, "a"), "references": 7}], ["exact_match"])
    found = scores_or_fault([record(0, "a")], ["exact_match"])
    assert found == {"samples": 1, "fault": "none of 1 predictions has references or answers to be compared with"}


def test_captions_without_a_word_are_no_references(monkeypatch):
    monkeypatch.setattr(captions, "_java_fault", lambda heap: "no Java")
    with pytest.raises(DataError, match="no reference of 2 predictions holds a word"):
        score_records(
            [{"sample_id": str(n), "prediction": "a cat", "references": ["", "."]} for n in range(2)], ["CIDEr"]
        )
    records = [{"sample_id": str(n), "prediction": "a cat", "references": ["", "a cat"][n:]} for n in range(2)]
    assert score_records(records, ["BLEU"])["scores"]["BLEU_1"] == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("meta", "kind"),
    [
        ({"type": 3}, "3"),
        ({"type": 0}, "0"),
        ({"type": ["a", 1]}, "a / 1"),
        ({"type": ""}, ""),
        ({}, ""),
        (["type"], ""),
    ],
)
def test_a_type_of_questions_may_be_anything(meta, kind):
    assert type_of({"meta": meta}) == kind
