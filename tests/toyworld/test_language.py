"""The world's language: captions read back to their facts, every answer is right by an independent reading."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from lavis_chatbridge.prompting import Message, Slot, Text, chat_prompt
from lavis_chatbridge.prompting.pieces import MODALITIES, Modality
from lavis_chatbridge.toyworld.language import (
    CAPTIONS,
    NOUNS,
    QUESTION_KINDS,
    SHORT,
    Question,
    QuestionKind,
    alone,
    attribute_question,
    caption,
    chat,
    conversation,
    facts_in,
    fill,
    joint,
    one_of,
    questions,
    short,
    terse,
)
from lavis_chatbridge.toyworld.world import Scene, all_scenes

SCENES: dict[Modality, list[Scene]] = {kind: all_scenes(kind) for kind in MODALITIES}
PAIRS: list[tuple[Modality, Modality]] = list(itertools.product(MODALITIES, MODALITIES))


@pytest.mark.parametrize("kind", MODALITIES)
def test_every_caption_of_every_scene_reads_back(kind: Modality) -> None:
    rng = random.Random(0)
    for scene in SCENES[kind]:
        texts = [fill(template, scene) for template in CAPTIONS[kind]]
        for text in [*texts, terse(scene, rng), caption(scene, rng)]:
            assert facts_in(text, kind) == scene.facts
            assert "{" not in text
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)


@pytest.mark.parametrize("kind", MODALITIES)
def test_short_descriptions_state_only_what_they_name(kind: Modality) -> None:
    for scene in SCENES[kind]:
        named = {name for name in scene.facts if f"{{{name}}}" in SHORT[kind]}
        assert facts_in(short(scene), kind) == {name: scene.facts[name] for name in named}


def test_a_caption_that_names_two_values_of_an_attribute_states_neither() -> None:
    assert facts_in("a red circle and a blue circle", "image") == {"shape": "circle"}
    assert facts_in("Red? REDDISH.", "image") == {"colour": "red"}


def _scenes(kinds: tuple[Modality, ...], rng: random.Random) -> list[Scene]:
    return [rng.choice(SCENES[kind]) for kind in kinds]


class _Reader:
    """Answers questions from their words alone, by other means than those that made them."""

    def __init__(self, scenes: list[Scene]) -> None:
        self.scenes = scenes

    def medium(self, words: str) -> Scene:
        ordinal = {"first": 0, "second": 1}
        for word, index in ordinal.items():
            if word in words.split():
                return self.scenes[index]
        noun = next(word for word in words.split() if any(word in nouns for nouns in NOUNS.values()))
        return next(scene for scene in self.scenes if noun in NOUNS[scene.modality])

    def value(self, words: str) -> str:
        """The value of ``the colour of the picture``, or of ``the colour``."""
        name, _, owner = words.removeprefix("the ").partition(" of ")
        if owner:
            return self.medium(owner).facts[name]
        (value,) = {scene.facts[name] for scene in self.scenes if name in scene.facts}
        return value

    def answer(self, question: Question) -> str:
        text = question.text.rstrip("?")
        return {
            "name": self.name,
            "compose": self.compose,
            "match": self.match,
            "compare": self.compare,
            "conditional": self.conditional,
        }[question.kind](text)

    def name(self, text: str) -> str:
        text = re.sub(r"^(what is|name|tell me) ", "", text)
        if which := re.fullmatch(r"which (\w+) does (.+) have", text):
            text = f"the {which[1]} of {which[2]}"
        return " and ".join(self.value(part) for part in re.split(r" and (?=the \w+(?: of|$))", text))

    def compose(self, text: str) -> str:
        text = re.sub(r"describe | in short|in short, what is |sum up ", "", text)
        things = []
        for part in text.split(" and "):
            scene = self.medium(part)
            one, other = (
                scene.facts[name]
                for name in (("pitch", "timbre") if scene.modality == "audio" else ("colour", "shape"))
            )
            things.append(f"an {one} {other}" if one == "orange" else f"a {one} {other}")
        return " and ".join(things)

    def match(self, text: str) -> str:
        things, words = text.split(": ")
        things = re.sub(r"which of these words fit |of these words, which fit ", "", things)
        media = [self.medium(part) for part in things.split(" and ")]
        offered = words.split(", ")
        if len(media) == 1:
            fitting = [word for word in offered if word in media[0].facts.values()]
            return " and ".join(fitting) if len(fitting) == 2 else "unclear"
        fits = [[word for word in offered if word in scene.facts.values()] for scene in media]
        return " and ".join("|".join(words) for words in fits)

    def compare(self, text: str) -> str:
        if go := re.search(r"both go (up|down)", text):
            wanted = {"up": {"up", "rising"}, "down": {"down", "falling"}}[go[1]]
            held = {scene.facts.get("motion", scene.facts.get("pattern")) for scene in self.scenes}
            return "yes" if held == wanted else "no"
        text = re.sub(r", say yes, else no$", "", text)
        text = re.sub(r"^(if|is it true that|do these hold:|does this hold:|is) ", "", text)
        clauses = re.findall(r"(the \w+(?: of the (?:first |second )?\w+)?) (?:is )?(\w+)(?:,| and|$)", text)
        assert clauses
        return "yes" if all(self.value(subject) == value for subject, value in clauses) else "no"

    def conditional(self, text: str) -> str:
        subject = r"(the \w+(?: of the (?:first |second )?\w+)?)"
        found = re.fullmatch(
            rf"if {subject} is (\w+), (?:name|what is|tell me) {subject}(?:, else|\? else what is) {subject}", text
        )
        assert found, text
        test, value, then, otherwise = found.groups()
        return f"yes, {self.value(then)}" if self.value(test) == value else f"no, {self.value(otherwise)}"


@pytest.mark.parametrize("kind", QUESTION_KINDS)
@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_joint_answers_are_right(kinds: tuple[Modality, Modality], kind: QuestionKind) -> None:
    rng = random.Random(f"{kinds}/{kind}")
    for _ in range(150):
        scenes = _scenes(kinds, rng)
        while len(set(scenes[0].facts.values()) - set(scenes[1].facts.values())) < 3:
            scenes = _scenes(kinds, rng)  # nearly the same thing twice leaves no clear match
        question = joint(scenes[0], scenes[1], rng, kind)
        assert _Reader(scenes).answer(question) == question.answer, (question, scenes)
        assert {fact.medium for fact in question.facts} == {0, 1}
        assert all(scenes[fact.medium].facts[fact.attribute] == fact.value for fact in question.facts)


@pytest.mark.parametrize("kind", ["name", "compose", "compare", "conditional"])
@pytest.mark.parametrize("medium", MODALITIES)
def test_answers_about_one_thing_are_right(medium: Modality, kind: QuestionKind) -> None:
    rng = random.Random(f"{medium}/{kind}")
    for _ in range(100):
        scenes = _scenes((medium,), rng)
        question = alone(scenes[0], rng, kind)
        assert _Reader(scenes).answer(question) == question.answer, (question, scenes)


def test_matching_words_of_one_thing_are_its_own_and_the_others_are_not() -> None:
    rng = random.Random(0)
    for _ in range(200):
        scene = rng.choice(SCENES[rng.choice(MODALITIES)])
        question = alone(scene, rng, "match")
        offered = question.text.rstrip("?").split(": ")[1].split(", ")
        fitting = {word for word in offered if word in scene.facts.values()}
        assert fitting == set(question.answer.split(" and "))
        assert len(offered) == 4


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_single_facts_of_two_things(kinds: tuple[Modality, Modality]) -> None:
    rng = random.Random(f"{kinds}")
    for _ in range(100):
        scenes = _scenes(kinds, rng)
        question = one_of(scenes, rng)
        assert _Reader(scenes).answer(question) == question.answer, (question, scenes)


@pytest.mark.parametrize("kind", MODALITIES)
def test_attribute_questions_ask_for_each_value_once(kind: Modality) -> None:
    rng = random.Random(0)
    for scene in SCENES[kind][:50]:
        asked = questions(scene, rng)
        assert sorted(question.answer for question in asked) == sorted(scene.facts.values())
        for question in asked:
            (fact,) = question.facts
            assert scene.facts[fact.attribute] == question.answer == fact.value


def test_yes_and_no_and_both_branches_are_about_as_frequent() -> None:
    rng = random.Random(0)
    scenes = [_scenes(("image", "audio"), rng) for _ in range(400)]
    yes = sum(joint(pair[0], pair[1], rng, "compare").answer == "yes" for pair in scenes)
    assert 160 <= yes <= 240
    conditions = [joint(pair[0], pair[1], rng, "conditional") for pair in scenes]
    held = sum(question.answer.startswith("yes, ") for question in conditions)
    assert 160 <= held <= 240


def test_chat_alternates_and_brings_its_medium_once() -> None:
    rng = random.Random(0)
    for _ in range(100):
        scene = rng.choice(SCENES[rng.choice(MODALITIES)])
        turns = chat(scene, rng)
        assert turns[0].media == (scene.modality,)
        assert not any(turn.media for turn in turns[1:])
        assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert all(turn.text == turn.text.strip() != "" for turn in turns)


RED_CIRCLE = Scene("image", (("shape", "circle"), ("colour", "red"), ("size", "small"), ("place", "left")))
PINNED = (
    "on the left there is a small red circle",
    "name the colour",
    "a low flute and a red circle",
    Message(role="user", text="what is the pitch?", media=("audio",)),
)
LOW_FLUTE = Scene("audio", (("timbre", "flute"), ("pitch", "low"), ("pattern", "rising")))


def test_prompts_are_pinned() -> None:
    question = Question("what is the colour and the pitch?", "red and low", "name", ())
    pieces = chat_prompt(conversation([RED_CIRCLE, LOW_FLUTE], [question, question]))
    ask = "Human: what is the colour and the pitch?###Assistant:"
    assert pieces == [
        Text("###Human: Given following image: "),
        Slot("image"),
        Text(" and audio: "),
        Slot("audio"),
        Text(f".###{ask}"),
        Text("red and low###", target=True),
        Text(ask),
        Text("red and low###", target=True),
    ]


def test_wording_of_the_seed_is_pinned() -> None:
    rng = random.Random(7)
    assert caption(RED_CIRCLE, rng) == PINNED[0]
    assert attribute_question(RED_CIRCLE, "colour", rng).text == PINNED[1]
    assert joint(RED_CIRCLE, LOW_FLUTE, rng, "compose").answer == PINNED[2]
    assert chat(LOW_FLUTE, rng)[0] == PINNED[3]
