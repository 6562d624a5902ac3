"""The language of the embedded world: captions, questions with answers, conversations, and words in place of media.

Everything is words and `prompting` pieces, drawn from the `random.Random` that is given: the same generator state gives
the same text. It knows no tokenizer, no model, and no file.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from lavis_chatbridge.prompting import Message, Piece, Slot, Text
from lavis_chatbridge.toyworld.captions import caption, describe, facts_in, short, terse
from lavis_chatbridge.toyworld.questions import (
    NOUNS,
    QUESTION_KINDS,
    Fact,
    Question,
    QuestionKind,
    alone,
    attribute_question,
    check_one,
    checklist,
    joint,
    one_of,
    questions,
)
from lavis_chatbridge.toyworld.world import Scene

__all__ = [
    "NOUNS",
    "QUESTION_KINDS",
    "Fact",
    "Question",
    "QuestionKind",
    "alone",
    "attribute_question",
    "caption",
    "chat",
    "check_one",
    "checklist",
    "conversation",
    "describe",
    "describe_turns",
    "facts_in",
    "in_words",
    "joint",
    "one_of",
    "questions",
    "short",
    "terse",
]

_DESCRIBE = ("describe {it}", "what does {it} hold?", "tell me about {it}", "describe {it} in a sentence")


def describe_turns(scene: Scene, rng: random.Random) -> list[Message]:
    """A request for a description of a medium, which the request brings, and a caption as the reply."""
    request = rng.choice(_DESCRIBE).format(it=f"the {rng.choice(NOUNS[scene.kind])}")
    return [Message("user", request, (scene.kind,)), Message("assistant", caption(scene, rng))]


def conversation(scenes: Sequence[Scene], asked: Sequence[Question]) -> list[Message]:
    """Questions about media, which the first turn brings in the order of ``scenes``, with their answers."""
    turns = []
    for position, question in enumerate(asked):
        media = () if position else tuple(scene.kind for scene in scenes)
        turns += [Message("user", question.text, media), Message("assistant", question.answer)]
    return turns


def chat(scene: Scene, rng: random.Random) -> list[Message]:
    """A conversation about one medium: often a description first, then one to three questions."""
    turns = describe_turns(scene, rng) if rng.random() < 0.5 else []
    some = questions(scene, rng)[: rng.randint(1, 3)]
    if rng.random() < 0.3:
        some.append(alone(scene, rng, "compose"))
    return turns + conversation(() if turns else (scene,), some)


def in_words(pieces: Sequence[Piece], scenes: Mapping[Slot, Scene], rng: random.Random) -> list[Piece]:
    """A prompt with words in place of some of its media: each slot in ``scenes`` becomes a description.

    What is learnt about described things carries over to seen and heard ones, since both stand at the same place.
    """
    return [
        Text(describe(scenes[piece], rng)) if isinstance(piece, Slot) and piece in scenes else piece for piece in pieces
    ]
