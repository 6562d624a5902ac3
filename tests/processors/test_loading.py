"""Processors come from LAVIS's registry and from a model's YAML, and name their version."""

from __future__ import annotations

import pytest
from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor
from omegaconf import OmegaConf

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.processors import load_processors

NAMES = [f"chatbridge_{modality}_{split}" for modality in ("image", "video", "audio") for split in ("train", "eval")]


@pytest.mark.parametrize("name", [*NAMES, "chatbridge_text"])
def test_registered_with_lavis(name: str) -> None:
    processor_class = registry.get_processor_class(name)
    assert issubclass(processor_class, BaseProcessor)
    for cfg in (None, {"name": name}, OmegaConf.create({"name": name})):
        assert processor_class.from_config(cfg).version == processor_class().version
    assert processor_class().version.startswith(name)


def test_load_processors() -> None:
    processors = load_processors(
        {
            "vis_processor": {"train": {"name": "chatbridge_image_train", "image_size": 56}},
            "video_processor": {"eval": {"image_size": 56, "num_frames": 2}},
            "text_processor": {"train": {"name": "chatbridge_text", "clean": "no"}, "eval": None},
        }
    )
    assert list(processors) == ["image", "video", "audio", "text"]
    image, video = processors["image"], processors["video"]
    assert (image["train"].settings.image_size, image["eval"].settings.image_size) == (56, 224)
    assert video["eval"].settings.num_frames == 2
    assert video["eval"].version != load_processors()["video"]["eval"].version
    assert processors["text"]["train"]("A  B") == "A  B"


@pytest.mark.parametrize("model_type", ["tiny", "vicuna7b"])
def test_lavis_finds_the_processors_of_a_model(model_type: str) -> None:
    """By `load_preprocess`, which `load_model_and_preprocess` calls."""
    from lavis.models import load_preprocess

    section = OmegaConf.load(registry.get_model_class("chatbridge").default_config_path(model_type)).preprocess
    own = load_processors(section)
    for found, modality in zip(load_preprocess(section), ("image", "text"), strict=True):
        assert [found[split].version for split in ("train", "eval")] == [
            own[modality][split].version for split in ("train", "eval")
        ]


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


def test_text() -> None:
    text = registry.get_processor_class("chatbridge_text")
    assert text()("A Dog - runs/jumps.\n") == "a dog runs jumps."
    assert text.from_config({"clean": "spaces"})("  A \n Dog ") == "A Dog"
