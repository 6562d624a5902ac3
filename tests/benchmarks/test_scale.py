"""The benchmark of the plan at full scale, at a small size: what it proves, and that it would notice a fault."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def scale(benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = benchmark("scale")
    monkeypatch.setattr(module, "SECONDS", math.inf)  # how fast a machine under test is says nothing
    return module


def test_sixteen_ranks_lose_no_sample_and_repeat_none(
    scale: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--ranks", "16", "--samples", "30000", "--shards", "40", "--batch", "8"]
    assert scale.main([*words, "--write", str(tmp_path / "scale.md")]) == 0
    text = capsys.readouterr().out
    assert "16 ranks, 8 sources, 40 shards of up to 832 samples, 30,000 samples" in text
    assert "| source0 | 12,476 | 15 |" in text
    assert "0 lost, 0 repeated, 0 of 48 ranks with another source or other samples, 0 of 4 resumes" in text
    assert (tmp_path / "scale.md").read_text(encoding="utf-8") == text


def test_the_full_size_has_the_promised_numbers(scale: ModuleType) -> None:
    sizes = scale.sizes_of(130_000_000)
    assert (len(sizes), sum(sizes.values())) == (8, 130_000_000)
    assert scale.shards_of(sizes, scale.per_shard_of(sizes, 13_000)) == 13_000


def test_a_rank_that_reads_anothers_slice_is_noticed(scale: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"sizes": scale.sizes_of(13_000), "batch_size": 8, "world_size": 4, "seed": 42}
    plan = scale.MixturePlan(**arguments)
    right = plan.slices
    monkeypatch.setattr(plan, "slices", lambda step, ranks: right(step, np.where(ranks == 3, 2, ranks)))
    lost, repeated = scale.faults(plan, scale.walk(plan))
    assert lost > 0
    assert repeated > 0
    monkeypatch.setattr(scale.MixturePlan, "batch", lambda self, step, rank: ("source0", []))
    assert scale.disagreements(arguments, [0, 1]) == 8
