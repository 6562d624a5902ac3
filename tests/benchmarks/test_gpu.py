"""The benchmark for a GPU runs through at a tiny size on a CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def gpu(benchmark: Callable[[str], Any]) -> Any:
    return benchmark("gpu")


def test_the_gpu_benchmark_runs_through(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "gpu.md"
    gpu.main(["--size", "tiny", "--device", "cpu", "--rounds", "1", "--write", str(written)])
    table = written.read_text(encoding="utf-8")
    assert capsys.readouterr().out == table
    rows = [re.split(r" *\| *", line.strip("| ")) for line in table.splitlines() if re.match(r"\| \w", line)]
    steps = [row for row in rows if row[0] in gpu.MODALITIES]
    assert [row[:2] for row in steps] == [[m, b] for m in gpu.MODALITIES for b in ("2", "4")]
    for row in steps:
        assert float(row[2]) > 0
        assert float(row[4]) > 0
        assert 5 < float(row[-2]) < 8  # near the logarithm of a vocabulary of 640
        assert float(row[-1]) < 1e-3
    assert [row[0] for row in rows if row not in steps][-1] == "2"


def test_a_batch_that_does_not_fit_ends_the_search(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = gpu.Trainer.step

    def limited(self: Any, batch: dict[str, Any]) -> Any:
        if len(batch["pieces"]) > 2:
            raise torch.OutOfMemoryError
        return step(self, batch)

    monkeypatch.setattr(gpu.Trainer, "step", limited)
    gpu.main(["--size", "tiny", "--device", "cpu", "--modalities", "image", "--rounds", "1"])
    assert re.findall(r"\| image \| (\d+)", capsys.readouterr().out) == ["2"]
