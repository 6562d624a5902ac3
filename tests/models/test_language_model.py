"""Loading of language models: precision, freezing, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.models.language_model import load_language_model
from lavis_chatbridge.models.settings import LanguageModelSettings

SIZES = {
    "model_type": "llama",
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture
def folder(golden_dir: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder with random weights and a sentencepiece tokenizer."""
    shutil.copytree(golden_dir / "tokenizer", tmp_path / "llm")
    settings = LanguageModelSettings(tokenizer=str(tmp_path / "llm"), config=SIZES)
    load_language_model(settings)[0].save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


def test_a_folder_is_loaded_frozen_and_in_its_precision(folder: Path) -> None:
    model, codec = load_language_model(LanguageModelSettings(weights=str(folder), dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert (codec.bos_id, codec.eos_id, len(codec)) == (1, 2, 640)
    assert model.generation_config.do_sample is not True


def faults(settings: LanguageModelSettings) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_language_model(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_readable_refusals(folder: Path, tmp_path: Path) -> None:
    assert "nowhere does not exist" in faults(LanguageModelSettings(weights=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    assert "holds no tokenizer" in faults(LanguageModelSettings(weights=str(tmp_path / "empty")))
    tokenizer = str(folder)
    bare = LanguageModelSettings(weights=str(tmp_path / "empty"), tokenizer=tokenizer)
    assert "no language model can be read" in faults(bare)
    small = LanguageModelSettings(tokenizer=tokenizer, config={**SIZES, "vocab_size": 600})
    assert "has 640 tokens, but the language model of the configuration embeds 600" in faults(small)
    odd = LanguageModelSettings(tokenizer=tokenizer, config={**SIZES, "model_type": "no-such-model"})
    assert "model.language_model.config" in faults(odd)


def test_an_incomplete_folder_is_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "1 tensors are missing, model.layers.1.mlp.up_proj.weight" in faults(
        LanguageModelSettings(weights=str(folder))
    )
