"""Answer scores: the official VQA accuracy to the last digit, and exact match by the benchmark's normalisation."""

from __future__ import annotations

import contextlib
import io
import random
from types import SimpleNamespace

import pytest

from lavis_chatbridge.tasks.scoring.answers import exact_match, plain, squad, vocabulary, vqa, vqa_accuracy, yes_no

POOL = [
    "red",
    "Red.",
    "a red",
    "two",
    "2",
    "dont",
    "don't",
    "1,000",
    "1.5",
    "yes",
    "no",
    "the cat!",
    "cat",
    "on/off",
    "",
]


def test_vqa_accuracy_equals_the_official_evaluator() -> None:
    from lavis.common.vqa_tools.vqa_eval import VQAEval

    rng = random.Random(3)
    answers = [rng.choices(rng.sample(POOL, 4), k=10) for _ in range(240)]
    said = [rng.choice([*texts, rng.choice(POOL)]) for texts in answers]
    truth = {
        number: {
            "answers": [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(texts)],
            "question_type": "what",
            "answer_type": "other",
        }
        for number, texts in enumerate(answers)
    }
    official = VQAEval(
        SimpleNamespace(qa=truth, getQuesIds=lambda: list(truth)),
        SimpleNamespace(qa={number: {"answer": text} for number, text in enumerate(said)}),
        n=2,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        official.evaluate()
    overall, each = vqa_accuracy(said, answers)
    assert overall == official.accuracy["overall"]
    assert dict(enumerate(each)) == official.evalQA


def test_vqa_accuracy_by_hand() -> None:
    answers = [["blue"] * 2 + ["red"] * 8]
    assert vqa_accuracy(["Blue"], answers) == (60.0, [60.0])  # 8 x min(1, 2/3) + 2 x min(1, 1/3), over 10
    assert vqa_accuracy(["a red"], answers)[0] == 100.0


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
    assert exact_match(["Guitar.", "drum"], [["guitar"], ["piano", "flute"]]) == [100.0, 0.0]


def test_yes_and_no_have_precision_and_recall() -> None:
    said = ["Yes, it is.", "yes", "No.", "no", "perhaps"]
    scores, each = yes_no(said, [["Yes"], ["No"], ["No"], ["Yes"], ["Yes"]])
    assert each == [100.0, 0.0, 100.0, 0.0, 0.0]
    assert scores == {
        "yes_no": 40.0, "precision": 50.0, "recall": pytest.approx(100 / 3), "F1": pytest.approx(40.0),
        "yes_share": 40.0,
    }  # fmt: skip
    assert yes_no(["yes"] * 4, [["yes"], ["no"]] * 2)[0]["precision"] == 50.0
