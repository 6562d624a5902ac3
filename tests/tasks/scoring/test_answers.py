"""Scores of single texts: VQA accuracy as the official evaluator, normalisations, yes and no, facts."""

from __future__ import annotations

import contextlib
import io
import random
from types import SimpleNamespace

import pytest

from lavis_chatbridge.tasks.predictions import Prediction
from lavis_chatbridge.tasks.scoring import answers
from lavis_chatbridge.tasks.scoring.answers import plain, squad, vocabulary, vqa, vqa_accuracy, yes_no
from lavis_chatbridge.tasks.scoring.records import score_records

POOL = ["red", "Red.", "a red", "two", "2", "dont", "don't", "1,000", "1.5", "yes", "no", "the cat!", "cat", ""]


def test_vqa_accuracy_equals_the_official_evaluator() -> None:
    from lavis.common.vqa_tools.vqa_eval import VQAEval

    rng = random.Random(3)
    said_by_humans = [rng.choices(rng.sample(POOL, 4), k=10) for _ in range(240)]
    said = [rng.choice([*texts, rng.choice(POOL)]) for texts in said_by_humans]
    types = {"question_type": "what", "answer_type": "other"}
    truth = {
        number: {"answers": [{"answer": text, "answer_id": i} for i, text in enumerate(texts)], **types}
        for number, texts in enumerate(said_by_humans)
    }
    official = VQAEval(
        SimpleNamespace(qa=truth, getQuesIds=lambda: list(truth)),
        SimpleNamespace(qa={number: {"answer": text} for number, text in enumerate(said)}),
        n=2,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        official.evaluate()
    overall, each = vqa_accuracy(said, said_by_humans)
    assert overall == official.accuracy["overall"]
    assert dict(enumerate(each)) == official.evalQA


def test_vqa_accuracy_by_hand() -> None:
    humans = [["blue"] * 2 + ["red"] * 8]
    assert vqa_accuracy(["Blue"], humans) == (60.0, [60.0])  # 8 x min(1, 2/3) + 2 x min(1, 1/3), over 10
    assert vqa_accuracy(["a red"], humans)[0] == 100.0


@pytest.mark.parametrize(
    ("normalise", "text", "expected"),
    [
        (plain, " A Man. ", "a man"),
        (squad, "The man's, hat", "mans hat"),
        (vqa, "Two the dogs,", "2 dogs"),
        (vqa, "dont", "don't"),
        (vocabulary, "An Electric Bass.", vocabulary("electric_bass")),
        (vocabulary, "2", vocabulary("two")),
        (vocabulary, "More than ten", vocabulary("more than 10")),
    ],
)
def test_normalisations(normalise, text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_exact_match_counts_any_answer() -> None:
    assert answers.exact_match(["Guitar.", "drum"], [["guitar"], ["piano", "flute"]]) == [100.0, 0.0]


def test_yes_and_no_have_precision_and_recall() -> None:
    said = ["Yes, it is.", "yes", "No.", "no", "perhaps"]
    scores, each = yes_no(said, [["Yes"], ["No"], ["No"], ["Yes"], ["Yes"]])
    assert each == [100.0, 0.0, 100.0, 0.0, 0.0]
    assert scores == {
        "yes_no": 40.0, "precision": 50.0, "recall": pytest.approx(100 / 3), "F1": pytest.approx(40.0),
        "yes_share": 40.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value", "right"),
    [
        ("a RED ring.", "red", True),
        ("a coloured ring", "red", False),
        ("a red and blue ring", "red", False),
        ("a light blue ring", "light blue", True),
        ("a light blue ring", "blue", False),
        ("a blue ring", "light blue", False),
    ],
)
def test_a_caption_names_exactly_the_value(text: str, value: str, right: bool) -> None:
    assert answers.names_exactly(text, value, ["red", "blue", "light blue"]) is right


def test_attribute_accuracy_counts_all_pairs_of_caption_and_attribute() -> None:
    truth = [{"colour": "red", "shape": "ring"}, {"colour": "blue", "shape": "star"}, {"colour": "red"}]
    said = ["a red ring", "a red star", "a blue thing"]
    records = [Prediction(sample_id=text, prediction=text, facts=fact) for text, fact in zip(said, truth, strict=True)]
    found = score_records(records)
    assert found["headline"] == found["scores"]["attribute_accuracy"] == pytest.approx(60.0)
    assert found["scores"]["all_attributes_right"] == pytest.approx(100 / 3)
    assert found["by_type"]["attribute"]["shape"] == {"samples": 2, "attribute_accuracy": 100.0}
    low, high = found["intervals"]["attribute_accuracy"]
    assert 0.0 <= low < 60.0 < high <= 100.0


def test_the_text_prior_is_the_score_of_captions_of_other_media() -> None:
    train = [{"colour": "a", "size": "x"}, {"colour": "a", "size": "y"}, {"colour": "b", "size": "x"}]
    test = [{"colour": "a", "size": "x"}, {"colour": "b", "size": "x"}, {"colour": "b", "size": "x"}]
    assert answers.text_prior(train, test) == pytest.approx((4 / 9 + 2 / 3) / 2)  # colour: 2/3 1/3 + 1/3 2/3; size: 2/3
    assert answers.text_prior([{"a": "1"}], [{"b": "1"}]) == 0.0
