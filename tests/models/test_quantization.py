"""A language model really held in 8 and 4 bits by bitsandbytes, on a CPU: what it weighs, computes, and lets train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lavis_chatbridge.errors import CheckpointError, ConfigError
from lavis_chatbridge.media.types import AudioClips
from lavis_chatbridge.models import language_model, lora
from lavis_chatbridge.models.settings import LanguageModelSettings, LoraSettings
from lavis_chatbridge.prompting import alignment_prompt
from lavis_chatbridge.runners import checkpoints, optim, parallel
from tests.models.building import small_model

SIZES = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
BOTH = pytest.mark.parametrize("how", ["8bit", "4bit"])
NEAR = {"8bit": 0.02, "4bit": 0.12}
"""The most by which logits differ from the unquantised ones, of their size; a wrong scale or layer gives about 1."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA as its makers publish one; some features are large, which LLM.int8 computes apart."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.06))
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[5] = 12.0
        layer.self_attn.v_proj.weight.data[3] *= 10
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(golden_dir: Path) -> Path:
    return golden_dir / "tokenizer"


def hashes(model: torch.nn.Module) -> dict[str, str]:
    """The hashes of a model's frozen parts, as checkpoints keep them."""
    return checkpoints.frozen_hashes(model, list(optim.trainable(model)))


def settings(folder: Path, tokenizer: Path, how: Any, dtype: Any = "float32", **more: Any) -> LanguageModelSettings:
    return LanguageModelSettings(weights=str(folder), tokenizer=str(tokenizer), dtype=dtype, quantization=how, **more)


def load(*arguments: Any, **more: Any) -> Any:
    return language_model.load_language_model(settings(*arguments, **more))[0]


def bridge(folder: Path, tokenizer: Path, how: Any, **more: Any) -> Any:
    return small_model(tokenizer, language_model=settings(folder, tokenizer, how, **more))


def logits(model: Any) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(inputs_embeds=torch.randn(3, 9, 64).to(model.dtype)).logits.float()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def quantised(model: nn.Module) -> dict[str, Any]:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (Linear4bit, Linear8bitLt))}


def tensors_of(layer: Any) -> Iterator[Tensor]:
    """Codes, then all that is needed to read them."""
    yield layer.weight.data
    if (state := getattr(layer.weight, "quant_state", None)) is not None:
        yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    else:
        yield layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB


SAMPLES = {
    "pieces": [alignment_prompt(["image"], "a red dog runs"), alignment_prompt(["audio"], "rain on a roof")],
    "image": [[torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(0))], []],
    "video": [[], []],
    "audio": [
        [],
        [AudioClips(torch.randn(1, 48, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([48]))],
    ],
}


def gradients(model: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(SAMPLES)["loss"]
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] for name in found} >= {"llama_proj", "Qformer", "image_query_tokens", "audio_trans"}
    return loss.item(), found


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_are_near_those_of_all_bits(folder: Path, tokenizer: Path, how: Any, dtype: Any) -> None:
    plain, model = load(folder, tokenizer, None), load(folder, tokenizer, how, dtype)
    nn.ModuleList([model]).to("cpu")  # as a runner and a chat do; bitsandbytes 0.46 quantised 8-bit layers again
    expected, found = logits(plain), logits(model)
    assert 0 < error(found, expected) < NEAR[how]
    nn.ModuleList([model]).to("cpu")
    assert torch.equal(logits(model), found)
    assert len(quantised(model)) == 7 * SIZES["num_hidden_layers"]
    others = [p for name, p in model.named_parameters() if name.rpartition(".")[0] not in quantised(model)]
    assert {p.dtype for p in others} == {model.dtype}


@BOTH
def test_loss_and_gradients_are_near_those_of_all_bits(folder: Path, tokenizer: Path, how: Any) -> None:
    loss, expected = gradients(bridge(folder, tokenizer, None))
    own_loss, found = gradients(bridge(folder, tokenizer, how))
    assert own_loss == pytest.approx(loss, rel=0.02)
    assert own_loss != loss
    assert found.keys() == expected.keys()
    assert error(flat(found), flat(expected)) < {"8bit": 0.1, "4bit": 0.3}[how]


def test_a_validation_leaves_gradients_whole_on_a_cpu_with_bf16(
    folder: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes repacks 4-bit layers there as soon as they run without gradients, which they then no longer have."""
    from bitsandbytes.nn import modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    model = bridge(folder, tokenizer, "4bit")
    loss, expected = gradients(model)
    marks = hashes(model)
    with torch.no_grad():
        assert model(SAMPLES)["loss"].item() == pytest.approx(loss, abs=1e-5)
    again, found = gradients(model)
    assert again == loss
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert hashes(model) == marks


@BOTH
@pytest.mark.parametrize("adapters", [None, LoraSettings(rank=4, target_modules=("q_proj", "down_proj"))])
def test_training_lowers_the_loss_and_leaves_the_codes(folder: Path, tokenizer: Path, how: Any, adapters: Any) -> None:
    model = bridge(folder, tokenizer, how, lora=adapters)
    before = [t.clone() for layer in quantised(model).values() for t in tensors_of(layer)]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    beside = [name for name in trained if lora.is_adapter(name)]
    assert len(beside) == (0 if adapters is None else 2 * 2 * SIZES["num_hidden_layers"])
    assert not [name for name in trained if name.startswith("llama_model") and name not in beside]
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
    after = [t for layer in quantised(model).values() for t in tensors_of(layer)]
    assert all(map(torch.equal, after, before))


@BOTH
def test_what_was_trained_is_kept_and_loaded_into_any_precision(
    folder: Path, tokenizer: Path, tmp_path: Path, how: Any
) -> None:
    model = bridge(folder, tokenizer, how)
    with torch.no_grad():
        model.llama_proj.weight.add_(1)
    kept = model.trainable_state_dict()
    assert not [name for name in kept if name.startswith("llama_model")]
    path = tmp_path / "bridge.safetensors"
    save_file(kept, path)
    for other in (how, None):
        again = bridge(folder, tokenizer, other)
        again.load_checkpoint(str(path))
        assert all(torch.equal(t, again.trainable_state_dict()[name]) for name, t in kept.items())
    assert again(SAMPLES)["loss"].item() == pytest.approx(model(SAMPLES)["loss"].item(), rel=0.05)

    whole = tmp_path / "whole.pth"
    torch.save({"model": again.state_dict()}, whole)
    codes = [t.clone() for layer in quantised(model).values() for t in tensors_of(layer)]
    with pytest.raises(CheckpointError, match="holds a whole language model, but this one's is quantised to"):
        model.load_checkpoint(str(whole))
    assert all(map(torch.equal, codes, [t for layer in quantised(model).values() for t in tensors_of(layer)]))


def test_half_precision_trains_in_4_bits_but_not_in_8_on_a_cpu(folder: Path, tokenizer: Path) -> None:
    """bitsandbytes puts large inputs aside in place, where its own rounding to fp16 has not made a copy."""
    model = bridge(folder, tokenizer, "4bit", dtype="float16")
    _, found = gradients(model)
    assert error(flat(found), flat(gradients(bridge(folder, tokenizer, "4bit"))[1])) < 0.1
    model = bridge(folder, tokenizer, "8bit", dtype="float16")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(model)


def test_hashes_tell_codes_apart(folder: Path, tokenizer: Path) -> None:
    marks = {how: hashes(bridge(folder, tokenizer, how)) for how in (None, "8bit", "4bit")}
    assert len({own["llama_model"] for own in marks.values()}) == 3
    assert marks["8bit"] == hashes(bridge(folder, tokenizer, "8bit"))
    assert marks["8bit"]["visual_encoder"] == marks[None]["visual_encoder"]


@BOTH
def test_a_quantised_model_is_not_sharded(
    folder: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, how: Any
) -> None:
    monkeypatch.setattr(parallel.dist, "init_device_mesh", lambda *_arguments: None)
    with pytest.raises(ConfigError, match="fsdp cannot shard a quantised language model"):
        parallel._shard(bridge(folder, tokenizer, how).blocks(), torch.device("cpu"))


def test_on_a_gpu_the_layers_go_to_this_process_s_device(
    folder: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    asked: dict[str, Any] = {}

    def from_pretrained(*_folder: Any, **more: Any) -> None:
        asked.update(more)
        raise OSError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(CheckpointError):
        load(folder, tokenizer, "8bit", "bfloat16")
    assert asked["device_map"] == {"": 3}
