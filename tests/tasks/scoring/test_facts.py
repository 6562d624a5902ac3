"""Scores by facts, and what guessing would give."""

from __future__ import annotations

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


def test_the_text_prior_is_the_score_of_captions_of_other_media() -> None:
    train = [{"colour": "a", "size": "x"}, {"colour": "a", "size": "y"}, {"colour": "b", "size": "x"}]
    test = [{"colour": "a", "size": "x"}, {"colour": "b", "size": "x"}, {"colour": "b", "size": "x"}]
    assert facts.text_prior(train, test) == pytest.approx((4 / 9 + 2 / 3) / 2)  # colour: 2/3 1/3 + 1/3 2/3; size: 2/3
    assert facts.text_prior([{"a": "1"}], [{"b": "1"}]) == 0.0
