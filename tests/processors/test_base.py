"""Processors take what their encoder needs from the encoder's own configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor
from omegaconf import OmegaConf

from lavis_chatbridge.errors import ConfigError, TooShortError
from lavis_chatbridge.processors import AudioEvalProcessor, ImageEvalProcessor, load_processors
from lavis_chatbridge.processors.base import settings_for

RATE = 16_000


def folder(path: Path, **content: Any) -> str:
    path.mkdir(parents=True, exist_ok=True)
    for name, values in content.items():
        (path / f"{name}.json").write_text(json.dumps(values))
    return str(path)


def whisper(path: Path, seconds: int = 2) -> dict[str, Any]:
    from transformers import WhisperFeatureExtractor

    WhisperFeatureExtractor(feature_size=80, chunk_length=seconds).save_pretrained(path)
    return {"encoder": "transformers", "weights": folder(path, config={})}


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
    weights = {"weights": folder(tmp_path, **files)} if files else {}
    found = settings_for({**encoder, **weights}, "vision")
    assert expected.items() <= found.items() if expected else found == {}


def test_settings_for_audio(tmp_path: Path) -> None:
    assert settings_for({"weights": "beats.pt"}, "audio") == {}
    found = settings_for(whisper(tmp_path), "audio")
    assert (found["clip_seconds"], found["extractor"]["sampling_rate"]) == (2.0, RATE)
    ast = {"feature_extractor_type": "ASTFeatureExtractor", "max_length": 1024, "sampling_rate": RATE}
    wave = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": RATE}
    for name, values, seconds in (("ast", ast, 10.24), ("wave", wave, 10.0), ("clap", {"max_length_s": 7}, 7.0)):
        place = folder(tmp_path / name, config={}, preprocessor_config=values)
        assert settings_for({"encoder": "transformers", "weights": place}, "audio")["clip_seconds"] == seconds


def test_the_link_in_a_yaml_follows_the_model(tmp_path: Path) -> None:
    """Settings of the processor itself come first; the cache key changes with the encoder's."""
    section = {"eval": {"name": "chatbridge_image_eval", "encoder": "${model.vision}"}}
    whole = OmegaConf.create({"model": {"vision": {"image_size": 112}}, "preprocess": {"vis_processor": section}})
    small = load_processors(whole.preprocess)["image"]["eval"]
    assert small.settings.image_size == 112
    whole.model.vision.image_size = 56
    assert load_processors(whole.preprocess)["image"]["eval"].version != small.version
    own = ImageEvalProcessor.from_config({"encoder": {"image_size": 112}, "image_size": 28})
    assert own.settings.image_size == 28


def test_clips_of_whisper(tmp_path: Path) -> None:
    link = {"encoder": whisper(tmp_path), "max_clips": 2}
    processor = AudioEvalProcessor.from_config(link)
    sound = np.sin(np.arange(int(2.5 * RATE)) / 9).astype(np.float32)
    clips = processor((sound, RATE))
    assert clips.fbank.shape == (2, 80, 200)
    assert clips.frames.tolist() == [200, 50]
    torch.testing.assert_close(clips.fbank[0], processor((sound[: 2 * RATE], RATE)).fbank[0])
    assert len(processor((sound[: int(2.05 * RATE)], RATE)).fbank) == 1  # 50 ms make no clip of their own
    long = np.random.default_rng(0).standard_normal(9 * RATE).astype(np.float32) / 9
    assert len(processor((long, RATE)).fbank) == 2
    with pytest.raises(TooShortError, match="less than 25 ms"):
        processor((sound[:100], RATE))


def test_waveforms_are_padded_behind_the_sound() -> None:
    extractor = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": RATE, "padding_value": 0.0}
    processor = AudioEvalProcessor.from_config({"extractor": extractor, "clip_seconds": 1})
    clips = processor((np.ones(int(1.5 * RATE), np.float32), RATE))
    assert clips.fbank.shape == (2, RATE)
    assert clips.frames.tolist() == [RATE, RATE // 2]
    assert not clips.fbank[1, RATE // 2 :].any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"extractor": {}}, "extractor has no sampling_rate"),
        ({"clip_seconds": 0.01}, "clip_seconds is 0.01, expected at least 0.1"),
        ({"extractor": {"sampling_rate": RATE, "feature_extractor_type": "NoExtractor"}}, "no feature extractor"),
    ],
)
def test_refusals(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AudioEvalProcessor.from_config(settings)((np.ones(RATE, np.float32), RATE))


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
