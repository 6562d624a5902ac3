"""Questions about one or two media of the embedded world, each with its one right answer and the facts it rests on.

Five kinds: *name* (values of attributes), *compose* (the things in short), *match* (which of given words fit),
*compare* (yes or no) and *conditional* (a fact decides which attribute to name; the answer says first whether it holds:
``no, circle``, since a tiny model decides aloud what it cannot decide in silence). About two media, every kind needs
facts of both.
This module knows scenes and words only: no prompt, no tokenizer, no file.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lavis_chatbridge.prompting.pieces import Modality
from lavis_chatbridge.toyworld.captions import short
from lavis_chatbridge.toyworld.world import ATTRIBUTES, Scene

QuestionKind: TypeAlias = Literal["name", "compose", "match", "compare", "conditional"]
QUESTION_KINDS: tuple[QuestionKind, ...] = ("name", "compose", "match", "compare", "conditional")

NOUNS: dict[Modality, tuple[str, ...]] = {
    "image": ("picture", "image"),
    "video": ("clip", "video"),
    "audio": ("sound", "audio"),
}
"""What questions call a medium."""

ORDINALS = ("first", "second")

_PLAIN = ("what is the {name}?", "name the {name}", "what is the {name} of {it}?", "tell me the {name} of {it}")
_OWN: dict[str, tuple[str, ...]] = {
    "shape": ("which shape is shown?", "what is shown?"),
    "colour": ("which colour does it have?", "what colour is it?"),
    "size": ("how big is it?", "what size is it?"),
    "place": ("where is it?", "where is the shape?"),
    "motion": ("how does it move?", "how does the shape move?"),
    "timbre": ("what makes the sound?", "what is heard?"),
    "pitch": ("at which pitch is it?", "which pitch does it have?"),
    "pattern": ("how does the sound go on?", "which pattern does it have?"),
}
_NAME = (
    "what is {first} and {second}?",
    "name {first} and {second}",
    "tell me {first} and {second}",
)
_COMPOSE = (
    "describe {things} in short",
    "in short, what is {things}?",
    "sum up {things}",
)
_MATCH = (
    "which of these words fit {things}: {words}?",
    "of these words, which fit {things}: {words}?",
)
_COMPARE = (
    "is {first} {one} and {second} {other}?",
    "is it true that {first} is {one} and {second} is {other}?",
    "do these hold: {first} is {one}, {second} is {other}?",
)
_CONDITIONAL = (
    "if {test} is {value}, name {then}, else {otherwise}",
    "if {test} is {value}, what is {then}? else what is {otherwise}?",
    "if {test} is {value}, tell me {then}, else {otherwise}",
)
_ONE = ("what is {first}?", "name {first}", "tell me {first}", "which {name} does {thing} have?")
_CHECK = (
    "is {first} {one}?",
    "is it true that {first} is {one}?",
    "does this hold: {first} is {one}?",
    "if {first} is {one}, say yes, else no",
)
_CHECKLIST = ("check these words: {words}", "which words are right: {words}?")
_BOTH_GO = {"up": ("up", "rising"), "down": ("down", "falling")}


@dataclass(frozen=True)
class Fact:
    """What is true of the ``medium``-th of the media asked about: its ``attribute`` has this ``value``."""

    medium: int
    attribute: str
    value: str


@dataclass(frozen=True)
class Question:
    """A question, its one right answer, its kind, and the facts that decide it."""

    text: str
    answer: str
    kind: QuestionKind
    facts: tuple[Fact, ...]


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """One question for the value of each attribute of a scene, in any order."""
    attributes = list(scene.facts)
    rng.shuffle(attributes)
    return [attribute_question(scene, attribute, rng) for attribute in attributes]


def attribute_question(scene: Scene, attribute: str, rng: random.Random) -> Question:
    """A question for the value of one attribute: ``what colour is it?``."""
    wording = rng.choice(_PLAIN + _OWN[attribute])
    text = wording.format(name=attribute, it=f"the {rng.choice(NOUNS[scene.kind])}")
    value = scene.facts[attribute]
    return Question(text, value, "name", (Fact(0, attribute, value),))


def joint(scene_a: Scene, scene_b: Scene, rng: random.Random, kind: QuestionKind, asked: int | None = None) -> Question:
    """A question that needs both of two media, given to the model in this order; it may name them in either.

    Args:
        scene_a: The first medium.
        scene_b: The second medium.
        rng: Chooses attributes, wording, and whether a yes/no question or a condition holds.
        kind: What is asked.
        asked: For a curriculum: yes/no questions and conditions ask only about the first ``asked`` values of a list.
    """
    return _Asker((scene_a, scene_b), rng, asked).ask(kind)


def alone(scene: Scene, rng: random.Random, kind: QuestionKind, asked: int | None = None) -> Question:
    """A question of one of the kinds about two or three facts of one medium; ``asked`` as in `joint`."""
    return _Asker((scene,), rng, asked).ask(kind)


def one_of(scenes: Sequence[Scene], rng: random.Random) -> Question:
    """A question for one value of one of several media: ``what is the colour of the picture?``."""
    return _Asker(scenes, rng, None).one()


def check_one(scenes: Sequence[Scene], rng: random.Random, asked: int | None = None) -> Question:
    """A yes/no question about one value of one of several media; ``asked`` as in `joint`."""
    return _Asker(scenes, rng, asked).check()


def checklist(scenes: Sequence[Scene], rng: random.Random, asked: int | None = None) -> Question:
    """Several words, each to be followed by whether it fits one of the media; ``asked`` as in `joint`."""
    return _Asker(scenes, rng, asked).checklist()


class _Asker:
    """Asks about given scenes: refers to them, chooses facts, words the question."""

    def __init__(self, scenes: Sequence[Scene], rng: random.Random, asked: int | None) -> None:
        self.scenes, self.rng, self.asked = scenes, rng, asked
        self.same_kind = len(scenes) == 2 and scenes[0].kind == scenes[1].kind
        self.nouns = [rng.choice(NOUNS[scene.kind]) for scene in scenes]
        if self.same_kind:
            self.nouns[1] = self.nouns[0]
        self.bare = rng.random() < 0.5 and not self._share_attributes()

    def ask(self, kind: QuestionKind) -> Question:
        return {
            "name": self._name,
            "compose": self._compose,
            "match": self._match,
            "compare": self._compare,
            "conditional": self._conditional,
        }[kind]()

    def one(self) -> Question:
        fact = self._fact(self.rng.randrange(len(self.scenes)))
        wording = self.rng.choice(_ONE)
        text = wording.format(first=self._attribute(fact), name=fact.attribute, thing=self._thing(fact.medium))
        return Question(text, fact.value, "name", (fact,))

    def check(self) -> Question:
        fact = self._fact(self.rng.randrange(len(self.scenes)))
        claim = self._claim(fact, self.rng.random() < 0.5)
        text = self.rng.choice(_CHECK).format(first=self._attribute(fact), one=claim)
        return Question(text, "yes" if claim == fact.value else "no", "compare", (fact,))

    def checklist(self) -> Question:
        pool = [Fact(medium, *fact) for medium, scene in enumerate(self.scenes) for fact in scene.values]
        facts = self.rng.sample(pool, min(len(pool), self.rng.randint(3, 5)))
        words = list(dict.fromkeys(self._claim(fact, self.rng.random() < 0.5) for fact in facts))
        fitting = {value for scene in self.scenes for value in scene.facts.values()}
        verdicts = [f"{word} {'yes' if word in fitting else 'no'}" for word in words]
        text = self.rng.choice(_CHECKLIST).format(words=", ".join(words))
        return Question(text, ", ".join(verdicts), "compare", tuple(facts))

    def _name(self) -> Question:
        first, second = self._pair()
        wording = self.rng.choice(_NAME)
        text = wording.format(first=self._attribute(first), second=self._attribute(second))
        return Question(text, f"{first.value} and {second.value}", "name", (first, second))

    def _compose(self) -> Question:
        order = self._order()
        text = self.rng.choice(_COMPOSE).format(things=self._things(order))
        facts = [
            Fact(medium, attribute, self.scenes[medium].facts[attribute])
            for medium in order
            for attribute in ("pitch", "timbre", "colour", "shape")
            if attribute in self.scenes[medium].facts
        ]
        return Question(text, " and ".join(short(self.scenes[medium]) for medium in order), "compose", tuple(facts))

    def _match(self) -> Question:
        for _ in range(50):  # media that are alike in almost everything may leave no clear choice
            first, second = self._pair()
            words = [first.value, second.value, self._another(first), self._another(second)]
            if self._clear(words, (first, second)):
                break
        self.rng.shuffle(words)
        order = [first.medium, second.medium] if len(self.scenes) == 2 else [0]
        text = self.rng.choice(_MATCH).format(things=self._things(order), words=", ".join(words))
        return Question(text, f"{first.value} and {second.value}", "match", (first, second))

    def _clear(self, words: Sequence[str], facts: Sequence[Fact]) -> bool:
        """Whether each medium is fitted by no offered word but its own."""
        own = [{fact.value for fact in facts if fact.medium == medium} for medium in range(len(self.scenes))]
        fitted = [set(words) & set(scene.facts.values()) for scene in self.scenes]
        return len(set(words)) == 4 and fitted == own

    def _compare(self) -> Question:
        if len(self.scenes) == 2 and self.asked is None and (both := self._both_go()):
            return both
        first, second = self._pair()
        wrong = () if self.rng.random() < 0.5 else self.rng.choice(((0,), (1,), (0, 1)))
        one, other = (self._claim(fact, position not in wrong) for position, fact in enumerate((first, second)))
        holds = (one, other) == (first.value, second.value)
        text = self.rng.choice(_COMPARE).format(
            first=self._attribute(first), second=self._attribute(second), one=one, other=other
        )
        return Question(text, "yes" if holds else "no", "compare", (first, second))

    def _both_go(self) -> Question | None:
        """``do the clip and the sound both go up?``, now and then, where one of them at least does."""
        facts = {
            name: Fact(medium, name, scene.facts[name])
            for medium, scene in enumerate(self.scenes)
            for name in ("motion", "pattern")
            if name in scene.facts
        }
        goes = [(word, pair) for word, pair in _BOTH_GO.items() if any(fact.value in pair for fact in facts.values())]
        if len(facts) < 2 or not goes or self.rng.random() < 0.7:
            return None
        word, pair = self.rng.choice(goes)
        used = (facts["motion"], facts["pattern"])
        answer = "yes" if tuple(fact.value for fact in used) == pair else "no"
        return Question(f"do {self._things(self._order())} both go {word}?", answer, "compare", used)

    def _conditional(self) -> Question:
        tested = self.rng.randrange(len(self.scenes))
        named = len(self.scenes) - 1 - tested
        test = self._fact(tested)
        names = [name for name in self.scenes[named].facts if (named, name) != (tested, test.attribute)]
        then, otherwise = (Fact(named, name, self.scenes[named].facts[name]) for name in self.rng.sample(names, 2))
        value = self._claim(test, self.rng.random() < 0.5)
        text = self.rng.choice(_CONDITIONAL).format(
            test=self._attribute(test),
            value=value,
            then=self._attribute(then),
            otherwise=self._attribute(otherwise),
        )
        verdict, chosen = ("yes", then) if value == test.value else ("no", otherwise)
        return Question(text, f"{verdict}, {chosen.value}", "conditional", (test, chosen))

    def _order(self) -> list[int]:
        order = list(range(len(self.scenes)))
        self.rng.shuffle(order)
        return order

    def _pair(self) -> tuple[Fact, Fact]:
        """Two facts: of both media, or two of the one."""
        if len(self.scenes) == 2:
            first, second = self._order()
            return self._fact(first), self._fact(second)
        one, other = self.rng.sample(list(self.scenes[0].facts.items()), 2)
        return Fact(0, *one), Fact(0, *other)

    def _fact(self, medium: int) -> Fact:
        return Fact(medium, *self.rng.choice(self.scenes[medium].values))

    def _values(self, fact: Fact) -> tuple[str, ...]:
        return ATTRIBUTES[self.scenes[fact.medium].kind][fact.attribute]

    def _claim(self, fact: Fact, true: bool) -> str:
        """A value to ask about: the true one, or another; in a curriculum one of the first values where possible."""
        values = self._values(fact)[: self.asked]
        others = [value for value in values if value != fact.value]
        if (true and fact.value in values) or not others:
            return fact.value
        return self.rng.choice(others)

    def _another(self, fact: Fact) -> str:
        return self.rng.choice([value for value in self._values(fact) if value != fact.value])

    def _share_attributes(self) -> bool:
        return len(self.scenes) == 2 and bool(set(self.scenes[0].facts) & set(self.scenes[1].facts))

    def _thing(self, medium: int) -> str:
        return f"the {ORDINALS[medium]} {self.nouns[medium]}" if self.same_kind else f"the {self.nouns[medium]}"

    def _things(self, order: Sequence[int]) -> str:
        return " and ".join(self._thing(medium) for medium in order)

    def _attribute(self, fact: Fact) -> str:
        return f"the {fact.attribute}" if self.bare else f"the {fact.attribute} of {self._thing(fact.medium)}"
