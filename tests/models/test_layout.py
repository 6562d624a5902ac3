"""Pieces and soft tokens in rows: layouts, masks, positions, truncation; the original's numbers are in test_golden."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lavis_chatbridge.errors import PromptError
from lavis_chatbridge.models.layout import IGNORED, SOFT, Rows, elements_of, lay_out
from lavis_chatbridge.prompting.conversation import Piece, Slot, Text


class LetterTokenizer:
    """One id for each letter, from 3 on."""

    bos_id, eos_id, pad_id = 1, 2, 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") + 3 for letter in text]


TOKENIZER: Any = LetterTokenizer()
IMAGE, SOUND = Slot("image"), Slot("audio")
PLACES: list[Any] = [{IMAGE: range(2)}, {IMAGE: range(2, 4), SOUND: range(4, 7)}]
PROMPTS: list[list[Piece]] = [
    [Text("ab"), IMAGE, Text("c"), Text("de", target=True)],
    [SOUND, Text("f"), IMAGE, Text("g", target=True), Text("h"), Text("ij", target=True)],
]


def train(prompts: list[list[Piece]], length: int = 100, layout: Any = "text") -> Rows:
    return lay_out(prompts, PLACES[: len(prompts)], TOKENIZER, layout, length)


def test_text_layout_by_hand() -> None:
    batch = train(PROMPTS)
    assert batch.token_ids.tolist() == [
        [1, 3, 4, SOFT, SOFT, 5, 6, 7, 0, 0, 0],
        [1, SOFT, SOFT, SOFT, 8, SOFT, SOFT, 9, 10, 11, 12],
    ]
    assert batch.soft.tolist() == [0, 1, 4, 5, 6, 2, 3]
    assert batch.attention_mask.tolist() == [[1] * 8 + [0] * 3, [1] * 11]
    assert batch.position_ids.tolist() == [list(range(11))] * 2
    none = [IGNORED]
    assert batch.labels.tolist() == [none * 6 + [6, 7] + none * 3, none * 7 + [9] + none + [11, 12]]
    assert [found.tolist() for found in batch.supervised()] == [[0, 0, 1, 1, 1], [5, 6, 6, 8, 9], [6, 7, 9, 11, 12]]


def test_the_elements_of_a_context() -> None:
    pieces = [Text("a"), IMAGE, Text("b", ids=(20, 21)), IMAGE]
    media = {IMAGE: ("key", range(2))}
    assert elements_of(pieces, media, TOKENIZER) == [1, 3, ("key", 0), ("key", 1), 20, 21, ("key", 0), ("key", 1)]
    assert elements_of(pieces, media, TOKENIZER, bos=False)[0] == 3
    assert elements_of([Text("<s>a", ids=(1, 3))], {}, TOKENIZER) == [1, 3]  # it brings its own BOS
    assert lay_out([[Text("<s>a", ids=(1, 3))]], [{}], TOKENIZER, "text", 9).token_ids.tolist() == [[1, 3]]


def test_only_padding_in_front_needs_a_mask() -> None:
    rows = train(PROMPTS)
    assert not rows.needs_mask
    assert train(PROMPTS, layout="original").needs_mask
    assert dataclasses.replace(rows, position_ids=rows.position_ids + torch.tensor([[0], [1]])).needs_mask


@pytest.mark.parametrize(("length", "kept", "without"), [(1, 7, 1), (2, 8, 0), (4, 10, 0)])
def test_truncation_keeps_slots_whole_and_counts_rows_without_targets(length: int, kept: int, without: int) -> None:
    batch = lay_out(PROMPTS[1:], PLACES[1:], TOKENIZER, "text", length)
    assert batch.token_ids.tolist() == [[1, SOFT, SOFT, SOFT, 8, SOFT, SOFT, 9, 10, 11, 12][:kept]]
    assert batch.without_targets == without
    without_answer: list[list[Piece]] = [[Text("abc")], [IMAGE, Text("d", target=True)]]
    assert lay_out(without_answer, [{}, *PLACES[:1]], TOKENIZER, "text", 1).without_targets == 0


def test_a_missing_medium_is_named() -> None:
    with pytest.raises(PromptError, match="sample 0 refers to image 1, but the sample has image 0"):
        train([[Slot("image", 1), Text("a", target=True)]])
    with pytest.raises(PromptError, match="the prompt is empty"):
        elements_of([], {}, TOKENIZER)
