"""A language model's folder: what loading takes of it, and every fault that names, files and tensors show."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lavis_chatbridge import cli
from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.models import hub_folder, shapes
from lavis_chatbridge.models.language_model import load_language_model
from lavis_chatbridge.models.settings import LanguageModelSettings
from tests.models.test_delta import CONFIGS, LAYOUTS, SIZES, llama, write

CONFIG = CONFIGS["v1.1"]
TENSORS = llama(0, **CONFIG)
UP = "model.layers.1.mlp.up_proj.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture
def make(golden_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    def made(layout: str = "sharded safetensors", tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
        place = tmp_path / f"m{len(list(tmp_path.iterdir()))}"
        return write(place, golden_dir / "tokenizer", tensors or TENSORS, layout, {**CONFIG, **config})

    return made


def loads(folder: Path) -> bool:
    try:
        load_language_model(LanguageModelSettings(weights=str(folder)))
    except CheckpointError:
        return False
    return True


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_whole_folder_is_described(make: Callable[..., Path], layout: str, capsys: pytest.CaptureFixture) -> None:
    folder = make(layout, {**TENSORS, "model.mm_projector.weight": torch.ones(2, 2)})
    assert cli.main(["weights", "check", str(folder)]) == 0
    printed = capsys.readouterr().out
    constants = 2 if "bin" in layout else 0
    numbers = sum(t.numel() for t in TENSORS.values()) + 4 + 4 * constants
    floats = "" if not constants else f", {1 + constants} float32"
    assert "a whole language model (Hugging Face folder)" in printed
    assert f"{22 + constants} tensors, {numbers:,} numbers, 21 float16{floats or ', 1 float32'}" in printed
    assert "not used: model.mm_projector.weight\n" in printed
    assert loads(folder)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def shard(folder: Path) -> Path:
    return sorted([*folder.glob("*-00002-of-00002.safetensors"), *folder.glob("*-00002-of-00002.bin")])[0]


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(shard(folder))
    del tensors[UP]
    save_file(tensors, shard(folder), {"format": "pt"})


def index(content: Any) -> Callable[[Path], Any]:
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda folder: next(folder.glob("*.index.json")).write_text(text)


def config(content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "config.json").write_text(content)


FAULTS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a part cut off": ("sharded safetensors", lambda f: cut(shard(f)), "00002.safetensors cannot be read .*cut off"),
    "a part in torch's format cut off": ("sharded bin", lambda f: cut(shard(f)), "00002.bin cannot be read .*cut off"),
    "a missing part": ("sharded bin", lambda f: shard(f).unlink(), "lacks pytorch_model-00002-of-00002.bin, which"),
    "a part without one tensor": ("sharded safetensors", without_a_tensor, f"lack tensors of .*index.json: {UP}$"),
    "a pointer": ("safetensors", lambda f: (f / "model.safetensors").write_bytes(POINTER), "Git LFS pointer"),
    "an empty file": ("safetensors", lambda f: (f / "model.safetensors").write_bytes(b""), "is empty"),
    "a pointer for a tokenizer": (
        "bin",
        lambda f: (f / "tokenizer.model").write_bytes(POINTER),
        "r.model is a Git LFS",
    ),
    "no tokenizer": ("bin", lambda f: [t.unlink() for t in f.glob("tokenizer*")], "holds no tokenizer"),
    "a link to nothing": (
        "safetensors",
        lambda f: ((f / "model.safetensors").unlink(), os.symlink("gone", f / "model.safetensors")),
        "holds no weights",
    ),
    "other files of torch only": ("bin", lambda f: (f / "pytorch_model.bin").rename(f / "optimizer.bin"), "no weights"),
    "an index without files": ("sharded safetensors", index({"weight_map": {}}), "names no files by tensor"),
    "an index of numbers": ("sharded safetensors", index({"weight_map": {"a": 3}}), "names no files by tensor"),
    "an index of lists": ("sharded safetensors", index({"weight_map": {"a": ["b"]}}), "names no files by tensor"),
    "an index that is a list": ("sharded safetensors", index([]), "names no files by tensor"),
    "an endless index": ("sharded safetensors", index("[" * 100_000), "index.json cannot be read"),
    "an endless configuration": ("safetensors", config("[" * 100_000), "config.json cannot be read"),
    "a configuration that is a list": ("safetensors", config("[]"), "config.json holds no object"),
    "an unknown family": ("safetensors", config('{"model_type": "nope"}'), "names the model_type 'nope', which is no"),
    "a configuration without sizes": ("safetensors", config('{"model_type": "llama"}'), "lacks a size.*hidden_size"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_faults_of_files_are_named(make: Callable[..., Path], what: str, capsys: pytest.CaptureFixture) -> None:
    layout, spoil, message = FAULTS[what]
    folder = make(layout)
    assert cli.main(["weights", "check", str(folder)]) == 0
    capsys.readouterr()
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        hub_folder.check(folder)
    assert cli.main(["weights", "check", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "whole" not in printed


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.full((48, 32), float("nan")), f"holds NaN or infinity in {UP}"),
        (torch.ones(3, 3), rf"{UP} is \[3, 3\], expected \[48, 32\]"),
        (torch.ones(48, 32, dtype=torch.int8), f"{UP} is int8, expected real numbers"),
        (torch.ones(48, 32).to(torch.float8_e4m3fn), f"holds other than plain tensors .*{UP}"),
    ],
)
def test_faults_of_tensors_are_named(make: Callable[..., Path], tensor: Tensor, message: str) -> None:
    folder = make("safetensors", {**TENSORS, UP: tensor})
    assert hub_folder.fault(folder) == "", "names alone do not tell"
    with pytest.raises(CheckpointError, match=message):
        hub_folder.check(folder)


def test_a_head_of_its_own_is_needed_unless_it_is_tied(make: Callable[..., Path]) -> None:
    headless = {name: tensor for name, tensor in TENSORS.items() if name != "lm_head.weight"}
    folder = make("safetensors", headless)
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight$"):
        hub_folder.check(folder)
    assert not loads(folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "tie_word_embeddings": True}))
    hub_folder.check(folder)
    assert loads(folder)


def test_what_loading_does_not_look_at_is_no_fault(make: Callable[..., Path]) -> None:
    """A repository may hold its weights twice, and only one copy be fetched with both indexes."""
    folder = make("safetensors")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "gone.bin"}}))
    os.symlink("gone", folder / "other.safetensors")
    (folder / "a.safetensors").mkdir()
    (folder / "training_args.bin").write_bytes(b"code")
    assert hub_folder.weight_files(folder) == [folder / "model.safetensors"]
    hub_folder.check(folder)
    assert loads(folder)
    bare = {name.removeprefix("model."): tensor for name, tensor in TENSORS.items()}
    hub_folder.check(make("safetensors", bare))


def test_other_families_and_quantised_ones_are_judged_by_their_files(
    make: Callable[..., Path], golden_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "gpt2"
    shutil.copytree(golden_dir / "tokenizer", folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=640, n_embd=32, n_layer=1, n_head=2)).save_pretrained(folder)
    assert hub_folder.check(folder).unused == []
    cut(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="cut off"):
        hub_folder.check(folder)
    packed = {**TENSORS, UP: torch.ones(768, 1, dtype=torch.uint8)}
    hub_folder.check(make("safetensors", packed, quantization_config={"quant_method": "bitsandbytes"}))


def test_the_configuration_of_the_text_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 1, "text_config": {"hidden_size": 2}}))
    assert hub_folder.config_of(tmp_path) == {"hidden_size": 2}
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 1, "text_config": 2}))
    with pytest.raises(CheckpointError, match="holds no object"):
        hub_folder.config_of(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
        {"head_dim": 16, "tie_word_embeddings": True},
    ],
)
def test_the_names_and_shapes_of_a_llama_are_those_of_transformers(changes: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {**SIZES, "num_hidden_layers": 3}
    config = LlamaConfig(**sizes, vocab_size=70, **changes)
    found = {name: tensor.shape for name, tensor in shapes.llama_shapes(config.to_dict()).items()}
    real = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    if changes.get("tie_word_embeddings"):
        del real["lm_head.weight"]
    assert found == real


@pytest.mark.parametrize("changes", [{"hidden_size": "x"}, {"num_attention_heads": 0}, {"vocab_size": 10**18}])
def test_sizes_that_no_llama_has(changes: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {**SIZES, "num_hidden_layers": 3}
    with pytest.raises(CheckpointError, match=r"a LLaMA's config\.json"):
        shapes.llama_shapes({**sizes, "vocab_size": 70, **changes})
