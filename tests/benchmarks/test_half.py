"""benchmarks/half.py runs through, and its baseline really is torch's own product."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lavis_chatbridge.models import half_precision


@pytest.fixture
def half(benchmark: Callable[[str], Any]) -> Any:
    return benchmark("half")


def test_the_table_has_a_row_for_each_product_and_part(half: Any) -> None:
    text = half.report("tiny", 1, ["--size", "tiny"])
    products = re.findall(r"^\| (\d+) \|(?: \d+\.\d \|){6}$", text, flags=re.MULTILINE)
    assert [int(rows) for rows in products] == list(half.ROWS)
    parts = re.findall(r"^\| (\D+) \|(?: -?\d+\.\d\d \|){3}$", text, flags=re.MULTILINE)
    assert parts == ["image", "first token", "each more"]


def test_the_baseline_multiplies_in_bf16(half: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "is_slow_on_cpu", lambda dtype: True)
    used: list[str] = []

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        used.append("ours")
        return x

    monkeypatch.setattr(half_precision._LinearInFp32, "apply", ours)
    x, weight = torch.ones(9, 4, dtype=torch.bfloat16), torch.ones(3, 4, dtype=torch.bfloat16)
    with half.torchs_own():
        assert torch.equal(half_precision.linear(x, weight), torch.full((9, 3), 4.0, dtype=torch.bfloat16))
    assert not used
    half_precision.linear(x, weight)
    assert used == ["ours"]
