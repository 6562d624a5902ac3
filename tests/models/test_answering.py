"""Generation in itself: a row's answer does not depend on its neighbours, and numbers out of range are explained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from lavis_chatbridge.errors import ConfigError, PromptError
from lavis_chatbridge.models import answering
from lavis_chatbridge.models.answering import Decoding
from tests.models.building import small_model, small_settings

QUESTIONS = {"text_input": ["Who?", "What is the colour of the red car on the long road beside the sea?", "Why now?"]}


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> Any:
    return small_model(golden_dir / "tokenizer")


def alone(model: Any, **how: Any) -> list[str]:
    """Each question's results, asked on its own."""
    return [text for asked in QUESTIONS["text_input"] for text in model.generate({"text_input": [asked]}, **how)]


@pytest.mark.parametrize("layout", ["text", "original"])
@pytest.mark.parametrize(
    "how",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 1.7, "num_beams": 3, "num_captions": 2},
        {"repetition_penalty": 0.6, "cache": "static"},
        {"min_length": 6, "stop": "e"},
        {"min_length": 6, "stop": "e", "num_beams": 3},
    ],
    ids=str,
)
def test_every_way_of_choosing_tokens_gives_a_row_its_own_answer(model: Any, how: dict[str, Any], layout: str) -> None:
    model.prompt_layout = layout
    try:
        assert model.generate(QUESTIONS, max_length=10, **how) == alone(model, max_length=10, **how)
    finally:
        model.prompt_layout = "text"


def test_repeating_costs_from_the_first_new_token_on(model: Any) -> None:
    """Beside a long row too, where a short one begins with padding."""
    plain = model.generate(QUESTIONS, max_length=12, stop="", repetition_penalty=0.05)
    assert any(len(set(text)) < 4 for text in plain), "a reward for repeating makes these rows repeat"
    embeds, mask = torch.randn(2, 9, 32), torch.ones(2, 9, dtype=torch.long)
    mask[0, :8] = 0
    ids = generated(model, embeds, mask, Decoding(12, repetition_penalty=1e6))
    assert [len(set(row)) for row in ids.tolist()] == [12, 12]


def generated(model: Any, embeds: Tensor, mask: Tensor, decoding: Decoding, **more: Any) -> Tensor:
    with torch.no_grad():
        return answering.generate_ids(model.llama_model, Plain(), embeds, mask, decoding, **more)


class Plain:
    """Each id is the character of its number; what is no whole character is the replacement character."""

    bos_id: int | None = None
    eos_id: int | None = None
    pad_id = 0

    def __init__(self, pieces: Sequence[bytes] | None = None) -> None:
        self._pieces = pieces or [chr(33 + i % 90).encode() for i in range(640)]

    def decode(self, ids: Any, **ignored: Any) -> str:
        return b"".join(self._pieces[int(i)] for i in ids).decode(errors="replace")

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._pieces)


class Forced(LogitsProcessor):
    """The ids that a model says, whatever it would say, unless they are barred."""

    def __init__(self, *rows: Sequence[int]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for i, row in enumerate(self.rows):
            if input_ids.shape[1] < len(row):
                scores[i, row[input_ids.shape[1]]] += 1e4
        return scores


def said(model: Any, codec: Any, rows: list[list[int]], stops: list[str], **how: Any) -> list[list[int]]:
    embeds, mask = torch.zeros(len(rows), 2, 32), torch.ones(len(rows), 2, dtype=torch.long)
    forced = LogitsProcessorList([Forced(*rows)])
    with torch.no_grad():
        ids = answering.generate_ids(
            model.llama_model, codec, embeds, mask, Decoding(**how), stops, logits_processor=forced
        )
    return ids.tolist()


def pieces_of(*pieces: bytes) -> Plain:
    """A codec with these pieces from id 3 on, behind the model's own special ones."""
    return Plain([*[b"\0"] * 3, *pieces, *[b"x"] * (637 - len(pieces))])


def test_a_stop_text_may_lie_across_tokens_and_its_characters_too(model: Any) -> None:
    stop = "\u7d50\u675f\u4e86\uff0c\u7d50\u675f\u4e86"  # seven characters, each three tokens of one byte
    codec = pieces_of(b"a", b"b#", b"##c", *(bytes([byte]) for byte in stop.encode()))
    first = [3, *range(6, 27)]
    rows = said(model, codec, [[*first, 3, 3, 3], [3, 4, 5, 3, 3]], [stop, "###"], max_tokens=25)
    assert rows == [first, [3, 4, 5] + [2] * 19], "the short one is padded behind its stop text"


BYTES = tuple(bytes([byte]) for byte in "\u7d50".encode())


@pytest.mark.parametrize(
    ("pieces", "stop", "row", "first"),
    [
        ((b"a", b"#", b"##", b"b#"), "##", [3, 4, 4, 3, 6, 4, 3], 3),
        ((b"a", b"#", b"##", b"b#"), "##", [3, 5, 3, 3, 6, 4, 3], 2),
        ((b"a", *BYTES), "\u7d50", [3, 4, 5, 6, 3, 4, 5, 6, 3], 4),
    ],
)
def test_no_stop_text_is_completed_before_the_fewest_tokens(
    model: Any, pieces: tuple[bytes, ...], stop: str, row: list[int], first: int
) -> None:
    codec = pieces_of(*pieces)
    for fewest in (1, first):
        assert said(model, codec, [row], [stop], max_tokens=12, min_tokens=fewest) == [row[:first]]
    later = said(model, codec, [row], [stop], max_tokens=12, min_tokens=first + 2)[0]
    assert later[: first - 1] == row[: first - 1]
    assert later[first - 1] != row[first - 1]
    assert stop not in codec.decode(later[: first + 1])
    assert stop in codec.decode(later[: len(row)])
    beside = said(model, codec, [row, row], ["", stop], max_tokens=12, min_tokens=first + 2)
    assert beside[0][: len(row)] == row, "a row without a stop text says what it says"
    assert beside[1][: len(later)] == later


def test_the_models_own_end_comes_after_the_fewest_tokens_and_ends_the_text(model: Any) -> None:
    codec = pieces_of(b"a", b"b")
    codec.eos_id = model.llama_model.generation_config.eos_token_id
    row = [3, 2, 4, 2, 3]
    assert said(model, codec, [row], [""], max_tokens=6) == [row[:2]]
    later = said(model, codec, [row], [""], max_tokens=6, min_tokens=3)[0]
    assert (len(later), later[0], later[2:]) == (4, 3, [4, 2])
    assert later[1] != 2
    assert answering.text_before(codec, torch.tensor(row), "") == "a"
    assert answering.text_before(codec, torch.tensor([4, 3, 4, 2]), "a") == "b"


def test_a_draw_is_from_the_whole_nucleus(model: Any) -> None:
    class NearlyEqual(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return torch.arange(scores.shape[-1]).expand_as(scores) * 1e-4

    torch.manual_seed(0)
    embeds, mask = torch.zeros(1, 2, 32), torch.ones(1, 2, dtype=torch.long)
    decoding = Decoding(1, sample=True, results=300)
    ids = generated(model, embeds, mask, decoding, logits_processor=LogitsProcessorList([NearlyEqual()]))
    assert ids.shape == (300, 1)
    assert len(set(ids.flatten().tolist())) > 150


def test_a_length_penalty_prefers_short_or_long_results_of_a_search(model: Any) -> None:
    def length(penalty: float) -> int:
        embeds, mask = torch.zeros(1, 2, 32), torch.ones(1, 2, dtype=torch.long)

        class Ends(LogitsProcessor):
            """One way ends at once, the other after five tokens; each of its tokens is likelier than the early end."""

            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                fixed = torch.full_like(scores, -1e4)
                fixed[:, 5] = 1.0
                fixed[:, 2] = 9.0 if input_ids.shape[1] == 5 else 0.5
                return fixed.log_softmax(-1)

        decoding = Decoding(8, min_tokens=0, beams=2, length_penalty=penalty)
        return generated(model, embeds, mask, decoding, logits_processor=LogitsProcessorList([Ends()])).shape[1]

    assert length(-5.0) == 1
    assert length(5.0) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 0}, "num_beams 0 is not a whole number from 1 to 1000"),
        ({"num_beams": 10**6}, "num_beams 1000000 is not a whole number from 1 to 1000"),
        ({"num_beams": 2.5}, "num_beams 2.5 is not a whole"),
        ({"num_beams": "3"}, "num_beams '3' is not a whole"),
        ({"max_length": 0, "min_length": -1}, "max_length 0 is not .* from 1 up; min_length -1 is not .* from 0 up"),
        ({"num_captions": 0}, "num_captions 0 is not"),
        ({"num_captions": 3, "num_beams": 2}, "num_captions 3 is more than num_beams 2: set num_beams to 3 or more"),
        ({"num_captions": 2}, "num_captions 2 is more than num_beams 1: .* or use_nucleus_sampling"),
        ({"use_nucleus_sampling": True, "top_p": 0}, r"top_p 0 is not in \(0, 1\]"),
        ({"use_nucleus_sampling": True, "top_p": float("nan")}, "top_p nan"),
        ({"use_nucleus_sampling": True, "temperature": 0}, "temperature 0 is not positive and finite"),
        ({"use_nucleus_sampling": True, "temperature": float("inf")}, "temperature inf"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 is not positive"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty nan"),
        ({"length_penalty": float("nan"), "num_beams": 2}, "length_penalty nan is not finite"),
        ({"length_penalty": 1000, "num_beams": 2}, "length_penalty 1000 is too large for max_length 30"),
        ({"length_penalty": -1000, "num_beams": 2}, "length_penalty -1000 is too large"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_explained(model: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model.generate(QUESTIONS, **changes)


def test_numbers_that_do_not_concern_the_chosen_way_are_not_looked_at(model: Any) -> None:
    same = model.generate(QUESTIONS, max_length=4)
    assert model.generate(QUESTIONS, max_length=4, top_p=0, temperature=0, length_penalty=1000) == same
    assert model.generate(QUESTIONS, max_length=4, min_length=0) == same
    assert model.generate(QUESTIONS, max_length=4, min_length=9, stop="") == model.generate(
        QUESTIONS, max_length=4, stop=""
    )


@pytest.mark.parametrize("family", [{"model_type": "gpt2"}, {"model_type": "llama"}])
def test_prompts_beyond_the_positions_of_the_model(golden_dir: Path, family: dict[str, Any], caplog: Any) -> None:
    own = small_settings(golden_dir / "tokenizer").language_model
    config = {"max_position_embeddings": 64, **family}
    if family["model_type"] == "gpt2":
        config |= {"vocab_size": 640, "n_embd": 32, "n_layer": 1, "n_head": 2}
    else:
        config = {**(own.config or {}), **config}
    model = small_model(golden_dir / "tokenizer", language_model=own.model_copy(update={"config": config}))
    for length, room in ((64, 1), (60, 5)):
        embeds, mask = torch.randn(2, length, 32), torch.ones(2, length, dtype=torch.long)
        mask[0, :-3] = 0
        caplog.clear()
        assert generated(model, embeds, mask, Decoding(8, min_tokens=7)).shape == (2, room)
        assert f"answers end after {room} tokens" in caplog.text
    caplog.clear()
    assert generated(model, torch.randn(1, 60, 32), torch.ones(1, 60, dtype=torch.long), Decoding(5)).shape == (1, 5)
    assert not caplog.text
    with pytest.raises(
        PromptError, match="a prompt has 65 positions with its media, the language model no more than 64"
    ):
        generated(model, torch.randn(1, 65, 32), torch.ones(1, 65, dtype=torch.long), Decoding(1))
    mask = torch.ones(1, 70, dtype=torch.long)
    mask[:, :10] = 0
    assert generated(model, torch.randn(1, 70, 32), mask, Decoding(2)).shape == (1, 2), "padding takes no position"
    with pytest.raises(PromptError, match=r"a candidate has 6 tokens, .* there is room for 5"), torch.no_grad():
        answering.candidate_scores(model.llama_model, torch.randn(1, 70, 32), mask, [[1], [2] * 6], 2, 4)


def test_positions_that_are_drawn_out_count(golden_dir: Path) -> None:
    own = small_settings(golden_dir / "tokenizer").language_model
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    config = {**(own.config or {}), "max_position_embeddings": 16, "rope_scaling": scaling}
    model = small_model(golden_dir / "tokenizer", language_model=own.model_copy(update={"config": config}))
    assert generated(model, torch.randn(1, 60, 32), torch.ones(1, 60, dtype=torch.long), Decoding(5)).shape == (1, 5)
    with pytest.raises(PromptError, match="no more than 64"):
        generated(model, torch.randn(1, 65, 32), torch.ones(1, 65, dtype=torch.long), Decoding(1))
