"""Replies: how tokens are chosen, what ends a reply, replies that join, leave and are cancelled, and streamed text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_chatbridge.config import parse
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.models.decoding import Decoder, Generation, Prefix, TextStream
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.models.tokenizer import load_tokenizer
from tests.models.building import Letters, answers, prompt, reply, tiny
from tests.models.folders import STYLES, write_folder


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def chosen(logits: list[float], ids: list[int] | None = None, **how: Any) -> torch.Tensor:
    """How often each token is chosen in 4,000 draws, as a share."""
    one = reply([1], {}, seed=0, **{"temperature": 1.0, "top_p": 1.0, **how})
    one.ids = list(ids or [])
    counts = torch.zeros(len(logits))
    for _ in range(4000):
        counts[one.choose(torch.tensor(logits))] += 1
    return counts / counts.sum()


LOGITS = [2.0, 1.0, 0.5, -1.0]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, LOGITS),
        ({"temperature": 0.5}, [2 * value for value in LOGITS]),
        ({"temperature": 1e-300}, [2.0, -math.inf, -math.inf, -math.inf]),
        ({"top_k": 2}, [2.0, 1.0, -math.inf, -math.inf]),
        ({"top_k": -1}, LOGITS),
        ({"top_p": 0.7}, [2.0, 1.0, -math.inf, -math.inf]),
        ({"top_p": 1e-6}, [2.0, -math.inf, -math.inf, -math.inf]),
        ({"min_p": 0.3}, [2.0, 1.0, -math.inf, -math.inf]),
        ({"ids": [0, 0, 3], "repetition_penalty": 2.0}, [1.0, 1.0, 0.5, -2.0]),
        ({"ids": [0, 0, 3], "presence_penalty": 0.5}, [1.5, 1.0, 0.5, -1.5]),
        ({"ids": [0, 0, 3], "frequency_penalty": 0.5}, [1.0, 1.0, 0.5, -1.5]),
        ({"stop_token_ids": (0,), "min_new_tokens": 2}, [-math.inf, 1.0, -math.inf, -1.0]),  # 2 is the end token,
    ],
)
def test_tokens_are_chosen_with_the_probabilities_that_the_settings_give(how: dict[str, Any], expected: Any) -> None:
    torch.testing.assert_close(chosen(LOGITS, **how), torch.tensor(expected).softmax(-1), atol=0.025, rtol=0)


def test_the_same_seed_gives_the_same_reply(model: Any) -> None:
    elements, media = prompt(3, 4)
    first, again, other = (
        answers(model, [reply(elements, media, temperature=2.0, seed=seed, tokens=12)])[0] for seed in (1, 1, 2)
    )
    assert first == again != other
    beside = [reply(elements, media, temperature=2.0, seed=1, tokens=12), reply(*prompt(6, 1, seed=5), tokens=9)]
    assert answers(model, beside)[0] == first


def test_log_probabilities_are_those_of_the_model(model: Any) -> None:
    elements, media = prompt(3, 4)
    one = reply(elements, media, logprobs=3, tokens=4, repetition_penalty=1.5)
    ids = answers(model, [one])[0]
    assert [found.id for found in one.logprobs] == ids
    whole = reply([*elements, *ids], media).embeds(0, model.get_input_embeddings())[None]
    values = model(inputs_embeds=whole).logits[0, len(elements) - 1 : -1].log_softmax(-1)
    for found, row in zip(one.logprobs, values, strict=True):
        assert found.logprob == pytest.approx(float(row[found.id]), abs=1e-4)
        assert [token for token, _ in found.top] == row.topk(3).indices.tolist()


def test_what_ends_a_reply(model: Any) -> None:
    for seed in range(200):  # until a reply has eight different tokens, and not the end token
        elements, media = prompt(3, 4, seed=seed)
        plain = reply(elements, media, tokens=8)
        ids = answers(model, [plain])[0]
        if len({*ids, 2}) == 9:
            break
    assert (plain.finish, len(ids)) == ("length", 8)
    third, end = ids[2], ids[1]
    by_id = reply(elements, media, tokens=8, stop_token_ids=(third,))
    assert answers(model, [by_id])[0] == ids[:3]
    assert (by_id.finish, by_id.stream.text) == ("stop", "".join(f"<{i}>" for i in ids[:2]))
    by_text = reply(elements, media, tokens=8, stop=(f"<{third}>",))
    answers(model, [by_text])
    assert (by_text.finish, by_text.stream.text) == ("stop", by_id.stream.text)
    late = reply(elements, media, tokens=8, stop=(f"<{third}>",), min_new_tokens=5)
    assert answers(model, [late])[0] == ids
    assert late.stream.text == plain.stream.text
    for ignore_eos, count in ((False, 2), (True, 8)):
        sampling = Sampling(max_new_tokens=8, ignore_eos=ignore_eos)
        ended = Generation(elements, media, plain.stream.tokenizer, sampling, end_ids=frozenset((end,)))
        assert len(answers(model, [ended])[0]) == count


def test_replies_join_leave_and_are_cancelled(model: Any) -> None:
    parts = [prompt(2, 3, seed=1), prompt(5, 7, seed=2), prompt(1, 1, seed=3)]
    alone = [answers(model, [reply(*part, tokens=20)])[0] for part in parts]
    decoder, (first, second, third) = Decoder(model), [reply(*part, tokens=20) for part in parts]
    decoder.add(first)
    decoder.step()
    decoder.add(second)
    decoder.step()
    first.cancel()
    texts = dict(decoder.step())
    assert first in texts
    assert (first.finish, first.ids) == ("cancelled", alone[0][:3])
    decoder.add(third)
    assert len(decoder) == 2
    while len(decoder):
        decoder.step()
    assert [second.ids, third.ids] == alone[1:]
    never = reply(*parts[0])
    never.cancel()
    assert (decoder.add(never), never.finish, never.ids) == ("", "cancelled", [])


def test_a_kept_prefix_is_read_once(model: Any) -> None:
    elements, media = prompt(5, 7)
    prefix = Prefix()
    first = reply(elements, media, prefix)
    ids = answers(model, [first])[0]
    again = reply([*elements, *ids, 40], media, prefix)
    answers(model, [again])
    assert (first.reused, again.reused) == (0, len(elements) + len(ids) - 1)
    other = reply([*elements[:4], 50, 51], media, prefix)
    assert answers(model, [other]) == answers(model, [reply([*elements[:4], 50, 51], media)])
    assert other.reused == 4
    changed = reply(elements, {"m0": media["m0"] + 1}, Prefix())
    assert answers(model, [changed])[0] != ids


def test_beams_end_at_stop_texts_and_keep_to_the_fewest_tokens(model: Any) -> None:
    one = reply(*prompt(3, 4), num_beams=3, tokens=6)
    assert Decoder(model).add(one) == one.stream.text == Letters().decode(one.ids)
    stop = f"<{one.ids[1]}>"
    for least in (0, 4):
        how = {"num_beams": 3, "num_return_sequences": 2, "min_new_tokens": least, "stop": (stop,)}
        found = [reply(*prompt(3, 4), tokens=6, **how) for _ in range(2)]
        first, second = answers(model, found)
        assert first != second
        for searched in found:
            assert least <= len(searched.ids) <= 6
            assert stop not in Letters().decode(searched.ids[max(least - 1, 0) : -1])
    (ids,) = answers(model, [reply(*prompt(3, 4), num_beams=3, tokens=6, repetition_penalty=50.0)])
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": math.inf}, "temperature is inf, expected at most 100"),
        ({"seed": 1 << 63}, "seed is 9223372036854775808, expected at most 9223372036854775807"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty is 1e-300, expected at least 0.01"),
        ({"num_beams": 2, "temperature": 1}, "a search, but temperature 1.0 asks for sampling"),
        ({"num_return_sequences": 3}, "raise num_beams, or set a temperature"),
        ({"num_beams": 2, "presence_penalty": 1}, "presence_penalty and frequency_penalty are not for beam search"),
    ],
)
def test_settings_out_of_range_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Sampling, values, "sampling")


class Bytes:
    """A tokenizer of single bytes; a token from 256 on is one of ``words``."""

    byte_ids: frozenset[int] = frozenset()

    def __init__(self, *words: bytes) -> None:
        self.words = [*(bytes([i]) for i in range(256)), *words]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.words[i] for i in ids).decode(errors="replace")


def deltas(tokenizer: Any, ids: Sequence[int], *stops: str) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stops)
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


@pytest.mark.parametrize("cut", [[b"a red", b"#", b"#", b"#", b"Human"], [b"a red #", b"##Hu"], [b"a red###Human: hi"]])
def test_a_stop_text_is_found_however_it_is_cut(cut: list[bytes]):
    texts, stream = deltas(Bytes(*cut), range(256, 256 + len(cut)), "END", "###")
    assert "".join(texts) == stream.text == "a red"
    assert stream.stopped == "###"


def test_what_only_begins_like_a_stop_text_is_kept():
    texts, stream = deltas(Bytes(b"## ", b"two marks", b" and #"), [256, 257, 258], "###", "END")
    assert texts == ["##", " two marks", " and", " #"]  # followed by a space, ## cannot be the beginning of ###
    assert stream.stopped is None


TEXT = st.text(st.sampled_from("a é€🎈你好\N{ZERO WIDTH JOINER}👨👩 #\n"), max_size=12)


@settings(max_examples=400, deadline=None)
@given(TEXT, st.lists(st.integers(1, 5), min_size=1, max_size=40), st.binary(max_size=3))
def test_streamed_text_is_that_of_all_ids_for_any_vocabulary_of_bytes(text: str, cuts: list[int], broken: bytes):
    """Tokens that end one character and begin the next, and bytes that are no character."""
    whole, tokens = broken + text.encode() + broken, []
    while whole:
        size = cuts[len(tokens) % len(cuts)]
        tokens, whole = [*tokens, whole[:size]], whole[size:]
    tokenizer = Bytes(*tokens)
    ids = [256 + i for i in range(len(tokens))]
    texts, stream = deltas(tokenizer, ids)
    assert "".join(texts) == stream.text == tokenizer.decode(ids).strip()


def test_streamed_text_is_that_of_all_ids_with_byte_tokens(tmp_path_factory: pytest.TempPathFactory):
    """A later byte can turn a whole run of byte tokens into replacement characters."""
    tokenizer = load_tokenizer(write_folder(tmp_path_factory.mktemp("llama"), STYLES["phi3"]))
    letters = tokenizer.encode("a red car")

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.one_of(st.sampled_from(sorted(tokenizer.byte_ids)), st.sampled_from(letters)), max_size=24))
    def check(ids: list[int]) -> None:
        texts, stream = deltas(tokenizer, ids)
        assert "".join(texts) == stream.text == tokenizer.decode(ids).strip()

    check()
    texts, _ = deltas(tokenizer, [*tokenizer.encode("a 🎈"), *letters])
    assert sum(bool(text) for text in texts) > 3  # it does not wait for the end
