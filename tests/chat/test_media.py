"""Questions with in-memory media (Pillow images, arrays with a sample rate), and how a conversation saves them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lavis_chatbridge.chat import MediaReader, Medium, media_of
from lavis_chatbridge.errors import ChatBridgeError, MediaError, PromptError
from lavis_chatbridge.media import open_image, open_video
from tests.chat import building
from tests.chat.building import picture
from tests.media.making import sound_file, tone

ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> Any:
    return building.chat_model(golden_dir / "tokenizer")


@pytest.fixture(scope="module")
def reader(model: Any) -> MediaReader:
    """One for all: what it remembers must never stand for something else."""
    return MediaReader(model, building.processors())


def seen(reader: MediaReader, *media: Medium) -> list[torch.Tensor]:
    """The soft tokens of media."""
    reader.read(media)
    return [medium.perceived.soft for medium in media]  # type: ignore[union-attr]


def paletted(colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("P", (40, 40), 0)
    image.putpalette([*colour] + [0, 0, 0] * 255)
    return image


def half_transparent(index: int) -> Image.Image:
    image = Image.new("P", (40, 40), 0)
    image.paste(1, (0, 0, 20, 40))
    image.putpalette([200, 0, 0, 0, 0, 200] + [0, 0, 0] * 254)
    image.info["transparency"] = index
    return image


def oriented(value: int) -> Image.Image:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "PNG", exif=exif)
    return Image.open(file)


def animation(*levels: int) -> Image.Image:
    frames = [Image.new("L", (40, 40), level) for level in levels]
    file = io.BytesIO()
    frames[0].save(file, "TIFF", save_all=True, append_images=frames[1:])
    return Image.open(file)


PAIRS: dict[str, Callable[[], list[Image.Image]]] = {
    "palette": lambda: [paletted((200, 0, 0)), paletted((0, 200, 0))],
    "palette and transparency": lambda: [half_transparent(0), half_transparent(1)],
    "EXIF orientation": lambda: [oriented(1), oriented(3)],
    "16 bits": lambda: [Image.fromarray(np.full((40, 40), level, np.uint16)) for level in (10_000, 60_000)],
    "CMYK": lambda: [Image.new("CMYK", (40, 40), (cyan, 80, 0, 20)) for cyan in (10, 200)],
    "HSV": lambda: [Image.new("HSV", (40, 40), (hue, 200, 200)) for hue in (10, 120)],
    "floats": lambda: [Image.fromarray(np.full((40, 40), level, np.float32)) for level in (0.1, 0.9)],
    "gray and alpha": lambda: [Image.new("LA", (40, 40), (90, alpha)) for alpha in (255, 90)],
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=[name.replace(" ", "-") for name in PAIRS])
def test_a_pillow_image_becomes_a_file_of_the_same_pixels(pair: Callable[[], list[Image.Image]]):
    first, second = (open_image(Medium("image", image).source) for image in pair())
    np.testing.assert_array_equal(first, open_image(pair()[0]))
    np.testing.assert_array_equal(second, open_image(pair()[1]))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("levels", [(10, 200, 200, 90), (30,)])
def test_an_animation_becomes_a_file_of_the_same_frames(levels: tuple[int, ...]):
    shown = animation(*levels)
    kept = Medium("video", shown)
    assert (shown.tell(), kept.name) == (0, "picture")
    np.testing.assert_array_equal(open_video(kept.source, range), open_video(animation(*levels), range))


def test_media_are_remembered_by_their_content(reader: MediaReader):
    first, second, third = (Medium("image", pixels) for pixels in (picture(), picture()[::-1], picture()))
    soft = seen(reader, first, second)
    assert not torch.equal(*soft)
    assert seen(reader, third)[0] is soft[0]


def test_a_single_medium_is_a_list_of_one(tmp_path: Path):
    path = tmp_path / "a.png"
    array, samples = picture(), tone(0.1, 8000)
    for source in (str(path), path, b"bytes", bytearray(b"bytes"), memoryview(b"bytes"), array):
        for name in ("images", "videos", "audios"):
            [medium] = media_of(**{name: source}, hear_videos=False)  # type: ignore[arg-type]
            assert medium.source is source
    pair = (samples, np.int64(8000))
    assert [m.source for m in media_of(audios=pair)] == [pair]  # type: ignore[arg-type]
    assert [m.source for m in media_of(audios=("a.wav", "b.wav"))] == ["a.wav", "b.wav"]
    assert [m.source for m in media_of(images=(array, array))] == [array, array]
    assert [(m.modality, m.source) for m in media_of(media=("image", array))] == [("image", array)]
    assert len(media_of(images=Image.fromarray(array))) == 1
    assert len(media_of(videos=np.zeros((4, 28, 28, 3), np.uint8))) == 2  # and its sound track


@pytest.mark.parametrize(
    ("media", "message"),
    [
        ({"images": 3}, "images are given as paths.*, not a int"),
        ({"audios": None}, "audios are given as paths"),
        ({"videos": {"a.mp4": 1}}, "not a dict"),
        ({"media": "m/red.png"}, "list of pairs"),
        ({"media": ["image", "a.png"]}, "list of pairs"),
        ({"media": [("image", "a.png", 1)]}, "list of pairs"),
        ({"media": 3}, "list of pairs"),
        ({"media": [("smell", "a.png")]}, "unknown modality 'smell'; known are image, video, audio"),
        ({"media": [(picture(), "image")]}, "known are image, video, audio"),
    ],
    ids=str,
)
def test_what_is_no_list_of_media_is_refused(media: dict[str, Any], message: str):
    with pytest.raises(MediaError, match=message):
        media_of(**media)


def test_what_is_no_question_is_refused(model: Any, reader: MediaReader):
    talk = building.session(model, reader=reader)
    for words in (3, None, b"hi", ["hi"]):
        with pytest.raises(PromptError, match="a question is a text"):
            talk.ask(words)  # type: ignore[call-overload]
    for words in ("", " \n"):
        with pytest.raises(PromptError, match="the question is empty"):
            talk.ask(words)
    assert talk.messages == ()
    assert talk.ask("", images=picture(), max_new_tokens=2).tokens == 2
    with pytest.raises(PromptError, match="a question is a text"):
        talk.edit(0, 3)  # type: ignore[arg-type]
    for wrong in (np.zeros((4, 28, 28, 3)), [picture(), 3], (picture(), 3)):
        with pytest.raises(ChatBridgeError):
            talk.ask("And this?", images=wrong)  # type: ignore[call-overload]
    assert len(talk.messages) == 2


def test_a_sound_with_its_rate_is_heard_as_its_file(model: Any, reader: MediaReader):
    rate = 44_100
    samples = tone(0.5, rate)
    pair, wrong, stereo = (
        Medium("audio", source) for source in ((samples, rate), samples, (np.stack([samples, samples], axis=1), rate))
    )
    read = seen(reader, pair, wrong, stereo)
    [file] = seen(reader, Medium("audio", sound_file(samples, rate, subtype="FLOAT")))
    torch.testing.assert_close(read[0], file, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(read[2], file, rtol=1e-3, atol=1e-3)
    assert (read[1] - file).abs().max() > 10 * (read[0] - file).abs().max()
    assert pair.name == f"array {len(samples)} at 44100 Hz"
    assert not torch.equal(*seen(reader, *(Medium("audio", (samples, r)) for r in (44_100, 22_050))))


def test_tensors_file_objects_and_lists_of_frames(reader: MediaReader, tmp_path: Path):
    array = picture()
    Image.fromarray(array).save(tmp_path / "a.png")
    tensor = torch.from_numpy(array)
    with open(tmp_path / "a.png", "rb") as file:
        images = [array, tensor, tensor.movedim(-1, 0), tensor.movedim(-1, 0) / 255, file]
        media = media_of(images=images)
    first, *others = seen(reader, *media)
    for other in others:
        torch.testing.assert_close(other, first)
    samples = torch.from_numpy(tone(0.5, 8000))
    [sound, pair] = seen(reader, *media_of(audios=[(samples, 8000), (samples.numpy(), 8000)]))
    assert torch.equal(sound, pair)
    frames = [Image.fromarray(array), Image.fromarray(array[::-1]).resize((20, 20))]
    [video] = media_of(videos=frames)
    [soft] = seen(reader, video)
    assert video.source.shape == (2, *array.shape)  # type: ignore[union-attr]
    [clip] = media_of(videos=torch.from_numpy(video.source).movedim(-1, 1), hear_videos=False)  # type: ignore[arg-type]
    assert torch.equal(seen(reader, clip)[0], soft)
    with pytest.raises(MediaError, match="binary mode"):
        media_of(images=io.StringIO("text"))  # type: ignore[arg-type]
    with pytest.raises(MediaError, match="not on the list of allowed hosts"):
        media_of(images="https://example.org/a.png")
