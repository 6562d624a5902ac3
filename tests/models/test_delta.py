"""Vicuna in each form that it is published in: whole ones load, a delta is refused, and its sum with a LLaMA loads."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lavis_chatbridge import cli
from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.models import delta, hub_folder
from lavis_chatbridge.models.language_model import load_language_model
from lavis_chatbridge.models.settings import LanguageModelSettings

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PAD = {"vocab_size": 641, "pad_token_id": 0}  # v0 has a padding token behind the tokenizer's pieces
CONFIGS: dict[str, dict[str, Any]] = {
    "v0": {**PAD, "max_position_embeddings": 2048, "max_sequence_length": 2048, "transformers_version": "4.28.0.dev0"},
    "v1.1": {"vocab_size": 640, "max_position_embeddings": 2048, "transformers_version": "4.28.1"},
    "v1.5": {
        "vocab_size": 640,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "transformers_version": "4.31.0",
    },
}
LAYOUTS = ("bin", "sharded bin", "safetensors", "sharded safetensors")


def llama(seed: int, **config: Any) -> dict[str, Tensor]:
    """A LLaMA's tensors in float16; its norms are not all one."""
    torch.manual_seed(seed)
    tensors = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=config["vocab_size"])).state_dict()
    return {n: (t + 0.3 * torch.rand(t.shape) if "norm" in n else t).half() for n, t in tensors.items()}


def write(folder: Path, tokenizer: Path, tensors: Mapping[str, Tensor], layout: str, config: Mapping[str, Any]) -> Path:
    """A Hugging Face folder as published."""
    shutil.copytree(tokenizer, folder)
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        **SIZES,
        **config,
    }
    described |= {"bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps({"_name_or_path": "vicuna-13b", "rms_norm_eps": 1e-6, **described}))
    sampling = {"do_sample": True, "temperature": 0.9, "top_p": 0.6, "max_length": 4096, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True, **sampling}))
    if config["vocab_size"] > 640:
        (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": 640}))
    stem, suffix = ("model", "safetensors") if "safetensors" in layout else ("pytorch_model", "bin")
    kept = dict(tensors)
    if suffix == "bin":  # files of that time hold this constant too
        kept |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    names = [list(kept)[:7], list(kept)[7:]] if "sharded" in layout else [list(kept)]
    files = [f"{stem}-{i:05d}-of-00002.{suffix}" for i in (1, 2)] if "sharded" in layout else [f"{stem}.{suffix}"]
    for file, part in zip(files, names, strict=True):
        content = {name: kept[name] for name in part}
        save_file(content, folder / file, {"format": "pt"}) if suffix != "bin" else torch.save(content, folder / file)
    if "sharded" in layout:
        places = {name: file for file, part in zip(files, names, strict=True) for name in part}
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("version", CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_version_loads_whole_from_every_layout(
    golden_dir: Path, tmp_path: Path, version: str, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIGS[version]
    tensors = llama(0, **config)
    folder = write(tmp_path / "vicuna", golden_dir / "tokenizer", tensors, layout, config)
    assert hub_folder.fault(folder) == ""
    with caplog.at_level(logging.WARNING):
        model, codec = load_language_model(LanguageModelSettings(weights=str(folder), dtype="float16"))
    assert not [record for record in caplog.records if record.name.startswith("lavis_chatbridge")]
    found = model.state_dict()
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert (len(codec), codec.bos_id, codec.eos_id) == (640, 1, 2)
    assert codec.decode(codec.encode("###Human: what is it?")) == "###Human: what is it?"
    assert model.generation_config.do_sample is not True
    assert model.generation_config.max_length != 4096


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_delta_is_refused_and_the_sum_loads(
    golden_dir: Path, tmp_path: Path, layout: str, capsys: pytest.CaptureFixture
) -> None:
    base = llama(0, **PAD)
    torch.manual_seed(1)
    change = {name: (0.01 * torch.randn(tensor.shape)).half() for name, tensor in base.items()}
    folder = write(tmp_path / "vicuna-13b", golden_dir / "tokenizer", change, layout, CONFIGS["v0"])
    with pytest.raises(
        CheckpointError, match=r"holds delta weights.*0\.00\d+ on average.*docs/weights.md.*apply_delta"
    ):
        load_language_model(LanguageModelSettings(weights=str(folder)))
    assert cli.main(["weights", "check", str(folder)]) == 1
    assert "holds delta weights" in capsys.readouterr().out
    whole = {name: tensor + change[name] for name, tensor in base.items()}
    added = write(tmp_path / "sum", golden_dir / "tokenizer", whole, layout, CONFIGS["v0"])
    assert cli.main(["weights", "check", str(added)]) == 0
    load_language_model(LanguageModelSettings(weights=str(added)))


def test_the_name_of_a_delta_is_told_where_the_weights_do_not_tell(
    golden_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = llama(0, vocab_size=640)
    folder = write(tmp_path / "Vicuna-Delta", golden_dir / "tokenizer", tensors, "bin", CONFIGS["v1.1"])
    assert delta.named(folder) == "Vicuna-Delta"
    load_language_model(LanguageModelSettings(weights=str(folder)))
    assert "Vicuna-Delta is the name of a delta" in caplog.text
    config = {**CONFIGS["v1.1"], "_name_or_path": "lmsys/vicuna-13b-delta-v1.1"}
    renamed = write(tmp_path / "b", golden_dir / "tokenizer", tensors, "bin", config)
    assert delta.named(renamed) == "lmsys/vicuna-13b-delta-v1.1"
    assert delta.named(golden_dir / "tokenizer") == ""


def test_what_is_no_llama_or_cannot_be_read_is_left_to_loading(golden_dir: Path, tmp_path: Path) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in llama(0, vocab_size=640).items()}
    other = {**CONFIGS["v1.1"], "model_type": "gemma"}  # its norms are kept as the difference to one
    folder = write(tmp_path / "gemma", golden_dir / "tokenizer", zeros, "safetensors", other)
    assert delta.fault(folder) == ""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "delta" in delta.fault(folder)
    save_file({"norm.weight": torch.full((32,), 0.05)}, folder / "model.safetensors")
    assert "delta" in delta.fault(folder)
    save_file({"norm.weight": torch.full((32,), 0.5)}, folder / "model.safetensors")
    assert delta.fault(folder) == ""
    for content in (b"", b"not weights", b"{}"):
        (folder / "model.safetensors").write_bytes(content)
        assert delta.fault(folder) == ""
    (folder / "model.safetensors").unlink()
    for index in (
        "[",
        "{}",
        '{"weight_map": {"model.norm.weight": 3}}',
        '{"weight_map": {"model.norm.weight": "gone"}}',
    ):
        (folder / "model.safetensors.index.json").write_text(index)
        assert delta.fault(folder) == ""
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    assert delta.fault(folder) == ""
    torch.save({"model.norm.weight": torch.empty(32, device="meta")}, folder / "pytorch_model.bin")
    assert delta.fault(folder) == ""
    for config in ("[", "[]", "3"):
        (folder / "config.json").write_text(config)
        assert delta.fault(folder) == ""
