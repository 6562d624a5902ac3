"""The estimate of a training's time: counted products over a rate, for the batch and the parts that really run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lavis_chatbridge.models.weights_command import model_settings
from lavis_chatbridge.models.work import work
from lavis_chatbridge.plugin import step_time
from lavis_chatbridge.runners.settings import RunSettings

LLAMA_13B = {
    "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    "vocab_size": 32_000,
}  # fmt: skip
LONGEST = 150


def seconds(rate: float = 1e15, **run: Any) -> dict[str, tuple[float, float]]:
    settings = dataclasses.replace(model_settings("vicuna13b"), max_text_length=LONGEST)
    run_settings = RunSettings(task="chatbridge_alignment", **({"max_iters": 10, "batch_size_train": 32} | run))
    return step_time.step_seconds(settings, LLAMA_13B, run_settings, rate)  # type: ignore[return-value]


def test_a_step_of_the_paper_by_hand() -> None:
    """EVA-ViT-G reads 257 tokens with 0.98 G weights, the language model 12.7 G for each position, both ways."""
    short, long = seconds()["image"]
    encoder, rows = 32 * 2 * 0.98e9 * 257, 32 * 4 * 12.7e9
    assert short == pytest.approx((encoder + rows * (32 + step_time.SHORT)) / 1e15, rel=0.05)
    assert long == pytest.approx((encoder + rows * (32 + LONGEST)) / 1e15, rel=0.05)
    assert seconds()["video"][0] - short == pytest.approx(3 * encoder / 1e15, rel=0.1)


def test_twice_the_rate_is_half_the_time_and_micro_batches_add_up() -> None:
    once, fast, thrice = seconds(), seconds(rate=2e15), seconds(accum_grad_iters=3)
    for kind, pair in once.items():
        assert [2 * value for value in fast[kind]] == pytest.approx(pair)
        assert [value / 3 for value in thrice[kind]] == pytest.approx(pair)


def test_features_from_a_cache_cost_no_encoder() -> None:
    settings = dataclasses.replace(model_settings("vicuna13b"), max_text_length=LONGEST)
    for kind, (short, _) in seconds(feature_cache="features").items():
        row = 32 + step_time.SHORT
        parts = work(settings, LLAMA_13B, kind, 32, row, 32 * step_time.SHORT)  # type: ignore[arg-type]
        assert short == pytest.approx((parts.bridge + parts.language_model) / 1e15)
        assert seconds()[kind][0] == pytest.approx(parts.all / 1e15)


def test_a_batch_in_tokens_has_fewer_of_the_longest() -> None:
    short, long = seconds(batch_tokens=3640, feature_cache="features")["image"]
    assert long == pytest.approx(seconds(batch_size_train=20, feature_cache="features")["image"][1])
    assert short == pytest.approx(seconds(batch_size_train=56, feature_cache="features")["image"][0])


def test_a_rate_is_measured() -> None:
    assert 1e7 < step_time.products_per_second(torch.device("cpu"), torch.float32) < 1e14


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0123, "12 ms"), (0.21, "210 ms"), (1.64, "1.6 s"), (59.6, "60 s"), (119, "119 s"), (600, "10 min")],
)
def test_durations_have_two_digits_and_a_unit(seconds: float, words: str) -> None:
    assert step_time.in_words(seconds) == words


def test_long_durations() -> None:
    assert [step_time.in_words(hours * 3600) for hours in (1.9, 5, 47, 48, 2500)] == [
        "114 min", "5 h", "47 h", "2 days", "104 days"
    ]  # fmt: skip
