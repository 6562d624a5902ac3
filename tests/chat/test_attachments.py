"""Attached media of every form: which are taken, what the model sees of them, and which are refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lavis_chatbridge.chat import MediaReader, media_of
from lavis_chatbridge.chat.attachments import check_file, modality_of
from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media import open_image, open_video
from tests.chat.building import picture, processors, sound, video
from tests.chat.serving import png
from tests.media.making import sound_alone, sound_file, tone


@pytest.fixture(scope="module")
def reader(model: Any) -> MediaReader:
    """One for all: what it remembers must never stand for something else."""
    return MediaReader(model, processors())


def seen(reader: MediaReader, **media: Any) -> list[torch.Tensor]:
    """The soft tokens of media."""
    attached = media_of(**media, hear_videos=False)
    reader.read(attached)
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
        ({"media": [(np.zeros(9), 16_000)]}, "expected pairs"),
        ({"media": Path("a.png")}, "expected pairs"),
        ({"images": io.StringIO("text")}, "binary mode"),
        ({"images": "https://example.org/a.png"}, "not on the list of allowed hosts"),
    ],
)
def test_unknown_forms_are_refused(media: dict[str, Any], message: str):
    with pytest.raises(MediaError, match=message):
        media_of(**media)


def test_a_sound_with_its_rate_is_heard_as_its_file(reader: MediaReader):
    rate = 44_100
    samples = tone(0.5, rate)
    pair, wrong, stereo, other = seen(
        reader, audios=[(samples, rate), samples, (np.stack([samples, samples], axis=1), rate), (samples, 22_050)]
    )
    [file] = seen(reader, audios=sound_file(samples, rate, subtype="FLOAT"))
    torch.testing.assert_close(pair, file, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stereo, file, rtol=1e-3, atol=1e-3)
    assert (wrong - file).abs().max() > 10 * (pair - file).abs().max()
    assert not torch.equal(pair, other)


def test_tensors_file_objects_and_lists_of_frames(reader: MediaReader):
    array, tensor = picture(), torch.from_numpy(picture())
    images = [array, tensor, tensor.movedim(-1, 0), tensor.movedim(-1, 0) / 255, io.BytesIO(png())]
    first, *others = seen(reader, images=images)
    for other in others:
        torch.testing.assert_close(other, first)
    samples = torch.from_numpy(tone(0.5, 8000))
    assert torch.equal(*seen(reader, audios=[(samples, 8000), (samples.numpy(), 8000)]))
    frames = [Image.fromarray(array), Image.fromarray(array[::-1]).resize((20, 20))]
    [clip] = media_of(videos=frames)
    assert clip.content.shape == (2, *array.shape)  # type: ignore[union-attr]
    channels_first = torch.from_numpy(clip.content).movedim(-1, 1)  # type: ignore[arg-type]
    assert torch.equal(*seen(reader, videos=[clip.content, channels_first]))


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
