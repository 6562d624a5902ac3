"""The training texts of the tiny language model: captions and conversations about described objects and sounds.

A *passage* is a stage-1 or stage-2 prompt with text descriptions instead of media.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from lavis_chatbridge.prompting.conversation import (
    MODALITIES,
    Message,
    Modality,
    Piece,
    Slot,
    Text,
    alignment_prompt,
    chat_prompt,
)
from lavis_chatbridge.toyworld.language import (
    QUESTION_KINDS,
    Asker,
    Fact,
    Question,
    QuestionKind,
    caption,
    conversation,
    describe,
    describe_turns,
    questions,
)
from lavis_chatbridge.toyworld.world import ATTRIBUTES, Scene

_PAIRS: tuple[tuple[Modality, Modality], ...] = (("image", "audio"), ("video", "audio"))
"""The pairs that the joint test asks about; other pairs are less frequent."""

_NAMING = (1, 1, 1, 1, 0, 0, 0, 0)
_JUDGING = (0.5, 0.7, 0.5, 0.7, 2, 2.5, 2, 0.7)
_ONE = ("what is {first}?", "name {first}", "tell me {first}", "which {name} does {thing} have?")
_CHECK = (
    "is {first} {one}?",
    "is it true that {first} is {one}?",
    "does this hold: {first} is {one}?",
    "if {first} is {one}, say yes, else no",
)
_CHECKLIST = ("check these words: {words}", "which words are right: {words}?")


@dataclass(frozen=True)
class Level:
    """A step of the curriculum.

    Args:
        values: Use only the first ``values`` (at least two) values of each attribute, in scenes, yes/no questions and
            conditions. None uses all.
        weights: Relative frequencies: a question for one value, each of `QUESTION_KINDS`, a check of one value, a list
            of checks.
    """

    values: int | None
    weights: tuple[float, ...] = _JUDGING


LEVELS = (Level(1), Level(2), Level(3), Level(5), Level(None))
"""The curriculum: a tiny model hardly learns yes/no questions unless it starts with few values."""

NAMING = Level(None, _NAMING)
"""All values and no yes/no questions; mixed into the first levels."""


class Teacher(Asker):
    """Asks the package's questions, and checks of values; with ``asked``, only about the first values."""

    def __init__(self, scenes: Sequence[Scene], rng: random.Random, asked: int | None) -> None:
        super().__init__(scenes, rng)
        self.asked = asked

    def values(self, fact: Fact) -> tuple[str, ...]:
        """The first ``asked`` values of a fact's attribute."""
        return super().values(fact)[: self.asked]

    def _both_go(self) -> Question | None:
        return super()._both_go() if self.asked is None else None

    def one(self) -> Question:
        """A question for one value of one of the scenes."""
        fact = self.fact(self.rng.randrange(len(self.scenes)))
        thing = self._things([fact.medium])
        text = self.rng.choice(_ONE).format(first=self.attribute(fact), name=fact.attribute, thing=thing)
        return Question(text, fact.value, "name", (fact,))

    def check(self) -> Question:
        """A yes/no question about one value of one of the scenes."""
        fact = self.fact(self.rng.randrange(len(self.scenes)))
        claim = self.claim(fact, self.rng.random() < 0.5)
        text = self.rng.choice(_CHECK).format(first=self.attribute(fact), one=claim)
        return Question(text, "yes" if claim == fact.value else "no", "compare", (fact,))

    def checklist(self) -> Question:
        """A question about several words; the answer repeats each word with yes or no (whether it fits a scene)."""
        pool = [Fact(medium, *fact) for medium, scene in enumerate(self.scenes) for fact in scene.values]
        facts = self.rng.sample(pool, min(len(pool), self.rng.randint(3, 5)))
        words = list(dict.fromkeys(self.claim(fact, self.rng.random() < 0.5) for fact in facts))
        fitting = {value for scene in self.scenes for value in scene.facts.values()}
        verdicts = [f"{word} {'yes' if word in fitting else 'no'}" for word in words]
        text = self.rng.choice(_CHECKLIST).format(words=", ".join(words))
        return Question(text, ", ".join(verdicts), "compare", tuple(facts))


def in_words(pieces: Sequence[Piece], scenes: Mapping[Slot, Scene], rng: random.Random) -> list[Piece]:
    """A prompt with descriptions instead of the slots of ``scenes``."""
    return [
        Text(describe(scenes[piece], rng)) if isinstance(piece, Slot) and piece in scenes else piece for piece in pieces
    ]


def random_scene(modality: Modality, rng: random.Random, values: int | None = None) -> Scene:
    """A scene with random values, each among the first ``values`` (at least two) of its attribute."""
    count = None if values is None else max(values, 2)
    return Scene(modality, tuple((name, rng.choice(words[:count])) for name, words in ATTRIBUTES[modality].items()))


def passage(rng: random.Random, level: Level) -> list[Piece]:
    """A caption after a description, or a conversation about one or two descriptions."""
    part = rng.random()
    if part < 0.2:
        return captioned(rng)
    return talk(rng, level, things=1 if part < 0.4 else 2)


def captioned(rng: random.Random) -> list[Piece]:
    """A stage-1 prompt in text; one in ten has no description, so that the model learns the format of captions."""
    scene = random_scene(rng.choice(MODALITIES), rng)
    if rng.random() < 0.1:
        return alignment_prompt((), caption(scene, rng))
    prompt = alignment_prompt((scene.modality,), caption(scene, rng))
    return in_words(prompt, {Slot(scene.modality): scene}, rng)


def talk(rng: random.Random, level: Level, things: int) -> list[Piece]:
    """A conversation about ``things`` descriptions."""
    scenes = [random_scene(modality, rng, level.values) for modality in _modalities(rng, things)]
    asked = [_question(scenes, rng, level) for _ in range(rng.choice((1, 1, 1, 2, 3, 5)))]
    turns: list[Message]
    if things == 1 and rng.random() < 0.4:
        turns = describe_turns(scenes[0], rng) + conversation((), _roughened(asked, rng))
    elif things == 2 and rng.random() < 0.15:
        first = _roughened(questions(scenes[0], rng)[:2], rng)
        turns = conversation(scenes[:1], first) + conversation(scenes[1:], _roughened(asked, rng))
    else:
        turns = conversation(scenes, _roughened(asked, rng))
    return in_words(chat_prompt(turns), slots_for(scenes), rng)


def slots_for(scenes: Sequence[Scene]) -> dict[Slot, Scene]:
    """The slots of these media in a prompt, in order."""
    counts: dict[Modality, int] = {}
    slots = {}
    for scene in scenes:
        slots[Slot(scene.modality, counts.get(scene.modality, 0))] = scene
        counts[scene.modality] = counts.get(scene.modality, 0) + 1
    return slots


def _modalities(rng: random.Random, things: int) -> list[Modality]:
    if things == 1:
        return [rng.choice(MODALITIES)]
    if rng.random() < 0.6:
        pair = list(rng.choice(_PAIRS))
        rng.shuffle(pair)
        return pair
    return [rng.choice(MODALITIES), rng.choice(MODALITIES)]


def _question(scenes: Sequence[Scene], rng: random.Random, level: Level) -> Question:
    teacher = partial(Teacher, scenes, rng)
    asks: tuple[Callable[[], Question], ...] = (
        lambda: rng.choice(questions(scenes[0], rng)) if len(scenes) == 1 else teacher(None).one(),
        *(partial(lambda kind: teacher(level.values).ask(kind), kind) for kind in QUESTION_KINDS),
        lambda: teacher(level.values).check(),
        lambda: teacher(level.values).checklist(),
    )
    return rng.choices(asks, level.weights)[0]()


def _roughened(asked: Sequence[Question], rng: random.Random) -> list[Question]:
    """The questions with variations of typing: capital letters, or no question mark."""
    return [Question(_typed(question.text, rng), question.answer, question.kind, question.facts) for question in asked]


def _typed(text: str, rng: random.Random) -> str:
    if rng.random() < 0.1:
        text = text.rstrip("?")
    return text[0].upper() + text[1:] if rng.random() < 0.1 else text


def exam(kind: QuestionKind, scenes: Sequence[Scene], rng: random.Random) -> list[Piece]:
    """A prompt with one joint question about two descriptions, and its answer; used by the gate."""
    question = Asker(scenes, rng).ask(kind)
    return in_words(chat_prompt(conversation(scenes, [question])), slots_for(scenes), rng)
