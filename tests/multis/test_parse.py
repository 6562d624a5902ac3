"""Questions and answers in every usual form of language models are parsed; ambiguous ones are rejected."""

from __future__ import annotations

import pytest

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.multis.parse import read_description, read_pairs
from lavis_chatbridge.multis.prompts import Pair

PAIRS = [Pair(question="What is it?", answer="A dog."), Pair(question="Where?", answer="On grass,\nnear a tree.")]


@pytest.mark.parametrize(
    "text",
    [
        "Question: What is it?\nAnswer: A dog.\nQuestion: Where?\nAnswer: On grass,\nnear a tree.",
        "Here you are:\r\n\r\nQ: What is it?\r\nA: A dog.\r\nQ: Where?\r\nA: On grass,\r\nnear a tree.\r\n",
        "1. Question: What is it?\n   Answer: A dog.\n2. Question: Where?\n   Answer: On grass,\nnear a tree.",
        "**Question 1:** What is it?\n**Answer 1:** A dog.\n\n"
        "**Question 2:** Where?\n**Answer 2:** On grass,\nnear a tree.",
        "- User: What is it?\n- Assistant: A dog.\n- User: Where?\n- Assistant: On grass,\nnear a tree.",
        "### Human #1: What is it?\n### Reply #1: A dog.\n### Human #2: Where?\n### Reply #2: On grass,\nnear a tree.",
        "```\nperson: What is it?\nresponse: A dog.\nperson: Where?\nresponse: On grass,\nnear a tree.\n```",
        "Question\uff1aWhat is it?\nAnswer\uff1aA dog.\nQuestion\uff1aWhere?\nAnswer\uff1aOn grass,\nnear a tree.",
        '[{"question": "What is it?", "answer": "A dog."}, '
        '{"question": " Where?", "answer": "On grass,\\nnear a tree. "}]',
    ],
    ids=["asked for", "short", "numbered", "bold", "list", "headings", "fenced", "wide colons", "JSON"],
)
def test_every_usual_form_gives_the_same_pairs(text: str) -> None:
    assert read_pairs(text) == PAIRS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A dog.", "no line begins with 'Question:' or 'Answer:'"),
        ("Answer: A dog.\nQuestion: What is it?", "part 1 is an answer, expected the other"),
        ("Question: What?\nQuestion: Where?\nAnswer: Here.", "part 2 is a question, expected the other"),
        ("Question: What is it?\nAnswer: **\nQuestion: Where?\nAnswer: Here.", "part 2 is empty"),
        ("Question: What is it?\nAnswer: A dog.\nQuestion: Where?", "the last question has no answer"),
        ('[{"question": "What is it?"}]', "JSON, but no list"),
        ('[{"question": "What is it?", "answer": " "}]', "JSON without questions"),
    ],
)
def test_ambiguous_answers_are_rejected(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_pairs(text)


@pytest.mark.parametrize(
    "text", ["A dog: it runs.", "**Detailed Description:** A dog: it runs.\n", "```\nA dog: it runs.\n```"]
)
def test_a_description_is_read_without_its_title(text: str) -> None:
    assert read_description(text) == "A dog: it runs."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n", "the answer is empty"),
        ("Question: What is it?\nAnswer: A dog.", "questions and answers, expected a description"),
    ],
)
def test_other_answers_are_no_description(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_description(text)
