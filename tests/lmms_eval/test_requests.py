"""What lmms-eval asks, in ChatBridge's terms; lmms-eval itself is not needed for it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.media import open_audio
from lavis_chatbridge.plugin.lmms_eval.requests import batches, conversation, decoding, medium_of, question, wav
from tests.media.making import encoded, video_file

PICTURE = Image.new("RGB", (4, 4))
PNG = encoded(PICTURE, "PNG")
TONE = (0.5 * np.sin(np.arange(800) / 5)).astype(np.float32)


@pytest.mark.parametrize(
    ("given", "modality"),
    [
        (PICTURE, "image"),
        (np.zeros((4, 4, 3), np.uint8), "image"),
        (np.zeros((2, 4, 4, 3), np.uint8), "video"),
        (PNG, "image"),
        (wav(TONE, 16_000), "audio"),
        (video_file(4), "video"),
        ({"bytes": PNG, "path": "x.wav"}, "image"),
        ({"type": "audio", "url": "x.webm"}, "audio"),
        ({"type": "unknown", "video": wav(TONE, 8000)}, "audio"),
    ],
)
def test_the_modality_of_a_medium(given, modality):
    assert medium_of(given).modality == modality


def words(messages):
    """Role, text and media of each message."""
    return [(m.role, m.text, [(medium.modality, medium.content, medium.track) for medium in m.media]) for m in messages]


def test_sound_of_the_datasets_library_is_sound_whatever_it_is_called():
    samples = SimpleNamespace(data=torch.from_numpy(TONE)[None], sample_rate=8000)
    decoded = SimpleNamespace(get_all_samples=lambda: samples)
    for given in ({"array": TONE, "sampling_rate": 8000, "path": "x.wav"}, decoded):
        medium = medium_of(given, "video")
        assert medium.modality == "audio"
        np.testing.assert_array_equal(open_audio(medium.content, 8000), TONE)


def test_what_is_no_medium_is_refused():
    for name in ("video_start", "end_time"):
        with pytest.raises(MediaError, match=f"a part of a video \\({name}\\) is not supported"):
            conversation([{"role": "user", "content": [{"type": "video", "url": "v.mp4", name: 3.0}]}])
    refused = {"a set is not a medium": {1}, r"the fields \['frames'\]": {"frames": 3}, "no such file": "nowhere.mp4"}
    for words, given in refused.items():
        with pytest.raises(MediaError, match=words):
            medium_of(given)


def test_a_question_brings_its_media_first_and_videos_their_sound_on_request(tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes(video_file(4))
    assert words(question("<image> What is it?", None)) == [("user", "What is it?", [])]
    video, track, sound = ("video", path, False), ("audio", path, True), ("audio", wav(TONE, 8000), False)
    assert words(question("Q", [[path], sound[1]])) == [("user", "Q", [video, sound])]
    assert words(question("Q", [path], hear_videos=True)) == [("user", "Q", [video, track])]
    assert words(question("Q", [path, sound[1]], hear_videos=True)) == [("user", "Q", [video, sound])]


def test_messages_become_turns():
    picture = {"type": "image", "url": "p.png"}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "Sure?"},
        {"role": "user", "content": [picture]},
    ]
    image = ("image", "p.png", False)
    assert words(conversation(messages)) == [
        ("user", "Be brief.\nWhat is it?", [image]), ("assistant", "A cat.", []), ("user", "Sure?", [image]),
    ]  # fmt: skip
    for wrong in (messages[:3], messages[2:]):
        with pytest.raises(DataError, match=r"expected user \.\.\. user"):
            conversation(wrong)
    with pytest.raises(DataError, match=r"roles \['tool'\]"):
        conversation([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    ("kwargs", "sampling"),
    [
        ({"until": ["x"], "temperature": 0, "image_aspect_ratio": "pad", "max_new_tokens": 9}, (0.0, 1, 9)),
        ({}, (0.0, 1, 128)),
        ({"temperature": 0.7, "top_p": 0.8, "num_beams": 3}, (0.7, 1, 128)),
        ({"temperature": 0.7, "do_sample": False, "num_beams": 3}, (0.0, 3, 128)),
    ],
)
def test_decoding_is_greedy_unless_a_temperature_is_given(kwargs, sampling):
    found = decoding(kwargs)
    assert (found.temperature, found.num_beams, found.max_new_tokens) == sampling
    assert found.stop == tuple(kwargs.get("until", ()))


def test_batches_hold_requests_of_one_key_the_longest_first():
    assert list(batches(["a", "b", "a", "a"], [1, 5, 3, 2], 2)) == [[2, 3], [0], [1]]
