"""What the tiny language model reads: captions and conversations about described things, as `prompting` pieces.

A *passage* has the very form of a stage-1 or stage-2 prompt, with words at the slots' places. No medium is involved,
and no tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lavis_chatbridge.prompting import Message, Piece, Slot, alignment_prompt, chat_prompt
from lavis_chatbridge.prompting.pieces import MODALITIES, Modality
from lavis_chatbridge.toyworld.language import (
    QUESTION_KINDS,
    Question,
    QuestionKind,
    alone,
    caption,
    check_one,
    checklist,
    conversation,
    describe_turns,
    in_words,
    joint,
    one_of,
    questions,
)
from lavis_chatbridge.toyworld.world import ATTRIBUTES, Scene

_PAIRS: tuple[tuple[Modality, Modality], ...] = (("image", "audio"), ("video", "audio"))
"""The pairs that the joint test asks about; other pairs are read less often."""

_NAMING = (1, 1, 1, 1, 0, 0, 0, 0)
_JUDGING = (0.5, 0.7, 0.5, 0.7, 2, 2.5, 2, 0.7)


@dataclass(frozen=True)
class Level:
    """A step of the curriculum.

    Args:
        values: Things have only the first so many values of each attribute, and yes/no questions and conditions ask
            about these; None for all. One value asked about means that things have two.
        weights: How often a question is: for one value, of each of `QUESTION_KINDS`, a check of one value, a list of
            checks.
    """

    values: int | None
    weights: tuple[float, ...] = _JUDGING


LEVELS = (Level(1), Level(2), Level(3), Level(5), Level(None))
"""The curriculum: to judge is learnt on few values first, and hardly without."""

NAMING = Level(None, _NAMING)
"""All values, and nothing to judge: read beside the first levels."""


def draw_scene(kind: Modality, rng: random.Random, values: int | None = None) -> Scene:
    """A thing with random values, each among the first ``values`` (at least two) of its attribute's list."""
    count = None if values is None else max(values, 2)
    return Scene(kind, tuple((name, rng.choice(words[:count])) for name, words in ATTRIBUTES[kind].items()))


def passage(rng: random.Random, level: Level) -> list[Piece]:
    """A caption after a description, or a conversation about one or two described things."""
    draw = rng.random()
    if draw < 0.2:
        return captioned(rng)
    return talk(rng, level, things=1 if draw < 0.4 else 2)


def captioned(rng: random.Random) -> list[Piece]:
    """A stage-1 prompt in words; now and then a caption of nothing, so that the model knows what captions are like."""
    scene = draw_scene(rng.choice(MODALITIES), rng)
    if rng.random() < 0.1:
        return alignment_prompt((), caption(scene, rng))
    prompt = alignment_prompt((scene.kind,), caption(scene, rng))
    return in_words(prompt, {Slot(scene.kind): scene}, rng)


def talk(rng: random.Random, level: Level, things: int) -> list[Piece]:
    """A conversation about described things, with as many short answers as give dense supervision."""
    scenes = [draw_scene(kind, rng, level.values) for kind in _kinds(rng, things)]
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
    """The slots that a prompt numbers for these media, in order."""
    counts: dict[Modality, int] = {}
    slots = {}
    for scene in scenes:
        slots[Slot(scene.kind, counts.get(scene.kind, 0))] = scene
        counts[scene.kind] = counts.get(scene.kind, 0) + 1
    return slots


def _kinds(rng: random.Random, things: int) -> list[Modality]:
    if things == 1:
        return [rng.choice(MODALITIES)]
    if rng.random() < 0.6:
        kinds = list(rng.choice(_PAIRS))
        rng.shuffle(kinds)
        return kinds
    return [rng.choice(MODALITIES), rng.choice(MODALITIES)]


def _question(scenes: Sequence[Scene], rng: random.Random, level: Level) -> Question:
    asks: tuple[Callable[[], Question], ...] = (
        lambda: rng.choice(questions(scenes[0], rng)) if len(scenes) == 1 else one_of(scenes, rng),
        *(partial(_about, kind, scenes, rng, level) for kind in QUESTION_KINDS),
        lambda: check_one(scenes, rng, level.values),
        lambda: checklist(scenes, rng, level.values),
    )
    return rng.choices(asks, level.weights)[0]()


def _about(kind: QuestionKind, scenes: Sequence[Scene], rng: random.Random, level: Level) -> Question:
    if len(scenes) == 1:
        return alone(scenes[0], rng, kind, level.values)
    return joint(scenes[0], scenes[1], rng, kind, level.values)


def _roughened(asked: Sequence[Question], rng: random.Random) -> list[Question]:
    """The questions as people type them: now and then a capital, or no question mark."""
    return [Question(_typed(question.text, rng), question.answer, question.kind, question.facts) for question in asked]


def _typed(text: str, rng: random.Random) -> str:
    if rng.random() < 0.1:
        text = text.rstrip("?")
    return text[0].upper() + text[1:] if rng.random() < 0.1 else text


def exam(kind: QuestionKind, scenes: Sequence[Scene], rng: random.Random) -> list[Piece]:
    """One joint question about two described things as a prompt with its answer: what the gate asks."""
    question = joint(scenes[0], scenes[1], rng, kind)
    return in_words(chat_prompt(conversation(scenes, [question])), slots_for(scenes), rng)
