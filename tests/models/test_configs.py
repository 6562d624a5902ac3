"""The shipped model types: their YAMLs are valid, and say what is missing in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from transformers import WhisperFeatureExtractor

from lavis_chatbridge.models.chatbridge import ChatBridge
from lavis_chatbridge.processors import load_processors

EVA = ("tiny", "vicuna7b", "vicuna13b")


def section(model_type: str, name: str) -> Any:
    return OmegaConf.load(ChatBridge.default_config_path(model_type))[name]


@pytest.mark.parametrize("model_type", EVA)
def test_every_type_is_valid(model_type: str) -> None:
    settings = ChatBridge.check_config(section(model_type, "model"))
    assert settings.model_type == model_type
    whole = OmegaConf.load(ChatBridge.default_config_path(model_type))
    processors = load_processors(whole.preprocess)
    for split in ("train", "eval"):
        assert processors["image"][split].settings.image_size == settings.vision.image_size
        assert processors["video"][split].settings.image_size == settings.vision.image_size
        assert processors["audio"][split].settings.mel_bins == 64


@pytest.mark.parametrize("model_type", ["small", "qwen3_8b"])
def test_types_of_published_parts_are_valid(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image size, mean, sample rate and extractor are those of the encoders' folders."""
    monkeypatch.setenv("CHATBRIDGE_WEIGHTS", str(tmp_path))
    whole = OmegaConf.load(ChatBridge.default_config_path(model_type))
    settings = ChatBridge.check_config(whole.model)
    assert settings.template == "tokenizer"
    vision, audio = (tmp_path / str(part.weights).rpartition("/")[2] for part in (settings.vision, settings.audio))
    vision.mkdir()
    (vision / "preprocessor_config.json").write_text('{"size": {"height": 384}, "image_mean": [0.5, 0.5, 0.5]}')
    WhisperFeatureExtractor().save_pretrained(audio)
    processors = load_processors(whole.preprocess)
    for split in ("train", "eval"):
        assert {processors[modality][split].settings.image_size for modality in ("image", "video")} == {384}
        assert processors["video"][split].settings.num_frames == settings.temporal_positions.frames  # type: ignore[union-attr]
        sound = processors["audio"][split].settings
        assert (sound.extractor["sampling_rate"], sound.clip_seconds, sound.max_clips) == (16_000, 30.0, 2)


def test_the_tiny_model_with_random_weights(golden_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its log says what it is."""
    sizes = {"model_type": "llama", "vocab_size": 640, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4}
    random = {
        "vision": {"weights": None},
        "audio": {"weights": None},
        "language_model": {"weights": None, "tokenizer": str(golden_dir / "tokenizer"), "config": sizes},
        "checkpoint": None,
    }
    model = ChatBridge.from_config(OmegaConf.merge(section("tiny", "model"), random))
    assert "knows nothing outside that world" in caplog.text
    assert model.image_query_tokens.shape == (1, 8, 128)
    assert model.visual_encoder.pos_embed.shape == (1, 17, 96)
