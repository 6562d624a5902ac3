"""The world's language: captions read back to their facts, and the wording of a seed stays the same."""

from __future__ import annotations

import random
import re

import pytest

from lavis_chatbridge.prompting.conversation import MODALITIES, Message, Modality, Slot, Text, chat_prompt
from lavis_chatbridge.toyworld.language import (
    CAPTIONS,
    Question,
    attribute_question,
    caption,
    chat,
    conversation,
    fill,
    joint,
    terse,
)
from lavis_chatbridge.toyworld.world import ATTRIBUTES, Scene, all_scenes


def facts_in(text: str, modality: Modality) -> dict[str, str]:
    """Attribute -> value, for attributes with exactly one value in ``text``."""
    words = set(re.findall("[a-z]+", text))
    named = {name: [value for value in values if value in words] for name, values in ATTRIBUTES[modality].items()}
    return {name: values[0] for name, values in named.items() if len(values) == 1}


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_caption_of_every_scene_reads_back(modality: Modality) -> None:
    rng = random.Random(0)
    for scene in all_scenes(modality):
        texts = [fill(template, scene) for template in CAPTIONS[modality]]
        for text in [*texts, terse(scene, rng), caption(scene, rng)]:
            assert facts_in(text, modality) == scene.facts
            assert "{" not in text
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)


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
