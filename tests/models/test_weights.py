"""``chatbridge weights``, and the shipped types: valid, and one downloaded by name into an empty cache and asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM, WhisperFeatureExtractor

from lavis_chatbridge import cli
from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.models import weights
from lavis_chatbridge.models.chatbridge import ChatBridge
from lavis_chatbridge.processors import load_processors
from tests.chat.building import png, sound, video
from tests.hub_server import HubServer, serving
from tests.models.encoders import architectures
from tests.models.folders import STYLES, write_folder

ASK = """
import json, sys
from lavis.models import load_model_and_preprocess
from omegaconf import OmegaConf
from lavis_chatbridge.processors import load_processors

model, vis, txt = load_model_and_preprocess("chatbridge", "small", is_eval=True)
own = load_processors(OmegaConf.load(model.default_config_path("small")).preprocess)
found = {"mean": vis["eval"].settings.mean, "rate": own["audio"]["eval"].settings.extractor["sampling_rate"]}
for modality, path in zip(("image", "video", "audio"), sys.argv[1:]):
    medium = own[modality]["eval"](path)
    batch = {modality: medium.unsqueeze(0) if modality != "audio" else [medium]}
    found[modality] = model.generate(batch, prompt="What is it?", max_length=3)
print("RESULT", json.dumps(found))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """Stand-ins of the parts of `small` with their real names, saved by transformers itself."""
    root = tmp_path_factory.mktemp("hub")
    architectures.vision("siglip", root / "google" / "siglip2-base-patch16-224")
    architectures.audio("whisper", root / "openai" / "whisper-small")
    folder = write_folder(root / "HuggingFaceTB" / "SmolLM2-360M-Instruct", STYLES["smollm2"])
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=440, **sizes)).save_pretrained(folder)
    with serving(root) as server:
        yield server


def test_a_shipped_type_from_an_empty_cache_answers_about_every_modality(hub: HubServer, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CHATBRIDGE_WEIGHTS"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}

    def run(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = run("-m", "lavis_chatbridge.cli", "weights", "list", "--model-type", "small")
    assert listed.count("  to fetch ") == 3
    run("-m", "lavis_chatbridge.cli", "weights", "download", "small")
    assert hub.downloads().count("model.safetensors") == 3
    environment["HF_HUB_OFFLINE"] = "1"
    assert run("-m", "lavis_chatbridge.cli", "weights", "list", "--model-type", "small").count("  cached ") == 3

    media = {tmp_path / "a.png": png(), tmp_path / "a.mp4": video(), tmp_path / "a.wav": sound()}
    for path, content in media.items():
        path.write_bytes(content)
    printed = run("-c", ASK, *map(str, media))
    found = json.loads(printed.rpartition("RESULT ")[2])
    assert found["mean"] == [0.5] * 3
    assert found["rate"] == 16_000
    assert all(isinstance(found[modality][0], str) for modality in ("image", "video", "audio"))


def test_list_says_where_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("CHATBRIDGE_WEIGHTS", str(tmp_path))
    (tmp_path / "eva_vit_g.pth").write_bytes(b"x" * 2048)
    assert cli.main(["weights", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}\n" in printed for name in ("tiny", "small", "qwen3_8b", "vicuna7b", "vicuna13b"))
    assert cli.main(["weights", "list", "--model-type", "tiny"]) == 0
    assert capsys.readouterr().out.count("  local ") == 4
    assert cli.main(["weights", "list", "--model-type", "vicuna13b", "--json"]) == 1
    rows = {row["setting"]: row for row in json.loads(capsys.readouterr().out)["vicuna13b"]}
    assert (rows["model.vision.weights"]["state"], rows["model.vision.weights"]["size"]) == ("local", 2048)
    assert rows["model.audio.weights"]["state"] == "missing"
    changed = tmp_path / "changed.yaml"
    changed.write_text("model: {vision: {weights: /no/such/file}, audio: {weights: null}}")
    assert cli.main(["weights", "list", "--cfg-path", str(changed)]) == 1
    printed = capsys.readouterr().out
    assert "missing  model.vision.weights: /no/such/file does not exist" in printed
    assert "model.audio.weights" not in printed


def test_download_needs_a_known_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["weights", "download", "tiny"]) == 0
    assert "model.checkpoint" in capsys.readouterr().out
    assert cli.main(["weights", "download"]) == 2
    assert cli.main(["weights", "download", "huge"]) == 2
    assert "unknown model type 'huge'; known are qwen3_8b, small, tiny" in capsys.readouterr().err
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "model.safetensors").touch()
    step = tmp_path / "step", tmp_path / "step" / "model.safetensors"
    for wrong, words in ((tmp_path, "no config.yaml in the"), *((path, "set model.checkpoint=") for path in step)):
        assert cli.main(["weights", "download", str(wrong)]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("model_type", weights.model_types())
def test_a_shipped_type_is_valid(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of published parts, image size, mean, sample rate and extractor are those of the encoders' folders."""
    monkeypatch.setenv("CHATBRIDGE_WEIGHTS", str(tmp_path))
    whole = OmegaConf.load(weights.config_path(model_type))
    settings = ChatBridge.check_config(whole.model)
    published, size = settings.vision.encoder == "transformers", settings.vision.image_size
    if published:
        size = 384
        vision, audio = (tmp_path / str(part.weights).rpartition("/")[2] for part in (settings.vision, settings.audio))
        vision.mkdir()
        (vision / "preprocessor_config.json").write_text('{"size": {"height": 384}, "image_mean": [0.5, 0.5, 0.5]}')
        WhisperFeatureExtractor().save_pretrained(audio)
    processors = load_processors(whole.preprocess)
    for split in ("train", "eval"):
        frames, sound = (processors[modality][split].settings for modality in ("video", "audio"))
        assert frames.image_size == processors["image"][split].settings.image_size == size
        if published:
            assert (settings.template, settings.temporal_positions.frames) == ("tokenizer", frames.num_frames)  # type: ignore[union-attr]
            assert (sound.extractor["sampling_rate"], sound.clip_seconds, sound.max_clips) == (16_000, 30.0, 2)
        else:
            assert sound.mel_bins == 64


def test_all_missing_weights_are_named_before_the_model_is_built() -> None:
    parts = {part: {"weights": f"/no/{part}"} for part in ("vision", "audio", "perceiver", "language_model")}
    parts["audio"]["weights"] = "/no/audio/BEATs.pt"
    with pytest.raises(CheckpointError, match=r"BEATs is published by https://") as caught:
        ChatBridge.from_config(parts)
    assert all(f"model.{part}.weights: /no/{part}" in str(caught.value) for part in parts)
    assert "\n" not in str(caught.value)
