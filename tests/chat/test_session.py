"""Sessions: editing, streams, calls from threads, faults that change nothing."""

from __future__ import annotations

import functools
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lavis_chatbridge.chat import Sampling
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, MediaError, PromptError
from tests.chat.building import picture, session, video

ENDLESS: dict[str, Any] = {"max_new_tokens": 400, "temperature": 5.0, "top_p": 1.0, "seed": 2, "ignore_eos": True}


def slow_down(model: Any, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let every step of the language model take this much longer, so that a reply cannot end before a test acts."""
    forward = model.llama_model.forward
    slow = functools.wraps(forward)(lambda *args, **more: time.sleep(seconds) or forward(*args, **more))
    monkeypatch.setattr(model.llama_model, "forward", slow)


def test_a_stopped_stream_keeps_its_text(model: Any, monkeypatch: pytest.MonkeyPatch):
    slow_down(model, monkeypatch, 0.03)
    talk = session(model)
    stream = talk.stream("What is it?", **ENDLESS)
    began = next(stream) + next(stream)
    talk.cancel()
    assert stream.answer.finish == "cancelled"
    assert stream.answer.text.startswith(began)
    assert talk.messages[-1].text == stream.answer.text
    assert talk.ask("And?").text == session(model, messages=talk.messages[:2]).ask("And?").text


def test_calls_of_one_session_wait_for_one_another(model: Any, monkeypatch: pytest.MonkeyPatch):
    slow_down(model, monkeypatch, 0.1)
    talk = session(model)
    stream = talk.stream("First?")
    next(stream)
    asked = threading.Thread(target=lambda: talk.ask("Second?", max_new_tokens=1))
    asked.start()
    asked.join(0.05)
    assert asked.is_alive()
    stream.cancel()
    asked.join(60)
    assert [turn.text for turn in talk.messages if turn.role == "user"] == ["First?", "Second?"]


def test_edit_and_undo_and_regenerate_crop_the_cache(model: Any):
    talk = session(model)
    first = talk.ask("What is it?", images=[picture()])
    second = talk.ask("And what else?")
    talk.ask("Why?")
    assert talk.undo().text == "Why?"
    again = talk.regenerate()
    assert (again.text, again.reused_tokens) == (second.text, second.prompt_tokens - 1)
    talk.edit(2, "And what more?")
    assert [turn.text for turn in talk.messages] == ["What is it?", first.text, "And what more?"]
    with pytest.raises(PromptError, match="has no answer yet"):
        talk.ask("Hello?")
    other = talk.regenerate()
    assert first.prompt_tokens <= other.reused_tokens < other.prompt_tokens
    fresh = session(model, keep=0)
    fresh.ask("What is it?", images=[picture()])
    assert fresh.ask("And what more?").text == other.text
    with pytest.raises(PromptError, match="a message is a text, found 5"):
        talk.edit(0, 5)
    assert talk.undo().text == "And what more?"
    assert talk.undo().media[0].modality == "image"
    assert (talk.undo(), talk.messages) == (None, ())
    with pytest.raises(PromptError, match="must end with a user's turn"):
        talk.regenerate()
    with pytest.raises(PromptError, match="no message 0"):
        talk.edit(0, "x")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"image": "a.png"}, "did you mean 'images'"),
        ({"top_p": 0.0, "max_new_tokens": 0}, "max_new_tokens is 0.*top_p is 0.0"),
        ({"stop": "###"}, "stop: expected a list"),
        ({"num_beams": 2, "temperature": 1.0}, "asks for sampling"),
    ],
)
def test_wrong_settings_are_named(model: Any, setting: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        session(model).ask("Hi.", **setting)
    with pytest.raises(ConfigError, match=r"model.template is"):
        session(model, template="llama")


def test_stop_texts_of_the_caller(model: Any):
    talk = session(model)
    whole = talk.ask("What is it?", max_new_tokens=30).text
    middle = whole[len(whole) // 2 :][:3]
    cut = talk.regenerate(max_new_tokens=30, stop=[middle])
    assert cut.text == whole[: whole.index(middle)].strip()
    assert cut.finish == "stop"
    assert talk.ask("And?").text == session(model, messages=talk.messages[:2]).ask("And?").text


def test_a_failure_leaves_the_session_as_it_was(model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    talk = session(model, sampling=Sampling(max_new_tokens=2))
    before = talk.ask("Hi.")
    assert before.tokens == 2
    for broken in (tmp_path / "absent.png", b"no picture", np.zeros((3, 4, 5, 6, 7)), (picture(), 3)):
        with pytest.raises(MediaError):
            talk.ask("And this?", images=[broken])
    with pytest.raises(ChatBridgeError):
        talk.ask("And this?", images=[picture(), 3])
    for words in (3, None, ["hi"]):
        with pytest.raises(PromptError, match="a message is a text"):
            talk.ask(words)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="the question is empty"):
        talk.ask(" \n")

    def out_of_memory(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(model.llama_model, "forward", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            talk.ask("And?")
    assert [turn.text for turn in talk.messages] == ["Hi.", before.text]
    assert talk.ask("And?").text == session(model, messages=talk.messages[:2]).ask("And?", max_new_tokens=2).text


def test_how_it_shows_itself(model: Any):
    talk = session(model)
    assert "0 messages, 0 media" in repr(talk)
    assert talk._repr_html_() is None
    answer = talk.ask("What is <b>it</b>?", images=picture(), videos=video())
    assert str(answer) == answer.text
    assert "2 messages, 2 media" in repr(talk)
    shown = talk._repr_html_()
    assert '<img src="data:image/png;base64,' in shown
    assert "What is &lt;b&gt;it&lt;/b&gt;?" in shown
