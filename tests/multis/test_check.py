"""The third stage: what each rule accepts and rejects, the forms of answers, statistics, and the page of samples."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lavis_chatbridge import cli
from lavis_chatbridge.config import parse
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.multis.annotation import Annotation, from_json
from lavis_chatbridge.multis.check import check, statistics, write_page
from lavis_chatbridge.multis.generate import ANSWERS
from lavis_chatbridge.multis.prompts import DATA_KINDS, Pair, PromptBook, Seed
from lavis_chatbridge.multis.rules import Checker, NearDuplicates, read_description, read_pairs
from lavis_chatbridge.multis.rules.things import Things

CAPTION = "A brown dog runs over green grass with a ball."
CHECKER = Checker()


def item(modality: str = "image", name: str = "a", **values: Any) -> Annotation:
    media = [{"type": medium, "path": f"{name}.{medium}"} for medium in modality.split("+")]
    return from_json({"id": name, "media": media, **(values or {"captions": [CAPTION]})}, name)


def answer(text: str, kind: str = "conversation", **values: Any) -> dict[str, Any]:
    record = {"id": "00" * 16, "item": "a", "kind": kind, "modality": "image", "text": text}
    return {**record, "finish": "stop", "model": "m", **values}


def talk(*answers: str, question: str = "What about it, point") -> str:
    return "\n".join(f"Question: {question} {n}?\nAnswer: {text}" for n, text in enumerate(answers))


def rules(
    checker: Checker, text: str, kind: str = "conversation", about: Annotation | None = None, **values: Any
) -> set:
    sample, reasons = checker.check(answer(text, kind, **values), about or item())
    assert (sample is None) == bool(reasons)
    return {rule for rule, _ in reasons}


def test_good_answers_become_samples_and_a_description_gets_a_question() -> None:
    text = talk("It is a brown dog.", "The dog runs over the grass.")
    sample, _ = Checker().check(answer(text), item("video+audio"))
    assert sample is not None
    assert (sample.id, sample.task) == ("a:conversation", "conversation")
    shown = [(turn.role, turn.media) for turn in sample.turns]
    assert shown == [("user", ("video", "audio")), ("assistant", ()), ("user", ()), ("assistant", ())]
    assert sample.meta == {"request": "00" * 16, "model": "m", "item": "a"}
    text = f"{CAPTION}\nThe dog has a ball and takes it along while it runs on and on over all of the grass."
    sample, _ = Checker().check(answer(f"**Detailed Description:** {text}", "detail"), item())
    assert sample is not None
    assert sample.turns[0].text.endswith((".", "?"))
    assert sample.turns[1].text == text


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ("form", "The dog runs."),
        ("length", talk("It is a brown dog.")),
        ("length", talk("It is a brown dog.", "word " * 130)),
        ("text_source", talk("The caption says it is a dog.", "It runs.")),
        ("text_source", talk("It is a dog.", "That is not mentioned.")),
        ("text_source", talk("It is a dog.", "It lies at [0.10, 0.20, 0.50, 0.90].")),
        ("refusal", talk("As an AI language model, I am blind.", "It runs.")),
        ("markup", talk("It is a dog. ###Human: hello", "It runs.")),
        ("markup", talk("It is <image> a dog.", "It runs.")),
        ("foreign_media", talk("In the video a dog runs.", "It runs.")),
        ("foreign_media", talk("We hear a dog.", "It runs.")),
        ("absent", talk("It is a cat.", "It runs.")),
        ("absent", talk("The dog is black.", "It runs.")),
        ("absent", talk("It may be a cat.", "It runs.")),
        ("repetition", "Question: What is it?\nAnswer: A dog.\nQuestion: What is it?\nAnswer: It runs."),
        ("repetition", talk("It runs and it runs " * 6, "A dog.")),
        ("repetition", talk("The dog is a dog. It is both dog and dog, and what runs is one more dog.", "It runs.")),
        ("unsafe", talk("Write to a.dog@mail.example.com now.", "It runs.")),
    ],
)
def test_each_rule_rejects(expected: str, text: str) -> None:
    assert expected in rules(CHECKER, text)
    assert "truncated" in rules(CHECKER, text, finish="length")


def test_denied_things_are_accepted() -> None:
    for text in (
        talk("There is no cat.", "The animal runs over a lawn."),
        talk("No, it is a dog.", "No, no cat.", question="Is it a cat, yes or no,"),
        talk("It is a hound without a leash.", "It runs."),
    ):
        assert rules(Checker(), text) == set()


def test_reasoning_may_suppose_a_thing_with_a_hedge() -> None:
    talked = "The dog runs with a ball over the grass very fast just now, and a child threw it from far away before."
    sure = f"Question: Why does the animal run?\nAnswer: {talked}"
    guessed = sure.replace("and a child threw", "and a child probably threw")
    assert rules(CHECKER, sure, "reasoning") == {"absent"}
    assert rules(CHECKER, guessed, "reasoning") == set()


def test_near_duplicates_and_copied_examples_are_rejected() -> None:
    checker = Checker()
    base = "the dog runs over the grass with its ball and then it turns round and runs back over the same grass again"
    first = talk(f"First, {base}.", "That is the end of what the dog does with it.")
    assert rules(checker, first) == set()
    assert rules(checker, first.replace("First,", "Well,"), about=item(name="b")) == {"near_duplicate"}
    copied = PromptBook().examples["reasoning", "image"][0][1]
    about = item(captions=["A woman, a dog and a raincoat in the rain under a glass shelter, a road, buildings."])
    assert "near_duplicate" in rules(checker, copied, "reasoning", about)


def test_every_seed_example_would_be_accepted() -> None:
    """The examples obey the rules that they teach."""
    book = PromptBook()
    checker = Checker(book=book)
    checker._known = NearDuplicates(1.0)  # or each would be a copy of itself
    for file in sorted((book.folder / "seeds").glob("*.yaml")):
        for number, entry in enumerate(yaml.safe_load(file.read_text())):
            seed = parse(Seed, entry, "seed")
            annotation = item(file.stem.replace("_", "+"), f"{file.stem}{number}", **entry["annotation"])
            for kind in DATA_KINDS:
                _, reasons = checker.check(answer(seed.answer(kind), kind), annotation)
                assert reasons == [], (file.name, number, kind)


@pytest.mark.parametrize(
    "text",
    [
        "Here you are:\r\n\r\nQ: What is it?\r\nA: A dog.\r\nQ: Where?\r\nA: On grass,\r\nnear a tree.\r\n",
        "1. Question: What is it?\n   Answer: A dog.\n2. Question: Where?\n   Answer: On grass,\nnear a tree.",
        "**Question 1:** What is it?\n**Answer:** A dog.\n**Question 2:** Where?\n**Answer:** On grass,\nnear a tree.",
        "- User: What is it?\n- Assistant: A dog.\n- User: Where?\n- Assistant: On grass,\nnear a tree.",
        "### Human #1: What is it?\n### Reply #1: A dog.\n### Human #2: Where?\n### Reply #2: On grass,\nnear a tree.",
        "```\nperson: What is it?\nresponse: A dog.\nperson: Where?\nresponse: On grass,\nnear a tree.\n```",
        "Question\uff1aWhat is it?\nAnswer\uff1aA dog.\nQuestion\uff1aWhere?\nAnswer\uff1aOn grass,\nnear a tree.",
    ],
)
def test_every_usual_form_gives_the_same_pairs(text: str) -> None:
    where = Pair(question="Where?", answer="On grass,\nnear a tree.")
    assert read_pairs(text) == [Pair(question="What is it?", answer="A dog."), where]


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_pairs, "A dog.", "no line begins with 'Question:' or 'Answer:'"),
        (read_pairs, "Answer: A dog.\nQuestion: What is it?", "part 1 is an answer, expected the other"),
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
        ("two puppies play", {"dog", "animal", "mammal"}, {"cat", "poodle"}),
        ("a fire truck", {"fire engine", "truck", "vehicle"}, {"car"}),
        ("men with knives", {"man", "person", "knife"}, {"woman", "fork"}),
        ("a golden retriever", {"dog", "yellow"}, {"brown"}),
    ],
)
def test_support_goes_up_the_tree_only(notes: str, supported: set, unsupported: set) -> None:
    assert Things().support(notes) & (supported | unsupported) == supported


def test_longer_names_hide_shorter_ones() -> None:
    mentions = Things().mentions("A hot dog, two dogs' toys and a fire hydrant")
    assert [name for name, _ in mentions] == ["hot dog", "dog", "toy", "fire hydrant"]


def test_the_page_escapes_texts_and_links_to_media(tmp_path: Path) -> None:
    evil = "</p><script>alert(1)</script><img src=x onerror=alert(2)>"
    media = [{"type": "image", "path": "here.png"}, {"type": "image", "path": "none.png"}]
    turns = [{"role": "user", "text": evil, "media": [0, 1]}, {"role": "assistant", "text": evil}]
    sample = {"id": evil, "media": media, "turns": turns, "meta": {"item": "a"}}
    rejected = {"id": "r", "item": "r", "media": [], "reasons": [{"rule": evil, "detail": evil}], "text": evil}
    (tmp_path / "here.png").write_bytes(b"picture")
    for name, record in (("accepted.jsonl", sample), ("rejected.jsonl", rejected)):
        (tmp_path / name).write_text(json.dumps(record) + "\n")
    (tmp_path / "statistics.json").write_text(json.dumps(statistics([], [])))
    assert write_page(tmp_path, tmp_path, tmp_path / "pages" / "a b.html") == 2
    page = (tmp_path / "pages" / "a b.html").read_text()
    assert "<script" not in page
    assert re.findall("<img.*?src=(.*?)[ >]", page) == ['"../here.png"']
    assert "http" not in page
    assert page.count("none.png does not exist") == 1


def test_statistics_are_complete_and_repeatable(tmp_path: Path) -> None:
    (tmp_path / "annotations.jsonl").write_text("".join(item(name=n).model_dump_json() + "\n" for n in "ab"))
    texts = [talk("It is a brown dog.", "It runs."), talk("It is a cat.", "It runs."), "no form"]
    records = [answer(text, item=name, id=name) for name, text in zip("abc", texts, strict=True)]
    (tmp_path / ANSWERS).write_text("".join(json.dumps(record) + "\n" for record in records * 2))
    for _ in range(2):
        counted = check(tmp_path, tmp_path / "annotations.jsonl", tmp_path / "out", Checker())
        assert (counted["accepted"], counted["rejected"]) == (1, 2), "a doubled record counts once"
        assert counted["reasons"] == {"absent": 1, "no_annotation": 1}
        assert counted["kinds"]["conversation"] == {"accepted": 1, "rejected": 2, "paper": 24_000}
        assert counted["modalities"]["image"] == {"accepted": 1, "rejected": 2}
        rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
        assert rejected[0]["reasons"] == [{"rule": "absent", "detail": "cat"}]
        assert rejected[0]["text"] == texts[1]


def test_the_settings_of_a_check_come_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "annotations.jsonl").write_text(item().model_dump_json())
    (tmp_path / ANSWERS).write_text(json.dumps(answer(talk("It is a brown dog."))))
    limits = "{pairs: [1, 9], question_words: [1, 60], answer_words: [2, 99]}"
    for kind, folder, status in (("talk", "", 2), ("conversation", "typo", 2), ("conversation", "", 0)):
        (tmp_path / "check.yaml").write_text(f"limits: {{{kind}: {limits}}}")
        rest = f"--annotations {tmp_path}/annotations.jsonl --out {tmp_path}/out --config {tmp_path}/check.yaml"
        assert cli.main(["multis", "check", str(tmp_path / folder), *rest.split()]) == status
    assert len((tmp_path / "out" / "accepted.jsonl").read_text().splitlines()) == 1
