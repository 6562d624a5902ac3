"""Scores by facts, by accepted answers, and what guessing would give."""

from __future__ import annotations

import random

import pytest

from lavis_chatbridge.tasks import metrics

COLOURS = ["red", "blue", "light blue"]


@pytest.mark.parametrize(
    ("text", "value", "right"),
    [
        ("a red ring", "red", True),
        ("A RED ring.", "red", True),
        ("a coloured ring", "red", False),
        ("a red and blue ring", "red", False),
        ("a blue ring", "red", False),
        ("a light blue ring", "light blue", True),
        ("a light blue ring", "blue", False),
        ("a blue ring", "light blue", False),
        ("red, red, red", "red", True),
        ("", "red", False),
    ],
)
def test_a_caption_names_exactly_the_value(text, value, right):
    assert metrics.names_exactly(text, value, COLOURS) is right


def test_attribute_accuracy():
    facts = [{"colour": "red", "shape": "ring"}, {"colour": "blue", "shape": "star"}, {"colour": "red"}]
    values = {"colour": ["red", "blue"], "shape": ["ring", "star"]}
    score = metrics.attribute_accuracy(["a red ring", "a red star", "a blue thing"], facts, values)
    assert score.to_dict() == {
        "attribute_accuracy": 3 / 5,
        "all_attributes_right": 1 / 3,
        "attributes": {"colour": 1 / 3, "shape": 1.0},
        "samples": 3,
    }


def test_the_text_prior_is_what_blind_captions_score():
    rng = random.Random(0)
    train = [{"colour": rng.choice("aab"), "size": rng.choice("xy")} for _ in range(4000)]
    test = [{"colour": rng.choice("abb"), "size": "x"} for _ in range(4000)]
    blind = [f"{fact['colour']} {fact['size']}" for fact in train]
    scored = metrics.attribute_accuracy(blind, test, {"colour": ["a", "b"], "size": ["x", "y"]})
    assert metrics.text_prior(train, test) == pytest.approx(scored.overall.value, abs=0.02)
    assert metrics.text_prior([{"a": "1"}], [{"a": "1"}]) == 1.0
    assert metrics.text_prior([{"a": "1"}], [{"b": "1"}]) == 0.0


def test_exact_match_ignores_case_articles_and_punctuation():
    share = metrics.exact_match(["The red ring.", "two", "left"], [["red ring"], ["2", "Two"], ["right"]])
    assert (share.right, share.total) == (2, 3)


def test_values_in_order_of_appearance():
    assert metrics.values_of([{"a": "1"}, {"a": "2", "b": "x"}, {"a": "1"}]) == {"a": ["1", "2"], "b": ["x"]}
