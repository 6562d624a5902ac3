"""Loading of language models: precision, freezing, device maps, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lavis_chatbridge.config import parse
from lavis_chatbridge.errors import CheckpointError, ConfigError
from lavis_chatbridge.models.language_model import load_language_model
from lavis_chatbridge.models.settings import LanguageModelSettings
from tests.models.building import SMALL_LLM, TOKENIZER, small_settings

TINY = "package:assets/tiny/llm"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder with random weights and a sentencepiece tokenizer."""
    folder = shutil.copytree(TOKENIZER, tmp_path / "llm")
    load_language_model(small_settings().language_model)[0].save_pretrained(folder)
    return folder


def test_a_folder_is_loaded_frozen_in_its_precision_without_its_generation_settings(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6}')
    model, _ = load_language_model(LanguageModelSettings(weights=str(folder), dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.generation_config.do_sample


def test_readable_refusals(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cut = shutil.copytree(folder, tmp_path / "cut")
    delta = shutil.copytree(folder, tmp_path / "vicuna-7b-delta-v1.1")
    tensors = load_file(cut / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, cut / "model.safetensors", metadata={"format": "pt"})
    own: dict[str, Any] = {"tokenizer": str(folder)}
    for expected, values in {
        "nowhere does not exist": {"weights": str(tmp_path / "nowhere")},
        "does not contain a tokenizer": {"weights": str(tmp_path / "empty")},
        "cannot read a language model": {**own, "weights": str(tmp_path / "empty")},
        "1 tensors are missing": {"weights": str(cut)},
        r"suggests delta weights.*add them to that LLaMA": {"weights": str(delta)},
        "but the language model of the configuration embeds 64": {**own, "config": {**SMALL_LLM, "vocab_size": 64}},
        "model.language_model.config": {**own, "config": {"model_type": "no-such-model"}},
    }.items():
        with pytest.raises(CheckpointError, match=expected) as caught:
            load_language_model(LanguageModelSettings(**values))
        assert "\n" not in str(caught.value)


def test_a_spread_model_computes_the_same_and_stays_where_it_is() -> None:
    whole, tokenizer = load_language_model(LanguageModelSettings(weights=TINY))
    spread, _ = load_language_model(LanguageModelSettings(weights=TINY, device_map="auto"))
    ids = torch.tensor([tokenizer.encode("what is the colour of the picture?")])
    with torch.no_grad():
        logits = [model(ids.to(model.device)).logits.cpu() for model in (whole, spread)]
    torch.testing.assert_close(logits[1], logits[0])
    nn.ModuleList([whole, spread]).to(torch.float64)
    assert {tensor.dtype for tensor in whole.parameters()} == {torch.float64}
    assert {tensor.dtype for tensor in spread.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"config": {}, "tokenizer": "t", "device_map": "auto"}, "device_map is auto, but weights is null"),
        ({"config": {}, "tokenizer": "t", "engine": "http://e"}, "engine is http://e, but weights is null"),
        ({"weights": "w", "engine": "http://e", "lora": {}}, "merge the adapters"),
        ({"weights": "w", "engine": "http://e", "quantization": "8bit"}, "options of the engine"),
        ({"weights": "w", "device_map": "automatic"}, "did you mean 'auto'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        parse(LanguageModelSettings, values, "language_model")
