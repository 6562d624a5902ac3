"""Sessions: editing, streams, calls from threads, faults that change nothing, and every form of attached media."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from lavis_chatbridge.chat import MediaReader, Sampling, media_of
from lavis_chatbridge.chat.attachments import check_file, modality_of
from lavis_chatbridge.errors import ConfigError, MediaError, PromptError
from lavis_chatbridge.media import open_image, open_video
from tests.chat.building import picture, png, processors, session, slow_down, sound, video
from tests.media.making import sound_alone, sound_file, tone


def test_a_stopped_stream_keeps_its_text(model: Any, monkeypatch: pytest.MonkeyPatch):
    slow_down(model, monkeypatch, 0.03)
    talk = session(model)
    stream = talk.stream("What is it?", max_new_tokens=400, temperature=5.0, top_p=1.0, seed=2, ignore_eos=True)
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
    assert talk.undo().text == "And what more?"
    assert talk.undo().media[0].modality == "image"
    assert (talk.undo(), talk.messages) == (None, ())
    with pytest.raises(PromptError, match="must end with a user's turn"):
        talk.regenerate()
    with pytest.raises(PromptError, match="no message 0"):
        talk.edit(0, "x")


def test_wrong_settings_are_named(model: Any):
    wrong = {"temprature": "did you mean 'temperature'", "image": "did you mean 'images'", "stop": "expected a list"}
    for name, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            session(model).ask("Hi.", **{name: "###"})
    with pytest.raises(ConfigError, match=r"model.template is"):
        session(model, template="llama")


def test_a_failure_leaves_the_session_as_it_was(model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    talk = session(model, sampling=Sampling(max_new_tokens=2))
    before = talk.ask("Hi.")
    assert before.tokens == 2
    broken: tuple[Any, ...] = (tmp_path / "absent.png", b"no picture", np.zeros((3, 4, 5, 6, 7)), (picture(), 3), 3)
    for one in broken:
        with pytest.raises(MediaError):
            talk.ask("And this?", images=[picture(), one])
    with pytest.raises(MediaError, match=r"^cannot read None: expected .* found None$"):
        talk.ask("And this?", images=[None])  # type: ignore[list-item]
    for words in (3, None, ["hi"]):
        with pytest.raises(PromptError, match="a message is a text"):
            talk.ask(words)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="the question is empty"):
        talk.ask(" \n")
    with monkeypatch.context() as patched:
        patched.setattr(model.llama_model, "forward", Mock(side_effect=torch.OutOfMemoryError("no memory")))
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


def seen(model: Any, **media: Any) -> list[torch.Tensor]:
    attached = media_of(**media, hear_videos=False)
    MediaReader(model, processors()).read(attached)
    return [medium.perceived.soft for medium in attached]  # type: ignore[union-attr, misc]


def test_pillow_images_keep_their_pixels_and_frames():
    paletted = Image.fromarray(picture()).convert("P")
    [medium] = media_of(images=paletted)
    np.testing.assert_array_equal(open_image(medium.content), open_image(paletted))  # type: ignore[arg-type]
    file = io.BytesIO()
    frames = [Image.new("L", (40, 40), level) for level in (10, 200, 200, 90)]
    frames[0].save(file, "TIFF", save_all=True, append_images=frames[1:])
    shown = Image.open(file)
    [medium] = media_of(videos=shown)
    np.testing.assert_array_equal(medium.content, open_video(shown, range))
    assert shown.tell() == 0


def test_a_single_medium_is_a_list_of_one(tmp_path: Path):
    path = tmp_path / "a.png"
    array, samples = picture(), tone(0.1, 8000)
    for given in (str(path), path, b"bytes", bytearray(b"bytes"), memoryview(b"bytes"), array):
        for name in ("images", "videos", "audios"):
            [medium] = media_of(**{name: given}, hear_videos=False)  # type: ignore[arg-type]
            assert medium.content is given
    pair = (samples, np.int64(8000))
    assert [m.content for m in media_of(audios=pair)] == [pair]  # type: ignore[arg-type]
    assert [m.content for m in media_of(audios=("a.wav", "b.wav"))] == ["a.wav", "b.wav"]
    assert [m.name for m in media_of(videos="a/b.mp4")] == ["b.mp4", "b.mp4's sound track"]
    assert len(media_of(videos=np.zeros((4, 28, 28, 3), np.uint8))) == 1


@pytest.mark.parametrize(
    ("media", "message"),
    [
        ({"images": 3}, "images are given as paths.*, not int"),
        ({"videos": {"a.mp4": 1}}, "not dict"),
        ({"media": ["image", "a.png"]}, "expected pairs"),
        ({"media": [("smell", "a.png")]}, "one of image, video, audio"),
        ({"images": io.StringIO("text")}, "binary mode"),
        ({"images": "https://example.org/a.png"}, "not on the list of allowed hosts"),
    ],
)
def test_unknown_forms_are_refused(media: dict[str, Any], message: str):
    with pytest.raises(MediaError, match=message):
        media_of(**media)


def test_a_sound_with_its_rate_is_heard_as_its_file(model: Any):
    samples = tone(0.5, 44_100)
    [file] = seen(model, audios=sound_file(samples, 44_100, subtype="FLOAT"))
    pair, stereo, wrong = seen(model, audios=[(samples, 44_100), (np.stack([samples] * 2, axis=1), 44_100), samples])
    torch.testing.assert_close(pair, file, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stereo, file, rtol=1e-3, atol=1e-3)
    assert (wrong - file).abs().max() > 10 * (pair - file).abs().max()


def test_tensors_file_objects_and_lists_of_frames(model: Any):
    array, tensor = picture(), torch.from_numpy(picture())
    images = [array, tensor, tensor.movedim(-1, 0), tensor.movedim(-1, 0) / 255, io.BytesIO(png())]
    first, *others = seen(model, images=images)
    for other in others:
        torch.testing.assert_close(other, first)
    samples = torch.from_numpy(tone(0.5, 8000))
    assert torch.equal(*seen(model, audios=[(samples, 8000), (samples.numpy(), 8000)]))
    frames = [Image.fromarray(array), Image.fromarray(array[::-1]).resize((20, 20))]
    [clip] = media_of(videos=frames)
    assert clip.content.shape == (2, *array.shape)  # type: ignore[union-attr]
    channels_first = torch.from_numpy(clip.content).movedim(-1, 1)  # type: ignore[arg-type]
    assert torch.equal(*seen(model, videos=[clip.content, channels_first]))


def test_modalities(tmp_path: Path):
    contents = {"nameless": png(), "sound": sound(), "clip": video(), "a.JPG": b"", "b.mp3": b"", "c.webm": b""}
    contents["voice.webm"] = sound_alone()
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found = [modality_of(tmp_path / name) for name in (*contents, "missing")]
    assert found == ["image", "audio", "video", "image", "audio", "video", "audio", "video"]
    assert modality_of(png()) == "image"
    with pytest.raises(MediaError, match=r"modality audio, but was given as image"):
        check_file(str(tmp_path / "b.mp3"), "image")
    check_file(str(tmp_path / "clip"), "audio")  # its sound track
