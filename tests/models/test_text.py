"""Tokens become text: whole characters, stop texts wherever a model cuts them, no spaces around the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_chatbridge.models.text import TextStream, text_of
from lavis_chatbridge.models.tokenizer import load_codec
from tests.models.folders import STYLES, write_folder


class Bytes:
    """A tokenizer of single bytes; a token from 256 on is the text, or the bytes, that it is given."""

    byte_ids: frozenset[int] = frozenset()

    def __init__(self, *words: str | bytes) -> None:
        self.words = [word.encode() if isinstance(word, str) else word for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(bytes([i]) if i < 256 else self.words[i - 256] for i in ids).decode(errors="replace")


def deltas(codec: Any, ids: Sequence[int], *stops: str) -> tuple[list[str], TextStream]:
    stream = TextStream(codec, stops)
    texts = []
    for token in ids:
        texts.append(stream.push(token))
        if stream.stopped is not None:
            break
    return [*texts, stream.finish()], stream


def test_a_character_waits_for_all_its_bytes_and_a_broken_one_for_none():
    texts, stream = deltas(Bytes(), list("é🎈!".encode()))
    assert [t for t in texts if t] == ["é", "🎈", "!"]
    assert stream.stopped is None
    texts, _ = deltas(Bytes(), [0xF0, *b"abcdef"])
    assert "".join(texts[:-1]).endswith("abcdef")


@pytest.mark.parametrize("cut", [["a red", "#", "#", "#", "Human"], ["a red #", "##Hu"], ["a red###Human: hi"]])
def test_a_stop_text_is_found_however_it_is_cut(cut: list[str]):
    texts, stream = deltas(Bytes(*cut), range(256, 256 + len(cut)), "END", "###")
    assert "".join(texts) == stream.text == "a red"
    assert stream.stopped == "###"


def test_what_only_begins_like_a_stop_text_is_kept():
    codec = Bytes("## ", "two marks", " and #")
    texts, stream = deltas(codec, [256, 257, 258], "###", "END")
    assert "".join(texts) == "## two marks and #"
    assert texts[0] == "##"  # followed by a space, it cannot be the beginning of ###
    assert stream.stopped is None


def test_spaces_around_the_text_are_left_out_as_they_come():
    texts, _ = deltas(Bytes(), b"  a  b \n")
    assert "".join(texts) == "a  b"
    assert texts[:2] == ["", ""]
    assert text_of(Bytes(), b" one STOP two ### three", ["###", "STOP"]) == "one"


def test_a_stop_text_within_the_fewest_tokens_does_not_count():
    stream = TextStream(Bytes(), ["#"], least=3)
    for token in b"a#b#c":
        stream.push(token)
    assert (stream.text, stream.stopped) == ("a#b", "#")


TEXT = st.text(st.sampled_from("a é€🎈你好\N{ZERO WIDTH JOINER}👨👩 #\n"), max_size=12)


@settings(max_examples=400, deadline=None)
@given(TEXT, st.lists(st.integers(1, 5), min_size=1, max_size=40), st.binary(max_size=3))
def test_streamed_text_is_that_of_all_ids_for_any_vocabulary_of_bytes(text: str, cuts: list[int], broken: bytes):
    """Tokens that end one character and begin the next, and bytes that are no character."""
    whole, tokens = broken + text.encode() + broken, []
    while whole:
        size = cuts[len(tokens) % len(cuts)]
        tokens, whole = [*tokens, whole[:size]], whole[size:]
    codec = Bytes(*tokens)
    ids = [256 + i for i in range(len(tokens))]
    texts, stream = deltas(codec, ids)
    assert "".join(texts) == stream.text == codec.decode(ids).strip()


def test_streamed_text_is_that_of_all_ids_with_byte_tokens(tmp_path_factory: pytest.TempPathFactory):
    """A later byte can turn a whole run of byte tokens into replacement characters."""
    codec = load_codec(write_folder(tmp_path_factory.mktemp("llama"), STYLES["phi3"]))
    letters = codec.encode("a red car")

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.one_of(st.sampled_from(sorted(codec.byte_ids)), st.sampled_from(letters)), max_size=24))
    def check(ids: list[int]) -> None:
        texts, stream = deltas(codec, ids)
        assert "".join(texts) == stream.text == codec.decode(ids).strip()

    check()
    texts, _ = deltas(codec, [*codec.encode("a 🎈"), *letters])
    assert sum(bool(text) for text in texts) > 3  # it does not wait for the end
