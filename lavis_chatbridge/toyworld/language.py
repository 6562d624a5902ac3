"""The language of the embedded world: captions, questions with their answers, and conversations.

Each value has its own word in captions. There are five kinds of questions: *name* (values of attributes), *compose*
(short descriptions), *match* (which of the given words fit), *compare* (yes or no) and *conditional* (a condition
selects the attribute to name; the answer begins with its truth: ``no, circle``). A question about two media always
needs facts of both. All random choices use the caller's `random.Random`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from lavis_chatbridge.prompting.conversation import Message, Modality
from lavis_chatbridge.toyworld.world import ATTRIBUTES, Scene

QuestionKind: TypeAlias = Literal["name", "compose", "match", "compare", "conditional"]
QUESTION_KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)

CAPTIONS: dict[Modality, tuple[str, ...]] = {
    "image": (
        "a {size} {colour} {shape} {where}",
        "a {colour} {shape} of {size} size {where}",
        "{where} there is a {size} {colour} {shape}",
        "the picture shows a {size} {colour} {shape} {where}",
        "a {shape} {where}, {colour} and {size}",
        "a {size} {shape} in {colour}, placed {where}",
    ),
    "video": (
        "watch a {colour} {shape} {act}",
        "a {colour} {shape} starts to {act}",
        "the clip shows a {colour} {shape} {act}",
        "a {shape} in {colour} is seen to {act}",
        "you can see a {colour} {shape} {act}",
        "a {shape}, which is {colour}, begins to {act}",
    ),
    "audio": (
        "a {pitch} {pattern} {timbre}",
        "a {pattern} {timbre} with a {pitch} pitch",
        "the sound of a {pitch} {timbre}, {pattern}",
        "you can hear a {pattern} {timbre} at a {pitch} pitch",
        "a {timbre} that is {pitch} and {pattern}",
        "a {pattern} sound of a {timbre}, {pitch} in pitch",
    ),
}
"""Templates of captions; ``{where}`` is the position and ``{act}`` the motion."""

SHORT: dict[Modality, str] = {
    "image": "a {colour} {shape}",
    "video": "a {colour} {shape}",
    "audio": "a {pitch} {timbre}",
}
"""The only form of a short description, so that *compose* questions have one right answer."""

NOUNS: dict[Modality, tuple[str, ...]] = {
    "image": ("picture", "image"),
    "video": ("clip", "video"),
    "audio": ("sound", "audio"),
}
"""Modality -> nouns for the medium in questions."""

_WHERE = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
_DIRECTIONS = ("left", "right", "up", "down")
_ORDINALS = ("first", "second")
_DESCRIBE = ("describe {it}", "what does {it} hold?", "tell me about {it}", "describe {it} in a sentence")
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
_NAME = ("what is {first} and {second}?", "name {first} and {second}", "tell me {first} and {second}")
_COMPOSE = ("describe {things} in short", "in short, what is {things}?", "sum up {things}")
_MATCH = ("which of these words fit {things}: {words}?", "of these words, which fit {things}: {words}?")
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
_BOTH_GO = {"up": ("up", "rising"), "down": ("down", "falling")}


# --- Captions ---


def caption(scene: Scene, rng: random.Random) -> str:
    """A sentence with all facts of a scene, without a full stop."""
    return fill(rng.choice(CAPTIONS[scene.modality]), scene)


def terse(scene: Scene, rng: random.Random) -> str:
    """The values in random order, with or without the attributes' names."""
    facts = list(scene.values)
    rng.shuffle(facts)
    if rng.random() < 0.3:
        return ", ".join(f"{attribute} {value}" for attribute, value in facts)
    return rng.choice((" ", ", ")).join(value for _, value in facts)


def describe(scene: Scene, rng: random.Random) -> str:
    """A description that replaces a medium in a prompt: a caption, or only the values."""
    return caption(scene, rng) if rng.random() < 0.5 else terse(scene, rng)


def fill(template: str, scene: Scene) -> str:
    """Fill a template with the scene's words, and use ``an`` before a vowel."""
    facts = scene.facts
    where, act = _WHERE.get(facts.get("place", ""), ""), facts.get("motion", "")
    sentence = template.format(**facts, where=where, act=f"move {act}" if act in _DIRECTIONS else act)
    return re.sub(r"\ba (?=[aeiou])", "an ", sentence)


# --- Questions ---


@dataclass(frozen=True)
class Fact:
    """An attribute of the ``medium``-th medium of a question, and its value."""

    medium: int
    attribute: str
    value: str


@dataclass(frozen=True)
class Question:
    """A question, its only right answer, its kind, and the facts that determine the answer."""

    text: str
    answer: str
    kind: QuestionKind
    facts: tuple[Fact, ...]


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """One question for each attribute of a scene, in random order: ``what colour is it?``."""
    facts = list(scene.values)
    rng.shuffle(facts)
    found = []
    for attribute, value in facts:
        wording = rng.choice(_PLAIN + _OWN[attribute])
        text = wording.format(name=attribute, it=f"the {rng.choice(NOUNS[scene.modality])}")
        found.append(Question(text, value, "name", (Fact(0, attribute, value),)))
    return found


class Asker:
    """Asks questions about one scene, or questions that need both of two, which are in this order in the prompt."""

    def __init__(self, scenes: Sequence[Scene], rng: random.Random) -> None:
        self.scenes, self.rng = scenes, rng
        self.same_modality = len(scenes) == 2 and scenes[0].modality == scenes[1].modality
        self.nouns = [rng.choice(NOUNS[scene.modality]) for scene in scenes]
        if self.same_modality:
            self.nouns[1] = self.nouns[0]
        shared = len(scenes) == 2 and bool(set(scenes[0].facts) & set(scenes[1].facts))
        self.bare = rng.random() < 0.5 and not shared  # "the colour", without "of the picture"

    def ask(self, kind: QuestionKind) -> Question:
        """A question of the given kind."""
        return getattr(self, f"_{kind}")()

    def fact(self, medium: int) -> Fact:
        """A random fact of a scene."""
        return Fact(medium, *self.rng.choice(self.scenes[medium].values))

    def values(self, fact: Fact) -> tuple[str, ...]:
        """The possible values of a fact's attribute in a claim."""
        return self._all(fact)

    def claim(self, fact: Fact, true: bool) -> str:
        """A value for a yes/no question: the true one, or another one if ``true`` is False."""
        values = self.values(fact)
        others = [value for value in values if value != fact.value]
        if (true and fact.value in values) or not others:
            return fact.value
        return self.rng.choice(others)

    def attribute(self, fact: Fact) -> str:
        """The words for a fact in a question: ``the colour``, ``the colour of the picture``."""
        return f"the {fact.attribute}" if self.bare else f"the {fact.attribute} of {self._thing(fact.medium)}"

    def _name(self) -> Question:
        first, second = self._pair()
        wording = self.rng.choice(_NAME)
        text = wording.format(first=self.attribute(first), second=self.attribute(second))
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
        described = [self.scenes[medium] for medium in order]
        answer = " and ".join(fill(SHORT[scene.modality], scene) for scene in described)
        return Question(text, answer, "compose", tuple(facts))

    def _match(self) -> Question:
        for _ in range(50):  # very similar media may have no unambiguous choice
            first, second = self._pair()
            another = [self.rng.choice([v for v in self._all(f) if v != f.value]) for f in (first, second)]
            words = [first.value, second.value, *another]
            if self._clear(words, (first, second)):
                break
        self.rng.shuffle(words)
        order = [first.medium, second.medium] if len(self.scenes) == 2 else [0]
        text = self.rng.choice(_MATCH).format(things=self._things(order), words=", ".join(words))
        return Question(text, f"{first.value} and {second.value}", "match", (first, second))

    def _clear(self, words: Sequence[str], facts: Sequence[Fact]) -> bool:
        """Whether each offered word fits only its own medium."""
        own = [{fact.value for fact in facts if fact.medium == medium} for medium in range(len(self.scenes))]
        fitted = [set(words) & set(scene.facts.values()) for scene in self.scenes]
        return len(set(words)) == 4 and fitted == own

    def _compare(self) -> Question:
        if len(self.scenes) == 2 and (both := self._both_go()):
            return both
        first, second = self._pair()
        wrong = () if self.rng.random() < 0.5 else self.rng.choice(((0,), (1,), (0, 1)))
        one, other = (self.claim(fact, position not in wrong) for position, fact in enumerate((first, second)))
        holds = (one, other) == (first.value, second.value)
        names = {"first": self.attribute(first), "second": self.attribute(second)}
        text = self.rng.choice(_COMPARE).format(**names, one=one, other=other)
        return Question(text, "yes" if holds else "no", "compare", (first, second))

    def _both_go(self) -> Question | None:
        """``do the clip and the sound both go up?``; None at random, and if neither does."""
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
        test = self.fact(tested)
        others = [fact for fact in self.scenes[named].values if (named, fact[0]) != (tested, test.attribute)]
        then, otherwise = (Fact(named, *fact) for fact in self.rng.sample(others, 2))
        value = self.claim(test, self.rng.random() < 0.5)
        wording = self.rng.choice(_CONDITIONAL)
        names = {"test": self.attribute(test), "then": self.attribute(then), "otherwise": self.attribute(otherwise)}
        text = wording.format(value=value, **names)
        verdict, chosen = ("yes", then) if value == test.value else ("no", otherwise)
        return Question(text, f"{verdict}, {chosen.value}", "conditional", (test, chosen))

    def _all(self, fact: Fact) -> tuple[str, ...]:
        return ATTRIBUTES[self.scenes[fact.medium].modality][fact.attribute]

    def _order(self) -> list[int]:
        order = list(range(len(self.scenes)))
        self.rng.shuffle(order)
        return order

    def _pair(self) -> tuple[Fact, Fact]:
        """One fact of each of two media, or two facts of one."""
        if len(self.scenes) == 2:
            first, second = self._order()
            return self.fact(first), self.fact(second)
        one, other = self.rng.sample(self.scenes[0].values, 2)
        return Fact(0, *one), Fact(0, *other)

    def _thing(self, medium: int) -> str:
        return f"the {_ORDINALS[medium]} {self.nouns[medium]}" if self.same_modality else f"the {self.nouns[medium]}"

    def _things(self, order: Sequence[int]) -> str:
        return " and ".join(self._thing(medium) for medium in order)


# --- Conversations ---


def describe_turns(scene: Scene, rng: random.Random) -> list[Message]:
    """A request for a description, with the medium, and a caption as the reply."""
    request = rng.choice(_DESCRIBE).format(it=f"the {rng.choice(NOUNS[scene.modality])}")
    return [Message("user", request, (scene.modality,)), Message("assistant", caption(scene, rng))]


def conversation(scenes: Sequence[Scene], asked: Sequence[Question]) -> list[Message]:
    """Questions and answers as turns; the first turn has the media in the order of ``scenes``."""
    turns = []
    for position, question in enumerate(asked):
        media = () if position else tuple(scene.modality for scene in scenes)
        turns += [Message("user", question.text, media), Message("assistant", question.answer)]
    return turns


def chat(scene: Scene, rng: random.Random) -> list[Message]:
    """A conversation about one medium: often a description first, then one to three questions."""
    turns = describe_turns(scene, rng) if rng.random() < 0.5 else []
    some = questions(scene, rng)[: rng.randint(1, 3)]
    if rng.random() < 0.3:
        some.append(Asker((scene,), rng).ask("compose"))
    return turns + conversation(() if turns else (scene,), some)
