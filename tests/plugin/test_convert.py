"""``chatbridge convert``: a run, a Hugging Face folder, the original's checkpoint and a file of the bridge."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lavis_chatbridge import cli
from lavis_chatbridge.hf import ChatBridgeConfig, ChatBridgeForConditionalGeneration
from lavis_chatbridge.models import state_dicts

GOLDEN = """
model:
  vision: {width: 48, heads: 4}
  perceiver: {width: 64, layers: 4, heads: 4, feed_forward: 160, queries: 8}
  language_model: {config: {hidden_size: 80}, tokenizer: "package:assets/tiny/llm"}
"""


def convert(folder: Path, source: str, out: str, *more: str) -> int:
    return cli.main(["convert", str(folder / source), str(folder / out), *more])


def test_the_three_forms_hold_the_same_tensors(tmp_path: Path) -> None:
    model = ChatBridgeForConditionalGeneration.from_pretrained("tiny")
    model.save_pretrained(tmp_path / "hf")
    assert convert(tmp_path, "hf", "run", "--to", "run") == 0
    assert convert(tmp_path, "run", "a.pth", "--to", "original") == 0
    assert convert(tmp_path, "a.pth", "hf2", "--model-type", "tiny") == 0
    kept = [state_dicts.read(tmp_path / name).tensors for name in ("hf", "run", "a.pth", "hf2")]
    for tensors in kept[1:]:
        assert tensors.keys() == kept[0].keys()
        assert all(torch.equal(tensors[name], kept[0][name]) for name in tensors)
    for name in ("run", "hf2"):
        again = ChatBridgeForConditionalGeneration.from_pretrained(tmp_path / name).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_the_released_layout_comes_back(tmp_path: Path, golden_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = state_dicts.read(golden_dir / "chatbridge_state.safetensors").tensors
    torch.save({"model": tensors}, tmp_path / "released.pth")
    assert convert(tmp_path, "released.pth", "hf", "--model-type", "vicuna13b") == 2
    assert "does not fit model type vicuna13b: missing: Qformer.bert.encoder.layer.4" in capsys.readouterr().err
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.yaml").write_text(GOLDEN)
    assert convert(tmp_path, "released.pth", "hf", "--model-type", str(tmp_path / "own")) == 0
    assert convert(tmp_path, "hf", "back.pth", "--to", "original") == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ChatBridgeForConditionalGeneration.from_pretrained("tiny").save_pretrained(tmp_path / "hf")
    for form in ("huggingface", "run", "original", "bridge"):
        allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300 << 10, allowed[1]))
        try:
            assert convert(tmp_path, "hf", "out", "--to", form) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
        assert re.fullmatch(rf"error: cannot (read or )?write {tmp_path}/out: .*\n", capsys.readouterr().err)
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_references_by_an_unset_variable_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHATBRIDGE_WEIGHTS", raising=False)
    config, _ = ChatBridgeConfig.find("vicuna13b")
    saved = config.with_references(tmp_path, config.settings())
    assert saved.model["language_model"]["weights"] == ["$CHATBRIDGE_WEIGHTS/vicuna-13b", "lmsys/vicuna-13b-v1.5"]


def test_a_runs_folder_gets_the_frozen_norm_of_blip2(tmp_path: Path) -> None:
    ChatBridgeForConditionalGeneration.from_pretrained("tiny").save_pretrained(tmp_path / "hf")
    assert convert(tmp_path, "hf", "run", "--to", "run") == 0
    tensors = state_dicts.read(tmp_path / "run").tensors
    norm = {name: tensors.pop(name) + 1 for name in ("ln_vision.weight", "ln_vision.bias")}
    state_dicts.save(tmp_path / "blip2.safetensors", norm)
    state_dicts.save(tmp_path / "run" / "model.safetensors", tensors)  # as training writes it
    config = OmegaConf.load(tmp_path / "run" / "config.yaml")
    config.model.perceiver.weights = str(tmp_path / "blip2.safetensors")
    OmegaConf.save(config, tmp_path / "run" / "config.yaml")
    assert convert(tmp_path, "run", "again") == 0
    again = state_dicts.read(tmp_path / "again").tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in norm.items())


def test_the_bridge_is_kept_without_frozen_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ChatBridgeForConditionalGeneration.from_pretrained("tiny").save_pretrained(tmp_path / "hf")
    bridge = state_dicts.read(tmp_path / "hf").tensors
    frozen = {"visual_encoder.cls_token": torch.ones(1, 1, 32), "llama_model.lm_head.weight": torch.ones(3)}
    old = {**bridge, **frozen, "Qformer.bert.embeddings.position_ids": torch.ones(1, 4)}
    old["query_tokens"] = old.pop("image_query_tokens")
    torch.save({"model": {f"module.{n}": t for n, t in old.items()}, "config": {"a": 1}}, tmp_path / "a.pth")
    assert convert(tmp_path, "a.pth", "new/b.safetensors", "--to", "bridge") == 0
    made = state_dicts.read(tmp_path / "new" / "b.safetensors").tensors
    assert made.keys() == bridge.keys() > {"ln_vision.weight"}
    assert all(torch.equal(made[name], bridge[name]) for name in bridge)
    state_dicts.save(tmp_path / "step" / "model.safetensors", bridge, {"lora": "rank 2"})
    assert convert(tmp_path, "step", "c.safetensors", "--to", "bridge") == 0
    assert state_dicts.read(tmp_path / "c.safetensors").cfg == {"lora": "rank 2"}
    torch.save({"cls_token": torch.ones(1)}, tmp_path / "eva.pth")
    for words, *arguments in (
        ("is not a ChatBridge", "eva.pth", "d", "--to", "bridge"),
        ("c.safetensors exists", "a.pth", "c.safetensors", "--to", "bridge"),
        ("pass its --model-type", "a.pth", "d"),
    ):
        assert convert(tmp_path, *arguments) == 2
        assert words in capsys.readouterr().err
