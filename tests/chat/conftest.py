"""A small model, and a folder with media and a YAML for tests of commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lavis_chatbridge.chat import Session
from tests.chat.building import picture, sound, video
from tests.models.building import small_model


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> Any:
    return small_model(golden_dir / "tokenizer")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    (folder / "small.yaml").write_text("model: {model_type: tiny, checkpoint: null}")
    Image.fromarray(picture()).save(folder / "a b.png")
    (folder / "c.wav").write_bytes(sound())
    (folder / "d.mp4").write_bytes(video("nothing"))
    (folder / "e.mp4").write_bytes(video())
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def opened(files: Path) -> Session:
    return Session.open(files / "small.yaml", device="cpu")
