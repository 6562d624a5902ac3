"""Every form of OpenAI's messages, and conversations in files."""

from __future__ import annotations

import base64
import functools
import json
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from lavis_chatbridge.chat import Conversation
from lavis_chatbridge.chat.messages import Access, data_url, open_url, read_messages
from lavis_chatbridge.errors import DataError, MediaError
from tests.chat import building
from tests.chat.building import audio_part, image_part, picture, png, sound, video, video_part
from tests.media.making import tone


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def read(*records: Any, **settings: Any) -> Conversation:
    return read_messages(records, Access(), **settings)


def test_save_and_load(model: Any, tmp_path: Path):
    (tmp_path / "red sound.wav").write_bytes(sound())
    talk = building.session(model, system="Be brief.")
    frames = np.stack([picture(), picture()[::-1]])
    sounds = [tmp_path / "red sound.wav", (tone(0.5, 8000), 8000)]
    talk.ask("What?", images=[picture()], audios=sounds, videos=[video(), frames])
    talk.save(tmp_path / "talk.json")
    record = json.loads((tmp_path / "talk.json").read_text())
    assert record["messages"][0] == {"role": "system", "content": "Be brief."}
    types = [part["type"] for part in record["messages"][1]["content"]]
    assert types == ["image_url", "video_url", "video", "audio_url", "audio_url", "text"]
    assert record["messages"][1]["content"][3]["audio_url"] == {"url": "file:red%20sound.wav"}
    assert str(tmp_path) not in (tmp_path / "talk.json").read_text()
    loaded = building.session(model)
    loaded.load(tmp_path / "talk.json")
    assert loaded.system == "Be brief."
    assert [(m.role, m.text) for m in loaded.messages] == [(m.role, m.text) for m in talk.messages]
    found = [(m.modality, m.track, m.name) for m in loaded.messages[0].media]
    assert found == [(m.modality, m.track, m.name) for m in talk.messages[0].media]
    assert loaded.regenerate().text == talk.regenerate().text
    assert list(tmp_path.glob(".talk*")) == []


def test_a_file_that_is_no_conversation_leaves_the_session_as_it_was(model: Any, tmp_path: Path):
    talk = building.session(model)
    talk.ask("Hi.")
    image = {"role": "user", "content": [{"image_url": "data:;base64,?"}]}
    contents = ["hello", '{"format": "other"}', json.dumps({"messages": [3]}), json.dumps({"messages": [image]})]
    for content in contents:
        (tmp_path / "talk.json").write_text(content)
        with pytest.raises(DataError, match=r"talk\.json"):
            talk.load(tmp_path / "talk.json")
    assert len(talk.messages) == 2


PICTURE = data_url(png(), "image/png")
SOUND = f"data:audio/wav;base64,{base64.b64encode(sound()).decode()}"


@pytest.mark.parametrize(
    ("part", "modality"),
    [
        (image_part(), "image"),
        ({"type": "image_url", "image_url": PICTURE}, "image"),
        ({"image_url": {"url": PICTURE}}, "image"),
        ({"type": "input_image", "image_url": PICTURE}, "image"),
        (audio_part(), "audio"),
        ({"type": "input_audio", "input_audio": {"data": SOUND}}, "audio"),
        ({"type": "audio_url", "audio_url": {"url": SOUND}}, "audio"),
        (video_part(), "video"),
    ],
)
def test_parts_that_bring_a_medium(part: dict[str, Any], modality: str):
    [message] = read(user(part, "What is it?")).messages
    assert message.text == "What is it?"
    assert message.media[0].modality == modality
    assert message.media[0].name == "messages[0].content[0]"
    assert isinstance(message.media[0].content, bytes)
    assert [m.track for m in message.media] == ([False, True] if modality == "video" else [False])
    for unheard in (read(user(part), hear_videos=False), read(user({**part, "heard": False}))):
        assert len(unheard.messages[0].media) == 1


def test_several_frames_are_one_video():
    frames = "data:video/jpeg;base64," + ",".join([PICTURE.split(",")[1]] * 2)  # vLLM's form
    for part in ({"type": "video", "video": [PICTURE, PICTURE]}, {"video_url": {"url": frames}}):
        [medium] = read(user(part, "What?")).messages[0].media
        assert medium.content.shape == (2, *picture().shape)  # type: ignore[union-attr]


def test_messages_of_any_order_are_read():
    system, late = {"role": "system", "content": "S"}, {"role": "developer", "content": [{"type": "text", "text": "L"}]}
    said, empty = {"role": "assistant", "content": "A"}, {"role": "assistant", "content": None}
    found = read(system, late, said, user("U"), user("V"), empty, late, user({"type": "input_text", "text": "W"}))
    assert found.system == "S\nL"
    assert [message.text for message in found.messages] == ["", "A", "U\nV", "", "L\nW"]
    assert [message.role for message in found.messages] == ["user", "assistant", "user", "assistant", "user"]
    assert [message.text for message in read(user("U"), said, late).messages] == ["U", "A", "L"]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([3], r"messages\[0\].role is 3"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\].role is 'tool', expected system"),
        ([{"role": "user"}], r"messages\[0\].content is None, expected a text"),
        ([user(3)], r"messages\[0\].content\[0\] is 3, expected an object"),
        ([user({"type": "file", "file": {}})], r"content\[0\].type is 'file', expected one of text, image_url"),
        ([user({"type": "image_url", "image_url": {}})], r"content\[0\].image_url is None, expected a URL"),
        ([user({"image_url": [PICTURE, PICTURE]})], r"content\[0\].image_url is a list of 2 URLs"),
        ([user({"type": "text", "text": 3})], r"content\[0\].text is 3"),
        ([{"role": "assistant", "content": [{"image_url": PICTURE}]}], r"content\[0\] is a medium"),
        ([user(*[{"image_url": PICTURE}] * 3)], "have 3 media, the limit is 2"),
    ],
)
def test_faults_of_messages_are_named(records: list[Any], message: str):
    with pytest.raises(DataError, match=message):
        read(*records, most_media=2)


def test_data_urls():
    for data in (";base64,Ynl0ZXM=", "image/png;base64,Ynl0\nZXM", "image/png;BASE64,Ynl0ZXM%3D", "text/plain,b%79tes"):
        assert open_url(f"DATA:{data}", "it", Access()) == b"bytes"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64,$$$", "not base64"),
        ("data:image/png;base64", "comma"),
        ("data:;base64,", "empty"),
        ("data:," + "a" * 101, "larger than the limit of 100 bytes"),
        ("ftp://example.org/a.png", "does not begin with data:, file: or http"),
        ("http://127.0.0.1:1/a.png", "'127.0.0.1' is not on the list of allowed hosts"),
        ("http://[half", "not on the list of allowed hosts"),
        ("file:a.png", "no such file is offered"),
    ],
)
def test_urls_that_are_refused(url: str, message: str):
    with pytest.raises(MediaError, match=f"cannot read it: .*{message}"):
        open_url(url, "it", Access(max_bytes=100))


def test_files_below_an_allowed_folder(tmp_path: Path):
    with pytest.raises(MediaError, match="no such file is offered") as refused:
        read(user("x", {"image_url": "file:///etc/passwd"}))
    assert refused.value.source == "messages[0].content[1]"
    offered, secret = tmp_path / "offered", tmp_path / "secret.png"
    offered.mkdir()
    for path in (secret, offered / "a b.png"):
        path.write_bytes(b"x")
    (offered / "link.png").symlink_to(secret)
    access = Access(folders=(offered,))
    for url in ("file:a%20b.png", f"file://{offered}/a%20b.png", f"file://localhost{offered}/a b.png"):
        assert open_url(url, "it", access) == offered / "a b.png"
    for url in ("file:../secret.png", f"file://{secret}", "file:link.png", "file:.", "file:b.png", "file:a\0"):
        with pytest.raises(MediaError, match="cannot read it: no such file is offered"):
            open_url(url, "it", access)
    assert open_url("file:../secret.png", "it", Access(own_folder=offered)).samefile(secret)  # type: ignore[union-attr]


def served(request: httpx.Request) -> httpx.Response:
    """A picture, pages that lead elsewhere, a large one, a slow one."""
    leads = {"/to-picture": "/picture", "/round": "/round", "/away": "http://localhost:1/", "/to-file": "file:///x"}
    if request.url.path in leads:
        return httpx.Response(302, headers={"Location": leads[request.url.path]})
    if request.url.path == "/slow":
        return httpx.Response(200, content=(time.sleep(0.05) or b"a" for _ in range(200)))
    content = b"a" * (1000 if request.url.path == "/large" else 1)
    return httpx.Response(404 if request.url.path == "/missing" else 200, content=content)


def test_urls_of_an_allowed_host_are_fetched(monkeypatch: pytest.MonkeyPatch):
    client = functools.partial(httpx.Client, transport=httpx.MockTransport(served))
    monkeypatch.setattr(httpx, "Client", client)
    access = Access(hosts=("127.0.0.1",), max_bytes=100, seconds=0.5)
    assert open_url("http://127.0.0.1/to-picture", "it", access) == b"a"
    for path, message in (
        ("/away", "'localhost' is not on the list"),
        ("/to-file", "not on the list"),
        ("/round", "TooManyRedirects"),
        ("/missing", "status 404"),
        ("/large", "larger than the limit"),
        ("/slow", "longer than 0.5 s"),
    ):
        with pytest.raises(MediaError, match=message):
            open_url(f"http://127.0.0.1{path}", "it", access)
