"""Multiple choice: which option a reply names, and scores that do not depend on letters."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.prompting.conversation import Slot, Text
from lavis_chatbridge.prompting.templates import listed, without_letters
from lavis_chatbridge.tasks.choice import ChoiceTask, chosen
from lavis_chatbridge.tasks.predictions import Prediction
from lavis_chatbridge.tasks.scoring.scores import scored
from lavis_chatbridge.tasks.settings import EvaluationSettings

OPTIONS = ["a drum", "an oboe", "a bass drum", "none"]


@pytest.mark.parametrize(
    ("reply", "position"),
    [
        ("A", 0), ("b", 1), ("(C) a bass drum", 2), ("D. none", 3), ("B\nbecause", 1), ("The answer is C.", 2),
        ("An oboe.", 1), ("It is an oboe, I think.", 1), ("a bass drum", 2), ("E", -1), ("", -1),
        ("a drum or an oboe", -1), ("drums and basses", -1), ("A drum", 0),
    ],
)  # fmt: skip
def test_a_reply_names_an_option_by_letter_or_words(reply: str, position: int) -> None:
    assert chosen(reply, OPTIONS) == position


def test_letters_of_the_publisher_are_removed() -> None:
    assert without_letters(["A. red", "(B) blue", "C: U.S."]) == ["red", "blue", "U.S."]
    assert without_letters(["A. red", "blue"]) == ["A. red", "blue"]


class Model:
    """Answers every question by ``answer(letter -> option)``, and finds the last option the likeliest."""

    def __init__(self, answer) -> None:
        self.answer, self.prompts = answer, []

    def generate(self, samples, sampling):
        texts = ["".join(piece.text for piece in pieces if isinstance(piece, Text)) for pieces in samples["pieces"]]
        return [self.answer(dict(re.findall(r"^([A-Z])\. (.*)$", text, re.MULTILINE))) for text in texts]

    def answer_scores(self, sample, answers):
        self.prompts += ["".join(piece.text for piece in sample["pieces"][0] if isinstance(piece, Text))]
        return torch.arange(len(answers)).float()[None], torch.ones(len(answers))


def asked(model, count: int = 40, **settings) -> dict:
    rng, how = np.random.default_rng(0), EvaluationSettings(metrics=["choice"], **settings)
    options = [OPTIONS[: rng.integers(2, 5)] for _ in range(count)]
    meta = [{"options": own, "correct": int(rng.integers(len(own)))} for own in options]
    pieces = [[Slot("audio"), Text(f"What plays?\n{listed(own)}")] for own in options]
    samples = {"sample_id": [f"s{n}" for n in range(count)], "pieces": pieces, "meta": meta, "source": "toy"}
    replies = ChoiceTask(how).predict(model, samples)
    return scored(
        [Prediction(sample_id=f"s{n}", meta=meta[n], answers=["x"], **reply) for n, reply in enumerate(replies)], how
    )


def oboe(lettered: dict[str, str]) -> str:
    return next((f"{letter}. {text}" for letter, text in lettered.items() if text == "an oboe"), "none")


def test_a_favourite_letter_scores_chance_and_a_known_option_counts_under_any_letter() -> None:
    favourite = asked(Model(lambda lettered: "A"))
    assert favourite["headline"] == favourite["scores"]["choice"] == pytest.approx(favourite["chance"])
    assert 25.0 < favourite["chance"] < 50.0
    known, fixed = asked(Model(oboe)), asked(Model(oboe), option_orders=1)
    assert known["scores"]["choice"] == fixed["scores"]["choice"] > known["chance"]


def test_ranking_asks_without_the_options_and_once() -> None:
    model = Model(oboe)
    assert asked(model, inference_method="rank")["samples"] == 40
    assert model.prompts == ["What plays?"] * 40


def test_a_sample_without_options_is_named() -> None:
    with pytest.raises(DataError, match=r"sample 's0' has no meta.options and meta.correct"):
        ChoiceTask().predict(SimpleNamespace(), {"meta": [{}], "sample_id": ["s0"]})
