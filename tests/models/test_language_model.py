"""Tokenizers, loading of language models, and logits at chosen positions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.models import language_model
from lavis_chatbridge.models.language_model import load_codec, load_language_model, logits_at
from lavis_chatbridge.models.settings import LanguageModelSettings

TINY = Path(language_model.__file__).parent.parent / "assets" / "tiny" / "llm"

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


def test_special_tokens_in_text_are_text(folder: Path) -> None:
    codec = load_codec(folder)
    for typed in ("</s>", "<s>", "a </s> b"):
        assert not {codec.bos_id, codec.eos_id} & set(codec.encode(typed))
        assert codec.decode(codec.encode(typed)) == typed
    assert codec.decode([1, *codec.encode("a dog"), 2, 700]) == "a dog"


def test_a_tokenizer_of_transformers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    plain.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    plain.train_from_iterator(["a red dog", "a red bell"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    codec = load_codec(tmp_path)
    assert (codec.bos_id, codec.eos_id, codec.pad_id) == (0, 1, 1)
    assert codec.decode(codec.encode("a red dog")).strip() == "a red dog"
    assert not {0, 1} & set(codec.encode("a </s> dog"))
    assert codec.decode([0, *codec.encode("a </s> dog"), 1]).strip() == "a </s> dog"


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


FAMILIES: list[dict[str, Any]] = [
    SIZES,
    {
        "model_type": "gemma2",
        **{k: v for k, v in SIZES.items() if k != "model_type"},
        "head_dim": 8,
        "num_key_value_heads": 2,
        "final_logit_softcapping": 2.0,
        "pad_token_id": 0,
    },
    {"model_type": "gpt2", "vocab_size": 640, "n_embd": 32, "n_layer": 2, "n_head": 4},
    {
        "model_type": "opt",
        "vocab_size": 640,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
    },
]


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config["model_type"])
def test_chosen_logits_are_those_of_the_whole_for_any_family(golden_dir: Path, config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    settings = LanguageModelSettings(tokenizer=str(golden_dir / "tokenizer"), config=config)
    model, _ = load_language_model(settings)
    width = model.get_input_embeddings().embedding_dim
    embeds = torch.randn(2, 7, width)
    inputs = {"inputs_embeds": embeds, "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    rows, columns = torch.tensor([0, 1, 1]), torch.tensor([6, 0, 3])
    computed: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda m, a, out: computed.append(out[..., 0].numel()))
    with torch.no_grad():
        chosen = logits_at(model, rows, columns, **inputs)
        torch.testing.assert_close(chosen, model(**inputs).logits[rows, columns], atol=1e-5, rtol=0)
    hook.remove()
    assert computed == [3, 14]


def test_half_a_character_is_read_as_the_replacement_character(golden_dir: Path) -> None:
    for codec in (load_codec(golden_dir / "tokenizer"), load_codec(TINY)):
        assert codec.encode("a\ud800b") == codec.encode("a\N{REPLACEMENT CHARACTER}b")
        assert codec.encode("a\ud83d\ude00") == codec.encode("a\N{GRINNING FACE}")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(CheckpointError, match=r"holds no tokenizer \(tokenizer.json or tokenizer.model\)"):
        load_codec(tmp_path)


def test_a_delta_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "vicuna-7b-delta-v0").symlink_to(folder)
    named = LanguageModelSettings(weights=str(tmp_path / "vicuna-7b-delta-v0"))
    assert "the difference to a LLaMA: add them to that LLaMA" in faults(named)
