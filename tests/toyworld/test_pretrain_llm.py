"""The tiny language model: its tokenizer, its training in small, and what the shipped one can do."""

from __future__ import annotations

import json
import random
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lavis_chatbridge.prompting import Message, Text, chat_prompt, context_of
from lavis_chatbridge.prompting.pieces import MODALITIES
from lavis_chatbridge.toyworld.language import QUESTION_KINDS, alone, facts_in, terse
from lavis_chatbridge.toyworld.pretrain_llm import (
    CONTEXT_WEIGHT,
    Curriculum,
    Encoded,
    encode,
    gate,
    group,
    main,
    make_tokenizer,
)
from lavis_chatbridge.toyworld.reading import LEVELS, draw_scene, passage
from lavis_chatbridge.toyworld.world import ATTRIBUTES

SHIPPED = Path(str(resources.files("lavis_chatbridge"))) / "assets" / "tiny" / "llm"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def shipped() -> Any:
    """The shipped model in full precision, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(SHIPPED)


def test_every_word_of_the_world_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random("words")
    texts = [piece.text for _ in range(300) for piece in passage(rng, LEVELS[-1]) if isinstance(piece, Text)]
    words = {word for text in texts for word in re.findall(r"[A-Za-z]+", text)}
    assert {value for lists in ATTRIBUTES.values() for values in lists.values() for value in values} <= words
    split = [word for word in sorted(words) if len(tokenizer(word, add_special_tokens=False)["input_ids"]) != 1]
    assert split == []


def test_end_of_turn_is_one_token_and_a_space_before_a_word_changes_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    def tokens(text: str) -> list[str]:
        return tokenizer.tokenize(text, add_special_tokens=False)

    assert tokens("red###Human: what") == ["Ġred", "###", "ĠHuman", ":", "Ġwhat"]
    assert tokens("red") == tokens(" red") == ["Ġred"]
    assert tokens("a circle\n") == ["Ġa", "Ġcircle", "Ċ"]


@pytest.mark.parametrize("text", [" Hé, wörld <image> 日本", " 3.5 km", " tab\there"])
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_pieces_are_encoded_one_by_one_and_weighted(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = [Text("###Human: Given following image: "), Text("red circle"), Text(".###Human: what###Assistant:")]
    answer = Text("red###", target=True)
    (one,) = encode([[*pieces, answer]], tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(one.ids)
    expected = (
        "<s> ### ĠHuman : ĠGiven Ġfollowing Ġimage : Ġ Ġred Ġcircle Ġ. ### ĠHuman : Ġwhat ### ĠAssistant : Ġred ###"
    )
    assert tokens == expected.split(" ")
    assert [weight for weight in one.weights if weight] == [CONTEXT_WEIGHT, CONTEXT_WEIGHT, 1.0, 1.0]


def test_grouping_pads_on_the_right_without_weight() -> None:
    passages = [Encoded([1] * length, [1.0] * length) for length in (5, 2, 3, 4)]
    short, long = group(passages, pad=9, groups=2)
    assert short.ids.tolist() == [[1, 1, 9], [1, 1, 1]]
    assert long.weights.tolist() == [[1.0, 1.0, 1.0, 1.0, 0.0], [1.0] * 5]


def test_the_curriculum_rises_when_answers_are_right_and_stays_otherwise() -> None:
    curriculum = Curriculum()
    for _ in range(100):
        curriculum.learn(0.8, done=0.0)
    assert curriculum.level == 0
    for _ in range(1000):
        curriculum.learn(1.0, done=0.0)
    assert curriculum.level == len(LEVELS) - 1


def test_the_curriculum_rises_when_it_is_late() -> None:
    curriculum = Curriculum()
    levels = []
    for done in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        curriculum.learn(0.5, done)
        levels.append(curriculum.level)
    assert levels == [0, 1, 2, 3, 4, 4]


def test_the_command_writes_a_folder_that_loads(tmp_path: Path) -> None:
    small = ["--width", "32", "--layers", "1", "--heads", "2", "--feed-forward", "32", "--passages", "4"]
    main(["--out", str(tmp_path), "--steps", "2", "--questions", "4", *small])
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.config.vocab_size == len(loaded)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert set(json.loads((tmp_path / "gate.json").read_text())["gate"]) >= set(QUESTION_KINDS)


def test_shipped_model_is_small(shipped: Any) -> None:
    assert shipped[0].num_parameters() <= 1_200_000
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 4_000_000


def test_shipped_model_answers_joint_questions_in_words(
    shipped: Any,
) -> None:
    model, tokenizer = shipped
    scores = gate(model, tokenizer, questions=12, seed=99)
    assert sum(scores[kind] for kind in QUESTION_KINDS) / len(QUESTION_KINDS) >= 0.9
    assert min(scores[kind] for kind in ("name", "compose", "match")) >= 0.9


def test_shipped_model_generates_the_answer_and_its_end(
    shipped: Any,
) -> None:
    model, tokenizer = shipped
    rng = random.Random(5)
    for kind in MODALITIES:
        scene = draw_scene(kind, rng)
        question = alone(scene, rng, "name")
        words = " ".join(scene.facts.values())
        pieces = [Text(f"###Human: Given following {kind}: "), Text(words)]
        turns = [Message("user", question.text), Message("assistant", question.answer)]
        (first, *rest) = context_of(chat_prompt(turns))
        assert isinstance(first, Text)
        (context,) = encode([[*pieces, Text(f".{first.text}"), *rest]], tokenizer)
        ids = torch.tensor([context.ids])
        made = model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
        said = tokenizer.decode(made[0, len(context.ids) :])
        assert said.split("###")[0].strip() == question.answer


def test_shipped_model_captions_what_is_described(shipped: Any) -> None:
    model, tokenizer = shipped
    rng = random.Random(3)
    for kind in MODALITIES:
        scene = draw_scene(kind, rng)
        (context,) = encode([[Text(terse(scene, rng))]], tokenizer)
        ids = torch.tensor([context.ids])
        made = model.generate(ids, max_new_tokens=30, do_sample=False, attention_mask=torch.ones_like(ids))
        said = tokenizer.decode(made[0, len(context.ids) :])
        assert facts_in(said.split("\n")[0], kind) == scene.facts
        assert "\n" in said
