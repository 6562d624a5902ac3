"""What lmms-eval asks, in ChatBridge's terms; lmms-eval itself is not needed for it."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lavis_chatbridge.errors import ConfigError, DataError, MediaError
from lavis_chatbridge.media import open_audio
from lavis_chatbridge.plugin import lmms_eval
from lavis_chatbridge.plugin.lmms_eval.requests import (
    Given,
    Said,
    batches,
    conversation,
    cut,
    decoding,
    medium_of,
    question,
    wav,
)

TONE = (0.5 * np.sin(np.arange(800) / 5)).astype(np.float32)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("a/b.JPG", "image"),
        ("b.flac", "audio"),
        ("clip.webm", "video"),
        ("no_ending", "video"),
        (Image.new("RGB", (4, 4)), "image"),
        (np.zeros((4, 4, 3), np.uint8), "image"),
        (np.zeros((2, 4, 4, 3), np.uint8), "video"),
        (wav(TONE, 16_000), "audio"),
        (b"\x89PNG\r\n\x1a\n0000", "image"),
        (b"\0\0\0\x18ftypmp42", "video"),
        ({"bytes": None, "path": "x.png"}, "image"),
        ({"type": "audio", "url": "x.webm"}, "audio"),
        ({"video": "x.mp4"}, "video"),
    ],
)
def test_the_kind_of_a_medium(given, kind):
    assert medium_of(given).modality == kind


def test_sound_of_the_datasets_library_is_sound_whatever_it_is_called():
    decoded = SimpleNamespace(
        get_all_samples=lambda: SimpleNamespace(data=torch.from_numpy(TONE)[None], sample_rate=8000)
    )
    for given in ({"array": TONE, "sampling_rate": 8000, "path": "x.wav"}, decoded):
        medium = medium_of(given, "video")
        assert medium.modality == "audio"
        np.testing.assert_array_equal(open_audio(medium.source, 8000), TONE)


def test_what_is_no_medium_is_refused():
    with pytest.raises(MediaError, match="a part of a video \\(video_start\\)"):
        medium_of({"url": "v.mp4", "video_start": 3.0}, "video")
    with pytest.raises(MediaError, match="a part of a video \\(end_time\\)"):
        conversation([{"role": "user", "content": [{"type": "video", "url": "v.mp4", "end_time": 3.0}]}])
    with pytest.raises(MediaError, match="a set is no medium"):
        medium_of({1})
    with pytest.raises(MediaError, match="the fields \\['frames'\\]"):
        medium_of({"frames": 3})


def test_a_question_brings_its_media_first_and_videos_their_sound_where_asked():
    assert question("<image> What is it?", None) == [Said("user", "What is it?")]
    video, sound = Given("video", "v.mp4"), Given("audio", "s.wav")
    assert question("Q", [["v.mp4"], "s.wav"])[0].media == (video, sound)
    assert question("Q", ["v.mp4"], hear_videos=True)[0].media == (video, Given("audio", "v.mp4", track=True))
    assert question("Q", ["v.mp4", "s.wav"], hear_videos=True)[0].media == (video, sound)


def test_messages_become_turns():
    picture = {"type": "image", "url": "p.png"}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "Sure?"},
        {"role": "user", "content": [picture]},
    ]
    image = Given("image", "p.png")
    assert conversation(messages) == [
        Said("user", "Be brief.\nWhat is it?", (image,)),
        Said("assistant", "A cat."),
        Said("user", "Sure?", (image,)),
    ]
    with pytest.raises(DataError, match=r"expected user \.\.\. user"):
        conversation(messages[:3])
    with pytest.raises(DataError, match="of the role 'tool'"):
        conversation([{"role": "tool", "content": "x"}])


def test_decoding_is_greedy_unless_a_temperature_is_given():
    greedy = decoding({"until": ["\n\n"], "temperature": 0, "image_aspect_ratio": "pad", "max_new_tokens": 9})
    assert (greedy.temperature, greedy.num_beams, greedy.max_new_tokens) == (0.0, 1, 9)
    assert decoding({}).max_new_tokens == 128
    drawn = decoding({"temperature": 0.7, "top_p": 0.8, "num_beams": 3})
    assert (drawn.temperature, drawn.top_p, drawn.num_beams) == (0.7, 0.8, 1)
    assert decoding({"temperature": 0.7, "do_sample": False}).temperature == 0.0
    assert decoding({"num_beams": 3}).num_beams == 3


def test_answers_end_at_the_stop_texts():
    assert cut("a cat. \n\n###Human", ["###", "\n\n"]) == "a cat."
    assert cut(" a cat", "dog") == cut("a cat", None) == "a cat"


def test_batches_hold_requests_of_one_key_the_longest_first():
    assert list(batches(["a", "b", "a", "a"], [1, 5, 3, 2], 2)) == [[2, 3], [0], [1]]


def test_without_lmms_eval_it_says_what_to_install(monkeypatch):
    for name in ("lmms_eval", "lmms_eval.api.model", "lmms_eval.models.registry_v2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="pip install 'lmms-eval"):
        lmms_eval.manifests()
    monkeypatch.delitem(sys.modules, "lavis_chatbridge.plugin.lmms_eval.model", raising=False)
    with pytest.raises(ConfigError, match="pip install 'lmms-eval"):
        importlib.import_module("lavis_chatbridge.plugin.lmms_eval.model")
