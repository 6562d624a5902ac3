"""``chatbridge convert``: a run's folder, a Hugging Face folder and the original's checkpoint hold the same tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from lavis_chatbridge import cli
from lavis_chatbridge.hf import ChatBridgeForConditionalGeneration
from lavis_chatbridge.models import state_dicts


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
    assert convert(tmp_path, "a.pth", "x") == 2, "a file needs its model type"
    assert convert(tmp_path, "hf", "run", "--to", "run") == 2, "nothing is replaced"


def test_the_released_layout_comes_back(tmp_path: Path, golden_dir: Path) -> None:
    tensors = state_dicts.read(golden_dir / "chatbridge_state.safetensors").tensors
    torch.save({"model": tensors}, tmp_path / "released.pth")
    assert convert(tmp_path, "released.pth", "hf", "--model-type", "vicuna13b") == 0
    assert convert(tmp_path, "hf", "back.pth", "--to", "original") == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_its_help_imports_nothing_slow() -> None:
    code = "import sys; from lavis_chatbridge import cli; cli.main(['convert', '--help']); print(sorted(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--model-type" in printed
    assert not [name for name in ("torch", "transformers", "lavis") if f"'{name}'" in printed]
