"""Answer scores: the official VQA accuracy to the last digit, and exact match by the benchmark's normalisation."""

from __future__ import annotations

import contextlib
import io
import random

import pytest

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.tasks.scoring.answers import exact_match, plain, squad, vqa, vqa_accuracy

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


def make_questions(count: int = 240, seed: int = 3) -> tuple[dict[str, str], dict[str, list[str]], dict[str, str]]:
    rng = random.Random(seed)
    answers = {str(n): rng.choices(rng.sample(POOL, 4), k=10) for n in range(count)}
    predictions = {key: rng.choice([*texts, rng.choice(POOL)]) for key, texts in answers.items()}
    groups = {key: rng.choice(["yes/no", "number", "other"]) for key in answers}
    return predictions, answers, groups


def test_vqa_accuracy_equals_the_official_evaluator() -> None:
    from lavis.common.vqa_tools.vqa_eval import VQAEval

    predictions, answers, groups = make_questions()

    class Truth:
        qa = {
            key: {
                "answers": [
                    {"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(texts)
                ],
                "question_type": "what",
                "answer_type": groups[key],
            }
            for key, texts in answers.items()
        }

        def getQuesIds(self) -> list[str]:
            return list(self.qa)

    class Said:
        qa = {key: {"answer": text} for key, text in predictions.items()}

    official = VQAEval(Truth(), Said(), n=2)
    with contextlib.redirect_stdout(io.StringIO()):
        official.evaluate()
    ours = vqa_accuracy(predictions, answers, groups)
    assert ours["overall"] == official.accuracy["overall"]
    assert ours["by_type"] == official.accuracy["perAnswerType"]
    assert ours["each"] == official.evalQA


def test_vqa_accuracy_by_hand() -> None:
    answers = {"q": ["blue"] * 2 + ["red"] * 8}
    assert vqa_accuracy({"q": "Blue"}, answers)["overall"] == 60.0  # 8 x min(1, 2/3) + 2 x min(1, 1/3), over 10
    assert vqa_accuracy({"q": "a red"}, answers)["overall"] == 100.0


@pytest.mark.parametrize(
    ("normalise", "text", "expected"),
    [
        (plain, " A Man. ", "a man"),
        (squad, "The man's, hat", "mans hat"),
        (vqa, "Two the dogs,", "2 dogs"),
        (vqa, "dont", "don't"),
    ],
)
def test_normalisations(normalise, text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_exact_match_counts_any_answer() -> None:
    scored = exact_match({"a": "Guitar.", "b": "drum"}, {"a": ["guitar"], "b": ["piano", "flute"]})
    assert scored == {"overall": 50.0, "each": {"a": 100.0, "b": 0.0}}


def test_faults_are_named() -> None:
    with pytest.raises(DataError, match="the first is 'a'"):
        exact_match({"a": "x"}, {})
    with pytest.raises(DataError, match="unknown normalisation 'plian'"):
        exact_match({"a": "x"}, {"a": ["x"]}, "plian")
    with pytest.raises(DataError, match="no predictions"):
        vqa_accuracy({}, {})
