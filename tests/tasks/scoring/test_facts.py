"""Scores by facts, and what guessing would give."""

from __future__ import annotations

import random

import pytest

from lavis_chatbridge.tasks.predictions import Prediction
from lavis_chatbridge.tasks.scoring import facts
from lavis_chatbridge.tasks.scoring.records import score_records

COLOURS = ["red", "blue", "light blue"]


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
    assert facts.names_exactly(text, value, COLOURS) is right


def test_attribute_accuracy_counts_all_pairs_of_caption_and_attribute() -> None:
    truth = [{"colour": "red", "shape": "ring"}, {"colour": "blue", "shape": "star"}, {"colour": "red"}]
    said = ["a red ring", "a red star", "a blue thing"]
    records = [
        Prediction(sample_id=str(n), prediction=text, facts=fact)
        for n, (text, fact) in enumerate(zip(said, truth, strict=True))
    ]
    found = score_records(records)
    assert found["headline"] == found["scores"]["attribute_accuracy"] == pytest.approx(60.0)
    assert found["scores"]["all_attributes_right"] == pytest.approx(100 / 3)
    assert found["by_type"]["attribute"]["shape"] == {"samples": 2, "attribute_accuracy": 100.0}
    low, high = found["intervals"]["attribute_accuracy"]
    assert 0.0 <= low < 60.0 < high <= 100.0


def test_the_text_prior_is_what_blind_captions_score() -> None:
    rng = random.Random(0)
    train = [{"colour": rng.choice("aab"), "size": rng.choice("xy")} for _ in range(4000)]
    test = [{"colour": rng.choice("abb"), "size": "x"} for _ in range(4000)]
    values = {"colour": ["a", "b"], "size": ["x", "y"]}
    blind = [
        facts.attributes_right(f"{guess['colour']} {guess['size']}", truth, values)
        for guess, truth in zip(train, test, strict=True)
    ]
    share = sum(sum(right.values()) for right in blind) / (2 * len(blind))
    assert facts.text_prior(train, test) == pytest.approx(share, abs=0.02)
    assert facts.text_prior([{"a": "1"}], [{"a": "1"}]) == 1.0
    assert facts.text_prior([{"a": "1"}], [{"b": "1"}]) == 0.0
