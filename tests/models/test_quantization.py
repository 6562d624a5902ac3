"""A language model really held in 8 and 4 bits by bitsandbytes, on a CPU: what it weighs, computes, and lets train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt, modules
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lavis_chatbridge.errors import CheckpointError, ConfigError
from lavis_chatbridge.media.source import AudioClips
from lavis_chatbridge.models import lora
from lavis_chatbridge.models.settings import LanguageModelSettings, LoraSettings
from lavis_chatbridge.prompting.conversation import alignment_prompt
from lavis_chatbridge.runners import checkpoints, distributed
from tests.models.building import TOKENIZER, small_model

LAYERS = 2
SIZES = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
BOTH = pytest.mark.parametrize("how", ["8bit", "4bit"])
SOUND = AudioClips(torch.randn(1, 48, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([48]))
SAMPLES = {
    "pieces": [alignment_prompt(["image"], "a red dog runs"), alignment_prompt(["audio"], "rain on a roof")],
    "image": [[torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(0))], []],
    "audio": [[], [SOUND]],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA as its makers publish one; some features are large, which LLM.int8 computes apart."""
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=LAYERS, initializer_range=0.06))
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[5] = 12.0
        layer.self_attn.v_proj.weight.data[3] *= 10
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


def bridge(folder: Path, how: Any, **more: Any) -> Any:
    own = LanguageModelSettings(weights=str(folder), tokenizer=str(TOKENIZER), quantization=how, **more)
    return small_model(language_model=own)


def frozen(model: Any) -> dict[str, Tensor]:
    """The language model's tensors: quantised codes, their scales and tables."""
    own = model.llama_model.state_dict()
    return {name: tensor.clone() for name, tensor in own.items() if not lora.is_adapter(name)}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def gradients(model: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(SAMPLES)["loss"]
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] for name in found} >= {"llama_proj", "Qformer", "image_query_tokens", "audio_trans"}
    return loss.item(), found


@pytest.mark.parametrize(("how", "dtype"), [("8bit", "float32"), ("8bit", "float16"), ("4bit", "float32")])
def test_loss_and_gradients_are_near_those_of_all_bits(folder: Path, monkeypatch: Any, how: Any, dtype: Any) -> None:
    monkeypatch.setattr("lavis_chatbridge.models.settings.slow_on_cpu", lambda dtype: False)
    plain, model = bridge(folder, None), bridge(folder, how, dtype=dtype)
    quantised = (Linear4bit, Linear8bitLt)
    assert sum(isinstance(layer, quantised) for layer in model.llama_model.modules()) == 7 * LAYERS
    (loss, expected), (own_loss, found) = gradients(plain), gradients(model)
    assert own_loss == pytest.approx(loss, rel=0.02)
    assert own_loss != loss
    assert found.keys() == expected.keys()
    ours, theirs = (torch.cat([t[name].flatten() for name in expected]) for t in (found, expected))
    assert (ours - theirs).norm() / theirs.norm() < (0.1 if how == "8bit" else 0.3)  # wrong scales give 1
    own, again, other = (checkpoints.frozen_hashes(m, []) for m in (model, bridge(folder, how), plain))
    assert own == again
    assert {part for part in own if own[part] != other[part]} == {"llama_model"}


def test_a_validation_leaves_gradients_whole_on_a_cpu_with_bf16(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes repacks 4-bit layers there as soon as they run without gradients, which they then no longer have."""
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    model = bridge(folder, "4bit")
    loss, expected = gradients(model)
    with torch.no_grad():
        assert model(SAMPLES)["loss"].item() == pytest.approx(loss, abs=1e-5)
    again, found = gradients(model)
    assert again == loss
    assert same(found, expected)


@BOTH
@pytest.mark.parametrize("adapters", [None, LoraSettings(rank=4, target_modules=("q_proj", "down_proj"))])
def test_training_lowers_the_loss_and_leaves_the_codes(folder: Path, how: Any, adapters: Any) -> None:
    model = bridge(folder, how, lora=adapters)
    before = frozen(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    beside = [name for name in trained if lora.is_adapter(name)]
    assert len(beside) == (0 if adapters is None else 2 * 2 * LAYERS)
    optimiser = torch.optim.AdamW(trained.values(), lr=5e-3, weight_decay=0)
    model.train()
    losses = []
    for step in range(6):
        optimiser.zero_grad()
        loss = model(SAMPLES)["loss"]
        loss.backward()
        if step == 1:  # A's gradient is zero until B has moved
            assert all(trained[name].grad.abs().max() > 0 for name in beside)
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert same(before, frozen(model))


@BOTH
def test_a_bridge_loads_into_any_precision(folder: Path, tmp_path: Path, how: Any) -> None:
    model = bridge(folder, how)
    with torch.no_grad():
        model.llama_proj.weight.add_(1)
    kept = model.trainable_state_dict()
    save_file(kept, tmp_path / "bridge.safetensors")
    plain = bridge(folder, None)
    plain.load_checkpoint(str(tmp_path / "bridge.safetensors"))
    assert same(kept, plain.trainable_state_dict())
    assert plain(SAMPLES)["loss"].item() == pytest.approx(model(SAMPLES)["loss"].item(), rel=0.05)
    torch.save({"model": plain.state_dict()}, tmp_path / "whole.pth")
    codes = frozen(model)
    with pytest.raises(CheckpointError, match="contains a language model, but this model's is quantised to"):
        model.load_checkpoint(str(tmp_path / "whole.pth"))
    assert same(codes, frozen(model))


def test_a_quantised_model_is_not_sharded(folder: Path) -> None:
    with pytest.raises(ConfigError, match="fsdp cannot shard a quantised language model"):
        distributed._shard(bridge(folder, "8bit").blocks(), torch.device("cpu"))
