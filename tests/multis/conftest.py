"""Media of the embedded world with captions for the first stage, and a server that answers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from lavis_chatbridge.prompting.conversation import MODALITIES
from lavis_chatbridge.toyworld import language
from lavis_chatbridge.toyworld.build import Sizes, plan, render
from tests.multis.openai_server import OpenAIServer


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``items.jsonl``: two images, two videos, two sounds, and two videos with a sound."""
    folder = tmp_path_factory.mktemp("world")
    files = plan(Sizes(images=2, videos=4, sounds=4, test=0, heldout=0, joint=0), seed=3)[0]
    for file in files:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.path).write_bytes(render(file, seed=3))
    by_modality = {m: [file for file in files if file.scene.modality == m] for m in MODALITIES}

    def said(file) -> list[str]:
        rng = random.Random(file.path)
        return list(dict.fromkeys(language.caption(file.scene, rng) for _ in range(3)))

    items = []
    for modality, (first, second, *_) in by_modality.items():
        for file in (first, second):
            medium = {"type": modality, "path": file.path}
            items.append({"id": Path(file.path).stem + modality, "media": [medium], "captions": said(file)})
    for number, (clip, sound) in enumerate(zip(by_modality["video"][2:], by_modality["audio"][2:], strict=True)):
        media = [{"type": "video", "path": clip.path}, {"type": "audio", "path": sound.path}]
        items.append({"id": f"both{number}", "media": media, "captions": said(clip), "sound_captions": said(sound)})
    lines = [json.dumps({**item, "source": "world", "licence": "CC0"}) for item in items]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    """A server that always answers."""
    with OpenAIServer() as running:
        yield running
