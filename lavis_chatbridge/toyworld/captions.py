"""Sentences about one medium of the embedded world, and reading them back.

A caption names every attribute's value by its own word and no other word of that attribute's list, so `facts_in` reads
it back exactly. This module knows scenes and words only: no question, no tokenizer, no file.
"""

from __future__ import annotations

import random
import re

from lavis_chatbridge.prompting.pieces import Modality
from lavis_chatbridge.toyworld.world import ATTRIBUTES, Scene

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
"""The wordings of a caption, per kind; ``{where}`` and ``{act}`` hold the place and the motion."""

SHORT: dict[Modality, str] = {
    "image": "a {colour} {shape}",
    "video": "a {colour} {shape}",
    "audio": "a {pitch} {timbre}",
}
"""The one wording of a thing in short, so that a question for it has one right answer."""

_WHERE = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
_ACT = {"left": "move left", "right": "move right", "up": "move up", "down": "move down"}


def caption(scene: Scene, rng: random.Random) -> str:
    """A sentence that states all of a scene's facts, in one of several wordings, without an end mark."""
    return fill(rng.choice(CAPTIONS[scene.kind]), scene)


def short(scene: Scene) -> str:
    """The thing in short: ``a red circle``, ``a low flute``."""
    return fill(SHORT[scene.kind], scene)


def terse(scene: Scene, rng: random.Random) -> str:
    """The values alone, in any order, with or without the attributes' names: words at a slot's place."""
    facts = list(scene.values)
    rng.shuffle(facts)
    if rng.random() < 0.3:
        return ", ".join(f"{attribute} {value}" for attribute, value in facts)
    return rng.choice((" ", ", ")).join(value for _, value in facts)


def describe(scene: Scene, rng: random.Random) -> str:
    """Words that can stand for a medium at its slot's place: a caption, or the values alone."""
    return caption(scene, rng) if rng.random() < 0.5 else terse(scene, rng)


def fill(template: str, scene: Scene) -> str:
    """A wording with a scene's words in it, and ``an`` where ``a`` meets a vowel."""
    facts = scene.facts
    where, act = _WHERE.get(facts.get("place", ""), ""), facts.get("motion", "")
    sentence = template.format(**facts, where=where, act=_ACT.get(act, act))
    return with_articles(sentence)


def with_articles(sentence: str) -> str:
    """``a orange`` to ``an orange``."""
    return re.sub(r"\ba (?=[aeiou])", "an ", sentence)


def facts_in(text: str, kind: Modality) -> dict[str, str]:
    """The attributes of which ``text`` names exactly one value, and that value.

    An attribute is missing where the text names none of its values, or several.
    """
    words = set(re.findall(r"[a-z]+", text.lower()))
    named = {attribute: [value for value in values if value in words] for attribute, values in ATTRIBUTES[kind].items()}
    return {attribute: values[0] for attribute, values in named.items() if len(values) == 1}
