"""Adapters as an option of the language model: what they change, what they weigh, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lavis_chatbridge import cli
from lavis_chatbridge.errors import CheckpointError, ConfigError
from lavis_chatbridge.models import language_model, lora, state_dicts
from lavis_chatbridge.models.settings import LanguageModelSettings, LoraSettings
from lavis_chatbridge.plugin.export_llm import export
from tests.models.building import small_model, small_settings


def with_lora(**changes: Any) -> LanguageModelSettings:
    return small_settings().language_model.model_copy(update={"lora": LoraSettings(**changes)})


def logits(language_model: Any) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return language_model(inputs_embeds=torch.randn(1, 6, 32)).logits


def test_adapters_alone_are_trained_in_fp32_beside_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lavis_chatbridge.models.settings.slow_on_cpu", lambda dtype: False)
    model = small_model(language_model=with_lora(dropout=0.5).model_copy(update={"dtype": "bfloat16"}))
    own = dict(model.llama_model.named_parameters())
    trained = {name for name, parameter in own.items() if parameter.requires_grad}
    assert trained == {name for name in own if lora.is_adapter(name)}
    assert len(trained) == 2 * 2 * 2  # A and B, two layers, q_proj and v_proj
    assert {own[name].dtype for name in trained} == {torch.float32}
    assert {parameter.dtype for name, parameter in own.items() if name not in trained} == {torch.bfloat16}
    with torch.no_grad():
        found = model.llama_model(inputs_embeds=torch.randn(1, 2, 32, dtype=torch.bfloat16)).logits
    assert found.dtype == torch.bfloat16
    dropouts = [module for module in model.llama_model.modules() if isinstance(module, torch.nn.Dropout)]
    for mode in (True, False):
        model.train(mode)
        assert {module.training for module in dropouts} == {mode}
        assert not model.llama_model.training


def test_a_bridge_without_adapters_goes_into_a_model_with_fresh_ones(tmp_path: Path) -> None:
    plain = small_model(seed=3)
    state_dicts.save(tmp_path / "bridge.safetensors", plain.trainable_state_dict())
    torch.save({"model": plain.state_dict()}, tmp_path / "whole.pth")
    for name in ("bridge.safetensors", "whole.pth"):
        model = small_model(seed=4, language_model=with_lora())
        model.load_checkpoint(str(tmp_path / name))
        assert torch.equal(model.llama_proj.weight, plain.llama_proj.weight)
        assert torch.equal(logits(model.llama_model), logits(plain.llama_model)) == (name == "whole.pth")
        assert all(p.abs().max() == 0 for n, p in model.named_parameters() if ".lora_B." in n)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "its LoRA adapters: rank 4, alpha 16 on q_proj, v_proj, the model's: none"),
        ({"rank": 2}, "rank 4, alpha 16 on q_proj, v_proj, the model's: rank 2, alpha 16 on q_proj, v_proj"),
        ({"rank": 4, "alpha": 8}, "the model's: rank 4, alpha 8"),
        ({"rank": 4, "target_modules": ("o_proj",)}, "the model's: rank 4, alpha 16 on o_proj"),
    ],
)
def test_other_adapters_are_refused(tmp_path: Path, changes: Any, message: str) -> None:
    model = small_model(language_model=with_lora(rank=4))
    path, own = tmp_path / "lora.safetensors", {"lora": lora.describe(model)}
    state_dicts.save(path, model.trainable_state_dict(), own)
    other = small_model(**({} if changes is None else {"language_model": with_lora(**changes)}))
    with pytest.raises(CheckpointError, match=message):
        other.load_checkpoint(str(path))
    state_dicts.save(path, model.trainable_state_dict())  # without a description, the tensors must fit
    if changes is None or "alpha" not in changes:
        with pytest.raises(CheckpointError, match=r"does not fit this model: .*lora_A"):
            other.load_checkpoint(str(path))
    same = small_model(seed=9, language_model=with_lora(rank=4))
    same.load_checkpoint(str(path))
    assert all(torch.equal(t, same.trainable_state_dict()[n]) for n, t in model.trainable_state_dict().items())


@pytest.mark.parametrize("target", ["query", "embed_tokens"])
def test_layers_that_take_no_adapter(target: str) -> None:
    settings = with_lora(target_modules=("q_proj", target))
    with pytest.raises(ConfigError, match=rf"target_modules: found {target}, expected linear layers .*: .*q_proj"):
        language_model.load_language_model(settings)


@pytest.mark.parametrize("tied", [False, True])
def test_the_merged_language_model_has_the_logits_of_the_adapted_one(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    own = with_lora(target_modules=("q_proj", "down_proj", "lm_head"))
    own = own.model_copy(update={"config": {**(own.config or {}), "tie_word_embeddings": tied}})
    model = small_model(language_model=own)
    for name, parameter in model.llama_model.named_parameters():
        if lora.is_adapter(name):
            torch.nn.init.normal_(parameter, std=0.2)
    plain = small_model(language_model=own)
    expected = logits(model.llama_model)
    assert not torch.allclose(expected, logits(plain.llama_model), atol=0.1)
    embeddings = model.llama_model.get_input_embeddings().weight.clone()
    export(model, tmp_path / "out")
    found: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(found.get_input_embeddings().weight, embeddings)
    torch.testing.assert_close(logits(found), expected, atol=1e-5, rtol=0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    _, tokenizer = language_model.load_language_model(LanguageModelSettings(weights=str(tmp_path / "out")))
    assert tokenizer.encode("a dog") == model.llama_tokenizer.encode("a dog")


def test_the_export_command(tmp_path: Path) -> None:
    assert [cli.main(["export-llm", str(tmp_path / "llm")]) for _ in range(2)] == [0, 2]
    assert (tmp_path / "llm" / "model.safetensors").is_file()
