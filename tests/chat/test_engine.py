"""The engine: replies together equal replies alone, kept keys change nothing, the context's limit, notes on media."""

from __future__ import annotations

import dataclasses
import gc
import json
import random
import threading
import weakref
from typing import Any

import pytest

from lavis_chatbridge.chat import ChatMessage, Conversation, Engine, Sampling, Session, media_of
from lavis_chatbridge.chat.conversation import NO_TRACK, SILENT, SILENT_TRACK
from lavis_chatbridge.errors import ChatBridgeError, PromptError
from lavis_chatbridge.models.decoding import Decoder
from lavis_chatbridge.prompting.conversation import Message, Modality, chat_prompt
from lavis_chatbridge.toyworld import language
from lavis_chatbridge.toyworld.build import Item, render
from lavis_chatbridge.toyworld.world import Scene, scenes
from tests.chat import building
from tests.chat.building import picture, session, slow_down, sound, video, wait_until

ENDLESS = Sampling(max_new_tokens=400, temperature=5.0, top_p=1.0, ignore_eos=True)
FIVE: list[tuple[Modality, ...]] = [("video", "audio"), ("image", "audio"), ("image",), ("audio",), ("video",)]
MEDIA: dict[Modality, Any] = {"image": picture(), "video": video("nothing"), "audio": sound()}


@pytest.mark.parametrize("modalities", FIVE, ids="+".join)
@pytest.mark.parametrize("template", ["human_assistant", "vicuna_v1"])
def test_turns_with_the_cache_equal_one_pass_without_it(model: Any, modalities: tuple[Modality, ...], template: str):
    talks = [session(model, template=template, keep=keep) for keep in (8, 0)]
    answers = []
    for talk in talks:
        asked = [talk.ask("What is here?", media=[(m, MEDIA[m]) for m in modalities]), talk.ask("And what else?")]
        answers.append([*asked, talk.ask("Which one is bigger?", images=[picture()[::-1]])])
    for cached, whole in zip(*answers, strict=True):
        assert (cached.text, cached.ids, cached.prompt_tokens) == (whole.text, whole.ids, whole.prompt_tokens)
    assert [a.reused_tokens for a in answers[1]] == [0, 0, 0]
    first, second, third = answers[0]
    assert second.reused_tokens >= first.prompt_tokens  # and of the reply, what is encoded as it was generated
    assert third.reused_tokens >= second.prompt_tokens


def test_a_beam_search_is_the_models(model: Any):
    pieces = chat_prompt([Message("user", "What is it?", ("image",))], generate=True)
    samples = {"image": [[building.processors()["image"]["eval"](picture())]], "pieces": [pieces]}
    answer = session(model).ask("What is it?", images=[picture()], num_beams=3)
    assert [answer.text] == model.generate(samples, max_length=12, num_beams=3)


def test_answers_together_equal_answers_alone(model: Any, monkeypatch: pytest.MonkeyPatch):
    sizes, step = [], Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self: sizes.append(len(self)) or step(self))
    questions = ["What is it?", "Is there anything that looks red to you?", "Why?", "Name it."]
    media = [{"images": [picture()]}, {}, {"audios": [sound()]}, {"images": [picture()[::-1]]}]
    asked = list(zip(questions, media, strict=True))
    alone = [session(model).ask(q, **m, max_new_tokens=4 + 3 * i) for i, (q, m) in enumerate(asked)]
    engine = building.engine(model)
    replies = []
    for i, (question, brought) in enumerate(asked):
        conversation = Conversation().asking(question, media_of(**brought))
        replies.append((conversation, engine.reply(conversation, Sampling(max_new_tokens=4 + 3 * i))))
    for expected, (conversation, reply) in zip(alone, replies, strict=True):
        assert "".join(reply) == reply.answer.text == expected.text
        said = ChatMessage("assistant", reply.answer.text)
        second = Conversation([*conversation.messages, said]).asking("And now?")
        again = engine.reply(second, Sampling(max_new_tokens=12)).answer
        assert again.reused_tokens >= reply.answer.prompt_tokens
        assert again.text == session(model, messages=second.messages[:2], keep=0).ask("And now?").text
    assert max(sizes) > 1  # some moved forward together


def test_one_of_several_answers_can_be_cancelled(model: Any, monkeypatch: pytest.MonkeyPatch):
    slow_down(model, monkeypatch, 0.03)
    engine = building.engine(model)
    replies = [engine.reply(Conversation().asking(f"Question {i}?"), ENDLESS) for i in range(3)]
    next(replies[1])
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "chatbridge-generate"]
    assert not thread.daemon  # Python aborts if a daemon frees tensors while the interpreter ends
    replies[1].cancel()
    assert replies[1].answer.finish == "cancelled"
    for reply in replies:
        reply.cancel()
        assert reply.answer.tokens <= 400
    assert engine.present == 0
    assert engine.reply(Conversation().asking("Question 2?"), Sampling(max_new_tokens=9)).answer.tokens == 9


def test_a_reply_that_fails_leaves_the_batch(model: Any, monkeypatch: pytest.MonkeyPatch):
    engine = building.engine(model)
    with monkeypatch.context() as patched:
        patched.setattr(engine, "_send", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.reply(Conversation().asking("Hi."), ENDLESS).answer  # noqa: B018
    assert engine.reply(Conversation().asking("Hi."), Sampling(max_new_tokens=5)).answer.tokens == 5
    assert len(engine._decoder) == 0


def test_a_callback_that_raises_costs_only_its_own_reply(model: Any):
    engine = building.engine(model)
    hello = Conversation().asking("Hi.")
    raising = [engine.reply(hello, ENDLESS, lambda _: 1 / 0) for _ in range(2)]
    assert engine.reply(hello, Sampling(max_new_tokens=20, ignore_eos=True)).answer.tokens == 20
    assert [reply.answer.finish for reply in raising] == ["cancelled"] * 2
    assert engine.reply(hello, Sampling(max_new_tokens=5)).answer.tokens == 5


def test_a_full_engine_refuses_and_an_unused_one_is_collected(model: Any):
    engine = building.engine(model, batch=1, waiting=1)
    replies = [engine.reply(Conversation().asking("Hi."), ENDLESS) for _ in range(2)]
    with pytest.raises(ChatBridgeError, match="2 replies wait already"):
        engine.reply(Conversation().asking("Hi."))
    kept = weakref.ref(engine)
    engine.close()
    del engine, replies
    wait_until(lambda: gc.collect() is not None and kept() is None)


def test_a_text_is_continued_as_it_is(model: Any):
    engine, tokenizer = building.engine(model), model.llama_tokenizer
    answer = engine.reply("One two", Sampling(max_new_tokens=5)).answer
    ids = [tokenizer.bos_id, *tokenizer.encode("One two")]
    assert answer.prompt_tokens == len(ids)
    assert engine.reply(ids, Sampling(max_new_tokens=5)).answer.text == answer.text


def test_the_oldest_turns_are_left_out_in_pairs_with_a_warning(model: Any):
    talk = session(model, max_context=120)
    first = talk.ask("What is in this picture, and where is it?", images=[picture()])
    assert (first.dropped, first.warnings) == (0, ())
    last = [talk.ask(f"Question number {i}, which goes on for a while?") for i in range(5)][-1]
    assert last.dropped >= 4
    assert last.dropped % 2 == 0
    assert last.prompt_tokens + 12 <= 120
    assert f"its first {last.dropped} messages were left out" in last.warnings[0]
    assert last.media == ()  # the picture went with its turn
    kept = session(model, messages=talk.messages[last.dropped : -2], max_context=1000)
    assert kept.ask(talk.messages[-2].text).text == last.text
    with pytest.raises(PromptError, match="this message alone"):
        talk.ask("word " * 200)
    assert len(talk.messages) == 12  # the conversation itself keeps everything
    assert talk.ask("Short?", max_new_tokens=1000).finish in ("length", "stop")


def test_notes_on_media(model: Any):
    answer = session(model).ask(
        "What is it?",
        images=[picture()],
        videos=[video("tone"), video("nothing"), video("silence")],
        audios=[sound(), sound(loudness=0.0), sound(0.005)],
    )
    found = [(note.modality, note.tokens, *note.warnings) for note in answer.media]
    assert found[:5] == [("image", 3), ("video", 3), ("audio", 3), ("video", 3), ("audio", 0, NO_TRACK)]
    assert found[5:7] == [("video", 3), ("audio", 0, SILENT_TRACK)]
    assert found[7:9] == [("audio", 3), ("audio", 3, SILENT)]
    assert found[9:] == [("audio", 0, "5 ms of sound are less than 25 ms")]
    assert len(answer.warnings) == 4
    assert json.loads(json.dumps(dataclasses.asdict(answer)))["media"][4]["warnings"] == [NO_TRACK]


def test_media_are_encoded_once(model: Any, monkeypatch: pytest.MonkeyPatch):
    encoded: list[str] = []
    encode = model.encode_media
    monkeypatch.setattr(model, "encode_media", lambda name, media: encoded.append(name) or encode(name, media))
    talk = session(model)
    talk.ask("What is it?", images=[picture()], videos=[video()])
    talk.ask("And this?", images=[picture()], audios=[sound()])
    talk.regenerate()
    assert encoded == ["image", "video", "audio", "audio"]  # a track and a tone; the picture came twice


def files_of(scene: tuple[Scene, ...], number: int) -> list[tuple[Modality, bytes]]:
    """The media as files; a sound beside a video is the video's own track."""
    first, *others = scene
    if first.modality == "video":
        return [("video", render(Item("a.mp4", "joint", number, first, *others), seed=7))]
    names = {"image": "a.png", "audio": "a.wav"}
    return [(one.modality, render(Item(names[one.modality], "joint", number, one), seed=7)) for one in scene]


@pytest.fixture(scope="module")
def tiny() -> Engine:
    return Session.open("tiny", device="cpu").engine


@pytest.mark.parametrize("modalities", FIVE, ids="+".join)
def test_the_shipped_model_answers_rightly_about_the_embedded_world(tiny: Engine, modalities: tuple[Modality, ...]):
    sampled = [scenes(modality, False, 4211) for modality in modalities]
    found = []
    for number in range(8):
        talk = Session(tiny.model, engine=tiny, sampling=Sampling(max_new_tokens=24))
        scene = tuple(next(one) for one in sampled)
        words = random.Random(f"chat {number}")
        asker = language.Asker(scene, words)
        named = [asker.ask("name")] if len(scene) > 1 else language.questions(scene[0], words)[:3]
        asked = [(question.text, question.answer) for question in named]
        if len(scene) > 1:
            asked += [(f"what is {asker.attribute(fact)}?", fact.value) for fact in (asker.fact(0), asker.fact(1))]
        media = files_of(scene, number)
        for question, expected in asked:
            answer = talk.ask(question, media=media)
            assert sum(note.reached for note in answer.media) == len(scene)
            found.append((question, expected, answer.text))
            media = []
    wrong = [entry for entry in found if entry[1] != entry[2]]
    share = 1 - len(wrong) / len(found)
    assert share >= (0.95 if len(modalities) == 1 else 0.85), f"{share:.0%} of the answers are right; wrong are {wrong}"
