"""A small model, a folder with media, and a YAML of such a model for tests of commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lavis_chatbridge.chat import Session
from tests.chat.building import TINY_TOKENIZER, picture, sound, video
from tests.models.building import small_model

LLM = {"model_type": "llama", "vocab_size": 640, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SMALL: dict[str, Any] = {
    "model": {
        "arch": "chatbridge",
        "model_type": "tiny",
        "vision": {"weights": None, "image_size": 28, "width": 32, "depth": 1, "heads": 4},
        "audio": {"weights": None},
        "perceiver": {"width": 32, "layers": 2, "feed_forward": 48, "queries": 3},
        "language_model": {
            "weights": None,
            "tokenizer": str(TINY_TOKENIZER),
            "config": {**LLM, "num_hidden_layers": 2},
        },
        "checkpoint": None,
    },
    "preprocess": {"vis_processor": {"eval": {"image_size": 28}}, "video_processor": {"eval": {"image_size": 28}}},
}


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> Any:
    """The small model of ``tests/models``."""
    return small_model(golden_dir / "tokenizer")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    Image.fromarray(picture()).save(folder / "a b.png")
    (folder / "c.wav").write_bytes(sound())
    (folder / "d.mp4").write_bytes(video("nothing"))
    (folder / "e.mp4").write_bytes(video())
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def opened(files: Path) -> Session:
    """A session with the YAML's model."""
    return Session.open(files / "small.yaml", device="cpu")
