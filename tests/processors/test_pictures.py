"""Image and video processors: shapes, statistics, chance, golden numbers; any processor: its section, its encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor
from omegaconf import OmegaConf
from PIL import Image

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.media import open_image
from lavis_chatbridge.media.video import frame_indices, uniform_frame_indices
from lavis_chatbridge.processors import (
    ImageEvalProcessor,
    ImageTrainProcessor,
    VideoEvalProcessor,
    VideoTrainProcessor,
    load_processors,
)
from lavis_chatbridge.processors.base import settings_for
from lavis_chatbridge.processors.pictures import CLIP_MEAN, CLIP_STD, PictureSettings, TrainPictureSettings, prepare
from tests.media.making import encoded, number_of, photo, video_file

COLOUR = (255, 0, 51)


def seeded(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("size", [(30, 40), (1, 1), (313, 1), (1, 313), (3, 1), (3, 3)])
def test_clip_statistics_of_any_size(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, COLOUR)
    for source in (np.array(image), image, encoded(image, "PNG")):
        got = ImageEvalProcessor()(source)
        assert (got.shape, got.dtype, got.is_contiguous()) == ((3, 224, 224), torch.float32, True)
        for channel, value in enumerate(COLOUR):
            expected = (value / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
            torch.testing.assert_close(got[channel], torch.full((224, 224), expected), atol=1e-5, rtol=0)


def test_large_photos_keep_their_pixels_to_a_hundredth() -> None:
    small = Image.fromarray(seeded().integers(0, 256, (45, 60, 3), dtype=np.uint8))
    data = encoded(small.resize((1920, 1440), Image.Resampling.BICUBIC), "JPEG", quality=90)
    exact = ImageEvalProcessor.from_config({"arithmetic": "pillow"})(data)
    assert (ImageEvalProcessor()(data) - exact).abs().mean() * min(CLIP_STD) < 0.005


def test_training_crops_mildly_and_as_the_generator_says() -> None:
    processor, noise = ImageTrainProcessor(), seeded().integers(0, 256, (60, 90, 3), dtype=np.uint8)
    again = [processor(noise, seeded(seed)) for seed in (1, 1, 2)]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])
    assert not all(torch.equal(again[0], processor(noise)) for _ in range(12))
    corners = processor(photo(200, 200), seeded())[:, [10, 10, -10, -10], [10, -10, 10, -10]]
    whole = ImageEvalProcessor()(photo(200, 200))[:, [10, 10, -10, -10], [10, -10, 10, -10]]
    torch.testing.assert_close(corners, whole, atol=0.02, rtol=0)
    ramp = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (100, 100, 3)).copy()
    half = TrainPictureSettings(image_size=50, crop_scale=(0.25, 0.25), mean=(0, 0, 0), std=(1, 1, 1))
    row = prepare(ramp[None], half, seeded())[0, 0, 0] * 255
    assert row[-1] - row[0] == pytest.approx(49, abs=0.5)


def test_video() -> None:
    data = video_file(40)
    got = VideoEvalProcessor.from_config({"image_size": 32})(data)
    assert got.shape == (4, 3, 32, 32)
    pixels = (got.permute(0, 2, 3, 1).numpy() * CLIP_STD + CLIP_MEAN) * 255
    assert [number_of(frame) for frame in pixels] == [4, 14, 24, 34]
    two = VideoEvalProcessor.from_config({"image_size": 32, "num_frames": 2, "sampling": "uniform"})(data)
    torch.testing.assert_close(two, VideoEvalProcessor.from_config({"image_size": 32, "num_frames": 40})(data)[[0, 20]])
    assert VideoEvalProcessor()(video_file(1)).shape[0] == 4


def test_training_samples_a_frame_of_each_quarter_and_crops_all_alike() -> None:
    sampled = np.array([frame_indices(40, 4, seeded(seed)) for seed in range(300)])
    for quarter in range(4):
        assert set(sampled[:, quarter]) == set(range(10 * quarter, 10 * quarter + 10))
    processor = VideoTrainProcessor.from_config({"image_size": 16, "crop_scale": [0.3, 0.5]})
    data = video_file(40)
    assert torch.equal(processor(data, seeded(5)), processor(data, seeded(5)))
    assert not torch.equal(processor(data, seeded(5)), processor(data, seeded(6)))
    still = processor(video_file(1), seeded())
    assert torch.equal(still[0], still[3])


def test_wrong_settings_are_all_reported() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'float'\?; .* did you mean 'image_size'"):
        ImageEvalProcessor.from_config({"name": "chatbridge_image_eval", "image_sise": 224, "arithmetic": "float32"})
    for processor, wrong in (
        (ImageEvalProcessor, {"arithmetic": "pillow", "antialias": False}),
        (ImageEvalProcessor, {"crop_scale": [0.9, 1.0]}),
        (ImageTrainProcessor, {"crop_scale": [1.2, 0.5]}),
    ):
        with pytest.raises(ConfigError, match=list(wrong)[-1]):
            processor.from_config(wrong)


@pytest.mark.parametrize(
    ("rule", "choose"), [("frame_index_eval", frame_indices), ("frame_index_demo_uniform", uniform_frame_indices)]
)
def test_frame_indices(golden_dir: Path, rule: str, choose: Callable[[int, int], list[int]]) -> None:
    for case, expected in json.loads((golden_dir / "data_rules.json").read_text())[rule].items():
        count, frames = map(int, case.split("/"))
        assert choose(count, frames) == expected, case


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("video_mapper.antialias_False", {"interpolation": "bilinear", "antialias": False, "arithmetic": "float"}),
        ("video_mapper.antialias_True", {"interpolation": "bilinear", "arithmetic": "float"}),
        ("pil_bicubic_eval", {"arithmetic": "pillow"}),
        ("pil_bicubic_eval", {}),
    ],
)
def test_transforms(golden_dir: Path, name: str, settings: dict[str, Any]) -> None:
    """The default transform differs from Pillow's by one level of 255 at most."""
    expected = torch.from_numpy(np.load(golden_dir / "image" / "transforms.npz")[name])
    picture = open_image(golden_dir / "image" / "sample.png")
    got = prepare(picture[None], PictureSettings(image_size=expected.shape[-1], **settings))
    atol = 2e-5 if settings else 1.01 / (255 * 0.26)
    torch.testing.assert_close(got, expected.reshape(got.shape), atol=atol, rtol=0)


# --- sections and encoders


TIMM = {"input_size": [3, 240, 240], "mean": [0.1] * 3, "std": [0.2] * 3}
VIT = {"size": {"height": 384, "width": 384}, "image_mean": [0.5] * 3}
AST = {"feature_extractor_type": "ASTFeatureExtractor", "max_length": 1024}


@pytest.mark.parametrize(
    ("part", "encoder", "file", "expected"),
    [
        ("vision", {"encoder": "eva", "image_size": 364}, None, {"image_size": 364}),
        ("vision", {"encoder": "transformers"}, VIT, {"image_size": 384, "mean": [0.5] * 3}),
        ("vision", {"encoder": "timm"}, {"pretrained_cfg": TIMM}, {"image_size": 240, "mean": [0.1] * 3}),
        ("vision", {"encoder": "timm", "name": "vit_base_patch16_siglip_224"}, None, {"image_size": 224}),
        ("vision", {"encoder": "my_encoders:colour"}, None, {}),
        ("audio", {"weights": "beats.pt"}, None, {}),
        ("audio", {"encoder": "transformers"}, AST, {"clip_seconds": 10.24}),
        ("audio", {"encoder": "transformers"}, {"feature_extractor_type": "Wav2Vec2"}, {"clip_seconds": 10.0}),
        ("audio", {"encoder": "transformers"}, {"max_length_s": 7}, {"clip_seconds": 7.0}),
    ],
)
def test_settings_for_an_encoder(part: str, encoder: dict, file: dict | None, expected: dict, tmp_path: Path) -> None:
    if file is not None:
        for name in ("config.json", "preprocessor_config.json"):
            (tmp_path / name).write_text(json.dumps(file))
        encoder = {**encoder, "weights": str(tmp_path)}
    found = settings_for(encoder, part)
    assert expected.items() <= found.items() if expected else found == {}


def test_the_link_in_a_yaml_follows_the_model() -> None:
    """Settings of the processor itself come first; the cache key changes with the encoder's."""
    section = {"eval": {"name": "chatbridge_image_eval", "encoder": "${model.vision}"}}
    whole = OmegaConf.create({"model": {"vision": {"image_size": 112}}, "preprocess": {"vis_processor": section}})
    small = load_processors(whole.preprocess)["image"]["eval"]
    assert small.settings.image_size == 112
    whole.model.vision.image_size = 56
    assert load_processors(whole.preprocess)["image"]["eval"].version != small.version
    own = ImageEvalProcessor.from_config({"encoder": {"image_size": 112}, "image_size": 28})
    assert own.settings.image_size == 28


def test_registered_with_lavis() -> None:
    for processor in (one for splits in load_processors().values() for one in splits.values()):
        processor_class = registry.get_processor_class(processor.name)
        assert issubclass(processor_class, BaseProcessor)
        for cfg in (None, {"name": processor.name}, OmegaConf.create({"name": processor.name})):
            assert processor_class.from_config(cfg).version == processor.version
        assert processor.version.startswith(processor.name)


def test_load_processors() -> None:
    processors = load_processors(
        {
            "vis_processor": {"train": {"name": "chatbridge_image_train", "image_size": 56}},
            "video_processor": {"eval": {"image_size": 56, "num_frames": 2}},
            "text_processor": {"train": {"name": "chatbridge_text", "clean": "spaces"}, "eval": None},
        }
    )
    assert list(processors) == ["image", "video", "audio", "text"]
    image, text = processors["image"], processors["text"]
    assert (image["train"].settings.image_size, image["eval"].settings.image_size) == (56, 224)
    assert processors["video"]["eval"].settings.num_frames == 2
    assert text["train"]("  A \n Dog ") == "A Dog"
    assert text["eval"]("A Dog - runs/jumps.\n") == "a dog runs jumps."


def test_load_processors_reports_all_faults() -> None:
    with pytest.raises(ConfigError) as caught:
        load_processors(
            {
                "vis_procesor": {},
                "audio_processor": {"train": {"name": "chatbridge_audio_trian"}, "test": {}},
                "video_processor": {"eval": {"num_frame": 4}},
            }
        )
    for part in ("'vis_processor'", "'chatbridge_audio_trian'", "preprocess.audio_processor.test", "'num_frames'"):
        assert part in str(caught.value)
