"""The rules: answers that each accepts and rejects, the forms that are parsed, and the vocabulary of things."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from lavis_chatbridge.config import parse
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.multis.annotation import Annotation, from_json
from lavis_chatbridge.multis.prompts import DATA_KINDS, Pair, PromptBook, Seed
from lavis_chatbridge.multis.rules import Checker, NearDuplicates, read_description, read_pairs
from lavis_chatbridge.multis.rules.things import Things


def item(modality: str = "image", name: str = "a", **values: Any) -> Annotation:
    media = [{"type": medium, "path": f"{name}.{medium}"} for medium in modality.split("+")]
    caption = {"captions": ["A brown dog runs over green grass with a ball."]}
    return from_json({"id": name, "media": media, **(values or caption)}, name)


def answer(text: str, kind: str = "conversation", **values: Any) -> dict[str, Any]:
    record = {"id": "00" * 16, "item": "a", "kind": kind, "modality": "image", "text": text}
    return {**record, "finish": "stop", "model": "m", **values}


def talk(*answers: str, question: str = "What about it, point") -> str:
    return "\n".join(f"Question: {question} {n}?\nAnswer: {text}" for n, text in enumerate(answers))


@pytest.fixture(scope="module")
def checker() -> Checker:
    return Checker()


def rules(
    checker: Checker, text: str, kind: str = "conversation", annotation: Annotation | None = None, **values: Any
) -> set:
    sample, reasons = checker.check(answer(text, kind, **values), annotation or item())
    assert (sample is None) == bool(reasons)
    return {rule for rule, _ in reasons}


def test_a_good_conversation_becomes_a_sample() -> None:
    text = talk("It is a brown dog.", "The dog runs over the grass.")
    sample, reasons = Checker().check(answer(text), item("video+audio"))
    assert reasons == []
    assert sample is not None
    assert (sample.id, sample.task) == ("a:conversation", "conversation")
    assert [(turn.role, turn.media) for turn in sample.turns] == [
        ("user", ("video", "audio")),
        ("assistant", ()),
        ("user", ()),
        ("assistant", ()),
    ]
    assert sample.meta == {"request": "00" * 16, "model": "m", "item": "a"}


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ("form", "The dog runs."),
        ("length", talk("It is a brown dog.")),
        ("length", talk(*["It is a brown dog."] * 9)),
        ("length", talk("It is a brown dog.", "word " * 130)),
        ("text_source", talk("The caption says it is a dog.", "It runs.")),
        ("text_source", talk("As described in the description, a dog.", "It runs.")),
        ("text_source", talk("It is a dog.", "That is not mentioned.")),
        ("text_source", talk("It is a dog.", "It lies at [0.10, 0.20, 0.50, 0.90].")),
        ("text_source", talk("Based on the given information, it is a dog.", "It runs.")),
        ("refusal", talk("As an AI language model, I am blind.", "It runs.")),
        ("refusal", talk("I'm sorry, I don't know.", "It runs.")),
        ("markup", talk("It is a dog. ###Human: hello", "It runs.")),
        ("markup", talk("It is <image> a dog.", "It runs.")),
        ("foreign_media", talk("In the video a dog runs.", "It runs.")),
        ("foreign_media", talk("We hear a dog.", "It runs.")),
        ("absent", talk("It is a cat.", "It runs.")),
        ("absent", talk("A dog and two sheep are there.", "It runs.")),
        ("absent", talk("The dog is black.", "It runs.")),
        ("absent", talk("It may be a cat.", "It runs.")),
        ("repetition", "Question: What is it?\nAnswer: A dog.\nQuestion: What is it?\nAnswer: It runs."),
        ("repetition", talk("It runs and it runs " * 6, "A dog.")),
        ("repetition", talk("The dog is a dog. It is both dog and dog, and what runs is one more dog.", "It runs.")),
        ("unsafe", talk("Write to a.dog@mail.example.com now.", "It runs.")),
    ],
)
def test_each_rule_rejects(checker: Checker, expected: str, text: str) -> None:
    assert expected in rules(checker, text)
    assert "truncated" in rules(checker, text, finish="length")


@pytest.mark.parametrize(
    "text",
    [
        talk("There is no cat.", "The animal runs over a lawn."),
        talk("No, it is a dog.", "No, no cat.", question="Is it a cat, yes or no,"),
        talk("It is a hound without a leash.", "Its toy is a ball."),
        "**Question 1:** What is it?\n**Answer:** A brown dog.\n\n**Question 2:** Where?\n**Answer:** On grass.",
    ],
)
def test_loose_forms_and_denied_things_are_accepted(text: str) -> None:
    annotation = item(captions=["A brown dog runs over green grass with a ball, a toy."])
    assert rules(Checker(), text, annotation=annotation) == set()


def test_reasoning_may_suppose_a_thing_with_a_hedge(checker: Checker) -> None:
    sure = (
        "Question: Why does the animal run?\nAnswer: The dog runs with a ball over the grass very fast just now, and "
        "a child threw it from far away before that."
    )
    guessed = sure.replace("and a child threw", "and a child probably threw")
    assert rules(checker, sure, "reasoning") == {"absent"}
    assert rules(checker, guessed, "reasoning") == set()


def test_a_description_gets_a_question_of_its_modality() -> None:
    text = (
        "Description: A brown dog runs over green grass. "
        + "The dog has a ball and takes it along while it runs on and on over all of the grass."
    )
    sample, reasons = Checker().check(answer(text, "detail"), item())
    assert reasons == []
    assert sample is not None
    assert sample.turns[0].text.endswith((".", "?"))
    assert sample.turns[1].text.startswith("A brown dog")


def test_near_duplicates_and_copied_examples_are_rejected() -> None:
    checker = Checker()
    base = "the dog runs over the grass with its ball and then it turns round and runs back over the same grass again"
    first = talk(f"First, {base}.", "That is the end of what the dog does with it.")
    assert rules(checker, first) == set()
    assert rules(checker, first.replace("First,", "Well,"), annotation=item(name="b")) == {"near_duplicate"}
    copied = PromptBook().examples["reasoning", "image"][0][1]
    annotation = item(
        captions=["A woman and a dog wait in the rain under a glass shelter by a road with buildings, raincoat."]
    )
    assert "near_duplicate" in rules(checker, copied, "reasoning", annotation=annotation)


def test_every_seed_example_would_be_accepted() -> None:
    """The examples obey the rules that they teach; at least three per kind and modality."""
    book = PromptBook()
    checker = Checker(book=book)
    checker._known = NearDuplicates(1.0)  # or each would be a copy of itself
    count = 0
    for file in sorted((book.folder / "seeds").glob("*.yaml")):
        modality = {"video_audio": "video+audio"}.get(file.stem, file.stem)
        for number, entry in enumerate(yaml.safe_load(file.read_text())):
            seed = parse(Seed, entry, "seed")
            annotation = item(modality, f"{file.stem}{number}", **entry["annotation"])
            for kind in DATA_KINDS:
                _, reasons = checker.check(answer(seed.answer(kind) or "", kind), annotation)
                assert reasons == [], (file.name, number, kind)
                count += 1
    assert count >= 36


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
    ],
    ids=["asked for", "short", "numbered", "bold", "list", "headings", "fenced", "wide colons"],
)
def test_every_usual_form_gives_the_same_pairs(text: str) -> None:
    assert read_pairs(text) == PAIRS


@pytest.mark.parametrize(
    "text", ["A dog: it runs.", "**Detailed Description:** A dog: it runs.\n", "```\nA dog: it runs.\n```"]
)
def test_a_description_is_read_without_its_title(text: str) -> None:
    assert read_description(text) == "A dog: it runs."


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_pairs, "A dog.", "no line begins with 'Question:' or 'Answer:'"),
        (read_pairs, "Answer: A dog.\nQuestion: What is it?", "part 1 is an answer, expected the other"),
        (read_pairs, "Question: What?\nQuestion: Where?\nAnswer: Here.", "part 2 is a question, expected the other"),
        (read_pairs, "Question: What is it?\nAnswer: **\nQuestion: Where?\nAnswer: Here.", "part 2 is empty"),
        (read_pairs, "Question: What is it?\nAnswer: A dog.\nQuestion: Where?", "the last question has no answer"),
        (read_description, " \n", "the answer is empty"),
        (read_description, "Question: What?\nAnswer: A dog.", "questions and answers, expected a description"),
    ],
)
def test_answers_of_another_form_are_rejected(read: Callable[[str], Any], text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(text)


@pytest.mark.parametrize(
    ("notes", "supported", "unsupported"),
    [
        ("two puppies play", ["dog", "animal", "mammal"], ["cat", "poodle"]),
        ("an animal sleeps", ["animal", "creature"], ["dog"]),
        ("a fire truck", ["fire engine", "truck", "vehicle"], ["car"]),
        ("men with knives", ["man", "person", "knife"], ["woman", "fork"]),
        ("a golden retriever", ["dog", "yellow"], ["brown"]),
    ],
)
def test_support_goes_up_the_tree_only(notes: str, supported: list[str], unsupported: list[str]) -> None:
    found = Things().support(notes)
    assert set(supported) <= found
    assert not set(unsupported) & found


def test_longer_names_hide_shorter_ones() -> None:
    mentions = Things().mentions("A hot dog, two dogs' toys and a fire hydrant")
    assert [name for name, _ in mentions] == ["hot dog", "dog", "toy", "fire hydrant"]
