"""Tokenizers: the ids of the folder's own file whatever class its configuration names; end and special tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer

from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.models.templates import load_template
from lavis_chatbridge.models.tokenizer import load_tokenizer
from tests.chat.building import TINY_TOKENIZER
from tests.models.building import TOKENIZER
from tests.models.folders import STYLES, write_folder

TEXTS = (" and image: ", "  two  blanks ", "What is it?", "é 🎈\n\n", "x", "", ". And its background audio: ")


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "PreTrainedTokenizerFast", "GPT2Tokenizer"])
@pytest.mark.parametrize("style", ["qwen3", "llama3", "gemma", "phi3"])
def test_ids_are_those_of_the_file_whatever_class_is_named(tmp_path: Path, style: str, name: str) -> None:
    folder = write_folder(tmp_path, STYLES[style], tokenizer_class=name, legacy=False, add_prefix_space=True)
    tokenizer, own = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        ids = own.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == tokenizer.encode_marked(text) == ids
        assert tokenizer.decode(ids) == own.decode(ids)
    assert len(tokenizer) == own.get_vocab_size()


@pytest.mark.parametrize("style", STYLES)
def test_special_tokens_in_text_are_text(tmp_path: Path, style: str) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, STYLES[style]))
    assert tokenizer.special == set(STYLES[style].special)
    for token in STYLES[style].special:
        (marked,) = tokenizer.encode_marked(token)[-1:]
        assert marked not in tokenizer.encode(f"a {token} b")
        assert tokenizer.decode(tokenizer.encode(f"a {token} b")).strip() == f"a {token} b"
        assert tokenizer.decode([marked]) == ""


def test_bos_end_and_padding(tmp_path: Path) -> None:
    qwen, llama = (load_tokenizer(write_folder(tmp_path / name, STYLES[name])) for name in ("qwen3", "llama3"))
    assert qwen.bos_id is None
    assert qwen.pad_id == qwen.eos_id == qwen.encode_marked("<|im_end|>")[0]  # it names no padding token
    assert [llama.bos_id] == llama.encode_marked("<|begin_of_text|>")
    bare = write_folder(tmp_path / "bare", STYLES["llama3"])
    (bare / "tokenizer_config.json").unlink()
    (bare / "config.json").write_text(json.dumps({"bos_token_id": 7, "eos_token_id": [9, 8], "pad_token_id": None}))
    tokenizer = load_tokenizer(bare)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (7, 9, 9)


def test_the_original_sentencepiece_file_gives_the_ids_of_sentencepiece() -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    own = SentencePieceProcessor(model_file=str(TOKENIZER / "tokenizer.model"))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, len(tokenizer)) == (1, 2, 2, 640)
    assert tokenizer.decode([1, *tokenizer.encode("a dog"), 2, 700]) == "a dog"
    assert tokenizer.encode_marked("a</s>")[-1] == 2
    words = ["</s>", "<s>", "<0x0A>", "###Human:", "the", "ing ", "2024", "é", "🎈", "你", "▁", *" \n\tabdginorst.,?"]

    @settings(max_examples=400, deadline=None)
    @given(st.lists(st.sampled_from(words), max_size=16).map("".join))
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids == own.encode(text)
        assert tokenizer.decode(ids) == own.decode(ids)

    check()


def test_a_sentencepiece_file_of_another_algorithm_is_refused(tmp_path: Path) -> None:
    texts = iter([f"{a} {b} stands beside the {c}" for a in ("one", "two") for b in ["dogs", "cars"] for c in "abc"])
    name = str(tmp_path / "tokenizer")
    SentencePieceTrainer.train(sentence_iterator=texts, model_prefix=name, vocab_size=40, hard_vocab_limit=False)
    with pytest.raises(CheckpointError, match=r"is not a BPE with LLaMA's settings; save it again as tokenizer.json"):
        load_tokenizer(tmp_path)


def test_added_tokens_end_and_template_beside_a_sentencepiece_file(tmp_path: Path) -> None:
    """As in chat models that grew out of LLaMA: tokens behind its vocabulary, one of them the end."""
    shutil.copy(TOKENIZER / "tokenizer.model", tmp_path)
    added = {"640": {"content": "<|end|>", "special": True}, "641": {"content": "<obj>", "special": False}}
    rendered = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|end|>' }}{% endfor %}"
    rendered += "{% if add_generation_prompt %}assistant: {% endif %}"
    config = {"eos_token": "<|end|>", "added_tokens_decoder": added, "chat_template": rendered}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, len(tokenizer)) == (1, 640, 642)
    assert tokenizer.encode("a<obj>")[-1] == 641
    assert tokenizer.decode([*tokenizer.encode("a dog"), 641, 640, *tokenizer.encode("b")]) == "a dog<obj> b"
    assert 640 not in tokenizer.encode("a<|end|>")
    template = load_template("tokenizer", tokenizer)
    assert template.end_ids == {640}
    assert (template.reply("b").ids or ())[-1] == 640


def test_half_a_character_is_read_as_the_replacement_character() -> None:
    for tokenizer in (load_tokenizer(TOKENIZER), load_tokenizer(TINY_TOKENIZER)):
        assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\N{REPLACEMENT CHARACTER}b")
        assert tokenizer.encode("a\ud83d\ude00") == tokenizer.encode("a\N{GRINNING FACE}")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_files_that_cannot_be_read(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("{")
    with pytest.raises(CheckpointError, match="cannot read the tokenizer in") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
