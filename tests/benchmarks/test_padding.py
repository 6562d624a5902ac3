"""The benchmark of padding counts what the package's own plan and layout make of a source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest


def test_similar_lengths_leave_little_padding_in_batches_of_the_budget(benchmark: Callable[[str], Any]) -> None:
    script = benchmark("padding")
    run, longest = script.settings_of("instruct.yaml")
    assert run["batch_tokens"] == 4096
    assert run["group_by_length"]
    mixture = {
        "VQAv2": dataclasses.replace(script.STAGE_2["VQAv2"], share=2000),
        "one": script.Texts(1000, "", ("image",), script.Words(5, 0)),
    }
    asked, plain = script.rows(mixture, run, longest, steps=1)
    assert (asked.share, plain.share) == pytest.approx((2 / 3, 1 / 3))
    assert 3300 < asked.grouped.positions < 4600
    assert asked.grouped.padding < 0.1 < asked.random.padding
    assert 1 <= asked.grouped.wait < 1.2
    found = [
        script.Row("a", 0.5, 4, script.Order(100, 0.5, 1.2), script.Order(100, 0.1, 1.0)),
        script.Row("b", 0.5, 4, script.Order(300, 0.1, 1.1), script.Order(300, 0.02, 1.0)),
    ]
    assert script.mixed(found, grouped=False) == pytest.approx(0.2)
    table = script.table({"Stage 2": found}, 1)
    assert "| a | 50.0% | 4 | 100 | 50.0% | 10.0% | 1.20 | 1.00 |" in table
    assert "| all | | | | 20.0% | **4.0%** | | |" in table
