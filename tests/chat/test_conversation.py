"""Conversations as plain data: their files, and every form of OpenAI's messages."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lavis_chatbridge.chat import ChatMessage, Conversation, Medium
from lavis_chatbridge.chat.conversation import FORMAT, VERSION
from lavis_chatbridge.errors import DataError, MediaError
from tests.chat import building
from tests.chat.building import picture, sound, video
from tests.chat.serving import data_url, png


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> Any:
    return building.chat_model(golden_dir / "tokenizer")


def test_save_and_load(model: Any, tmp_path: Path):
    (tmp_path / "red sound.wav").write_bytes(sound())
    talk = building.session(model, system="Be brief.")
    talk.ask("What is it?", images=[picture()], audios=[tmp_path / "red sound.wav"], videos=[video()])
    talk.ask("And?")
    talk.save(tmp_path / "talk.json")
    record = json.loads((tmp_path / "talk.json").read_text())
    assert record["messages"][0] == {"role": "system", "content": "Be brief."}
    types = [part["type"] for part in record["messages"][1]["content"]]
    assert types == ["image_url", "video_url", "audio_url", "text"]
    assert record["messages"][1]["content"][2]["audio_url"] == {"url": "file:red%20sound.wav"}
    assert str(tmp_path) not in (tmp_path / "talk.json").read_text()
    loaded = building.session(model)
    loaded.load(tmp_path / "talk.json")
    assert loaded.system == "Be brief."
    assert [(t.role, t.text, t.ids) for t in loaded.messages] == [(t.role, t.text, t.ids) for t in talk.messages]
    found = [(m.modality, m.track) for m in loaded.messages[0].media]
    assert found == [("image", False), ("video", False), ("audio", True), ("audio", False)]
    assert loaded.ask("Why?").text == talk.ask("Why?").text
    assert list(tmp_path.glob(".talk*")) == []


def test_a_file_that_is_no_conversation_leaves_the_session_as_it_was(model: Any, tmp_path: Path):
    talk = building.session(model)
    talk.ask("Hi.")
    head = {"format": FORMAT, "version": VERSION}
    image = {"type": "image_url", "image_url": {"url": "data:;base64,?"}}
    contents = {
        "text.json": "hello",
        "other.json": '{"format": "other"}',
        "later.json": json.dumps({"format": FORMAT, "version": 9, "messages": []}),
        "role.json": json.dumps({**head, "messages": [{"role": "nobody", "content": ""}]}),
        "media.json": json.dumps({**head, "messages": [{"role": "user", "content": [image]}]}),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    for name in ("absent.json", *contents):
        with pytest.raises(DataError, match=name):
            talk.load(tmp_path / name)
    assert len(talk.messages) == 2


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def read(*messages: Any, **settings: Any) -> Conversation:
    return Conversation.from_openai(messages, **settings)


PICTURE = data_url(png(), "image/png")
SOUND = base64.b64encode(sound()).decode()


@pytest.mark.parametrize(
    ("part", "modality"),
    [
        ({"type": "image_url", "image_url": {"url": PICTURE}}, "image"),
        ({"type": "image_url", "image_url": PICTURE}, "image"),
        ({"image_url": {"url": PICTURE}}, "image"),
        ({"type": "input_image", "image_url": PICTURE}, "image"),
        ({"type": "input_audio", "input_audio": {"data": SOUND, "format": "wav"}}, "audio"),
        ({"type": "input_audio", "input_audio": {"data": f"data:audio/wav;base64,{SOUND}"}}, "audio"),
        ({"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{SOUND}"}}, "audio"),
        ({"type": "video_url", "video_url": {"url": data_url(video(), "video/mp4")}}, "video"),
    ],
    ids=["image", "bare url", "no type", "input_image", "input_audio", "data url", "audio_url", "video"],
)
def test_parts_that_bring_a_medium(part: dict[str, Any], modality: str):
    [message] = read(user(part, "What is it?")).messages
    assert message.text == "What is it?"
    assert message.media[0].modality == modality
    assert message.media[0].name == "messages[0].content[0]"
    assert isinstance(message.media[0].source, bytes)
    assert [m.track for m in message.media] == ([False, True] if modality == "video" else [False])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": [PICTURE, PICTURE]},
        {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + ",".join([PICTURE.split(",")[1]] * 2)}},
    ],
    ids=["list", "vLLM's URL"],
)
def test_several_frames_are_one_video(model: Any, part: dict[str, Any]):
    [medium] = read(user(part)).messages[0].media
    assert medium.modality == "video"
    answer = building.engine(model).reply(read(user(part, "What?"))).answer
    assert [(note.modality, note.reached) for note in answer.media] == [("video", True)]
    np.testing.assert_array_equal(np.asarray(medium.source).shape[:1], [2])


def roles(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in conversation.messages]


def test_messages_of_any_order_are_read():
    system, late = {"role": "system", "content": "S"}, {"role": "developer", "content": [{"type": "text", "text": "L"}]}
    said, empty = {"role": "assistant", "content": "A"}, {"role": "assistant", "content": None}
    found = read(system, late, said, user("U"), user("V"), empty, late, user({"type": "input_text", "text": "W"}))
    assert found.system == "S\nL"
    assert roles(found) == [("user", ""), ("assistant", "A"), ("user", "U\nV"), ("assistant", ""), ("user", "L\nW")]
    assert roles(read(user("U"), said)) == [("user", "U"), ("assistant", "A")]
    assert roles(read(user("U"), said, late))[-1] == ("user", "L")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([3], r"messages\[0\].role is 3"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\].role is 'tool', expected system"),
        ([{"role": "user"}], r"messages\[0\].content is None, expected a text"),
        ([user(3)], r"messages\[0\].content\[0\] is 3, expected an object"),
        ([user({"type": "file", "file": {}})], r"content\[0\].type is 'file', expected one of text, image_url"),
        ([user({"type": "image_url", "image_url": {}})], r"content\[0\].image_url is None, expected a URL"),
        ([user({"type": "text", "text": 3})], r"content\[0\].text is 3"),
        ([{"role": "assistant", "content": [{"image_url": PICTURE}]}], r"content\[0\] is a medium"),
        ([user(*[{"image_url": PICTURE}] * 3)], "bring 3 media, the limit is 2"),
    ],
)
def test_what_is_wrong_with_messages_is_named(messages: list[Any], message: str):
    with pytest.raises(DataError, match=message):
        read(*messages, most_media=2)


def test_a_url_that_may_not_be_opened_names_its_part():
    with pytest.raises(MediaError, match="no such file is offered") as refused:
        read(user("x", {"image_url": "file:///etc/passwd"}))
    assert refused.value.source == "messages[0].content[1]"


def test_a_video_may_be_unheard():
    part = {"type": "video_url", "video_url": {"url": data_url(video(), "video/mp4")}}
    assert len(read(user(part), hear_videos=False).messages[0].media) == 1
    assert len(read(user({**part, "heard": False})).messages[0].media) == 1


def test_a_conversation_round_trips_through_openai(tmp_path: Path):
    media = (Medium("image", png()), Medium("audio", (np.zeros(8, np.float32), 8000)))
    before = Conversation([ChatMessage("user", "U", media), ChatMessage("assistant", "A", (), (1, 2))], "S")
    after = read(*json.loads(json.dumps(before.to_openai())))
    assert (after.system, roles(after)) == ("S", roles(before))
    assert after.messages[1].ids == (1, 2)
    assert after.messages[0].media[0].source == png()
    assert after.messages[0].media[1].source[1] == 8000  # type: ignore[index]
