"""The built MULTIS is what training reads: the `multis` builder, the loader, one step of a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lavis_chatbridge.multis.build import build, load_settings
from tests.models.building import small_model

TALK = {
    "image": [("What is it?", "A ring."), ("Which colour?", "It is red.")],
    "video": [("What moves?", "A star moves.")],
    "audio": [("What do we hear?", "A bell rings.")],
    "video+audio": [("What is there?", "A square moves while a flute plays.")],
}


@pytest.fixture
def built(world: Path, tmp_path: Path) -> Path:
    lines = []
    for item in map(json.loads, (world / "items.jsonl").read_text().splitlines()):
        pairs = TALK["+".join(medium["type"] for medium in item["media"])]
        turns = [
            {"role": role, "text": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        lines.append(json.dumps({"id": item["id"], "media": item["media"], "turns": turns, "task": "conversation"}))
    (tmp_path / "chat.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "build.yaml").write_text(
        f"sources: [{{name: chat, samples: [chat.jsonl], media_root: {world}, licence: CC0}}]"
    )
    build(load_settings(tmp_path / "build.yaml"), tmp_path / "multis")
    return tmp_path / "multis"


def test_one_training_step_on_every_modality(built: Path, golden_dir: Path) -> None:
    assert len(take_steps(built, golden_dir, samples=8)) == 4, "image, video, audio, and video with audio"


def take_steps(built: Path, golden_dir: Path, samples: int, batches: int = 12) -> set[str]:
    """A training step of a small model on the first batch of each kind; returns the kinds."""
    from lavis.common.registry import registry

    from lavis_chatbridge.datasets import builders  # noqa: F401
    from lavis_chatbridge.datasets.loader import LoaderSettings, MixtureLoader

    section = {
        "parts": [],
        "data_root": str(built),
        "splits": {"train": "*/annotations.jsonl"},
        "vis_processor": {"train": {"name": "chatbridge_image_train", "image_size": 28}},
        "video_processor": {"train": {"name": "chatbridge_video_train", "image_size": 28, "num_frames": 2}},
        "audio_processor": {"train": {"name": "chatbridge_audio_train", "mel_bins": 32}},
    }
    groups = {"multis": registry.get_builder_class("multis")(section).build_datasets()["train"]}
    assert sum(map(len, groups["multis"].sources)) == samples
    loader = MixtureLoader(groups, LoaderSettings(batch_size=2, seed=0))
    model = small_model(golden_dir / "tokenizer").train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    seen = set()
    for batch in loader.batches(0, batches):
        assert not batch["skipped"]
        if batch["source"] in seen:
            continue
        seen.add(batch["source"])
        before = model.llama_proj.weight.detach().clone()
        output = model(batch)
        output["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
        assert torch.isfinite(output["loss"])
        assert output["target_tokens"] > 0
        assert not torch.equal(before, model.llama_proj.weight)
    return seen
