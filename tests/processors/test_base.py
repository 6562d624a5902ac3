"""Processors are LAVIS's, come from a ``preprocess`` section, and take settings from their encoder's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor
from omegaconf import OmegaConf

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.processors import ImageEvalProcessor, load_processors
from lavis_chatbridge.processors.base import settings_for


@pytest.mark.parametrize(
    ("encoder", "files", "expected"),
    [
        ({"encoder": "eva", "image_size": 364}, {}, {"image_size": 364}),
        (
            {"encoder": "transformers"},
            {"config": {}, "preprocessor_config": {"size": {"height": 384, "width": 384}, "image_mean": [0.5] * 3}},
            {"image_size": 384, "mean": [0.5] * 3},
        ),
        (
            {"encoder": "timm"},
            {"config": {"pretrained_cfg": {"input_size": [3, 240, 240], "mean": [0.1] * 3, "std": [0.2] * 3}}},
            {"image_size": 240, "mean": [0.1] * 3, "std": [0.2] * 3},
        ),
        ({"encoder": "timm", "name": "vit_base_patch16_siglip_224"}, {}, {"image_size": 224, "mean": [0.5] * 3}),
        ({"encoder": "my_encoders:colour"}, {}, {}),
    ],
)
def test_settings_for_vision(encoder: dict[str, Any], files: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    for name, values in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
        encoder = {**encoder, "weights": str(tmp_path)}
    found = settings_for(encoder, "vision")
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
