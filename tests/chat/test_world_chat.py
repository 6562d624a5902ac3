"""The five media of chats with the shipped tiny model give the right answers of the embedded world.

Needs the shipped checkpoint ``assets/tiny/chatbridge.safetensors``; where it is missing the tests fail and say so.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from lavis_chatbridge.chat import Sampling, Session
from lavis_chatbridge.prompting.conversation import Modality
from lavis_chatbridge.toyworld import clips, language, pictures, sounds
from lavis_chatbridge.toyworld.world import Scene, scenes

TALKS = 8
FIVE: dict[str, tuple[Modality, ...]] = {
    "audio+video": ("video", "audio"),
    "audio+image": ("image", "audio"),
    "image": ("image",),
    "audio": ("audio",),
    "video": ("video",),
}
LEAST = {1: 0.95, 2: 0.85}
"""The share of right answers for one medium, and for two at once; guessing gets about a fifth, and less."""


@pytest.fixture(scope="module")
def model() -> Any:
    return Session.open("tiny", device="cpu")


def about_one(scene: tuple[Scene, ...], words: random.Random) -> language.Question:
    """A question for one value of one of the scenes."""
    asker = language.Asker(scene, words)
    fact = asker.fact(words.randrange(len(scene)))
    return language.Question(f"what is {asker.attribute(fact)}?", fact.value, "name", (fact,))


def talk_about(session: Session, scene: tuple[Scene, ...], number: int) -> list[tuple[str, str, str]]:
    """A conversation of three questions about new renderings: question, right answer, the model's answer."""
    rng, words = np.random.default_rng([7, number]), random.Random(f"chat {number}")
    files = files_of(scene, rng)
    if len(scene) == 1:
        asked = language.questions(scene[0], words)[:3]
    else:
        asked = [
            about_one(scene, words),
            language.Asker(scene, words).ask("name"),
            about_one(scene, words),
        ]
    found = []
    for i, question in enumerate(asked):
        answer = session.ask(question.text, media=[] if i else files)
        assert answer.finish == "stop"
        assert sum(note.reached for note in answer.media) == len(scene)
        found.append((question.text, question.answer, answer.text))
    assert session.messages[-1].text == found[-1][2]
    return found


def files_of(scene: tuple[Scene, ...], rng: np.random.Generator) -> list[tuple[Modality, bytes]]:
    """The media as files; a sound beside a video is the video's own track."""
    modalities = tuple(one.modality for one in scene)
    if modalities == ("video", "audio"):
        clip = clips.render(scene[0], rng)
        seconds = max(sounds.SECONDS[0], len(clip.frames) / clip.rate)
        return [("video", clips.encode(clip, rng, sounds.render(scene[1], rng, seconds, rate=16_000)))]
    files: list[tuple[Modality, bytes]] = []
    for one in scene:
        if one.modality == "image":
            files.append(("image", pictures.encode(pictures.render(one, rng), "png", rng)))
        elif one.modality == "audio":
            files.append(("audio", sounds.encode(sounds.render(one, rng), "wav")))
        else:
            files.append(("video", clips.encode(clips.render(one, rng), rng)))
    return files


@pytest.mark.parametrize("modalities", FIVE.values(), ids=FIVE)
def test_the_answers_are_right(model: Session, modalities: tuple[Modality, ...]):
    sampled = [scenes(modality, False, 4211) for modality in modalities]
    found = []
    for number in range(TALKS):
        session = Session(model.model, engine=model.engine, sampling=Sampling(max_new_tokens=24))
        found += talk_about(session, tuple(next(one) for one in sampled), number)
    wrong = [entry for entry in found if entry[1] != entry[2]]
    share = 1 - len(wrong) / len(found)
    assert share >= LEAST[len(modalities)], f"{share:.0%} of the answers are right; wrong are {wrong}"
