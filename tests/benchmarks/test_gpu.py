"""The benchmark for a GPU runs through at a tiny size on a CPU, and its arithmetic is that of torch's own counter."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture(scope="module")
def gpu(benchmark: Callable[[str], Any]) -> Any:
    return benchmark("gpu")


def test_the_gpu_benchmark_runs_through(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "gpu.md"
    gpu.main(["--size", "tiny", "--device", "cpu", "--rounds", "1", "--write", str(written)])
    table = written.read_text(encoding="utf-8")
    assert capsys.readouterr().out == table
    rows = [re.split(r" *\| *", line.strip("| ")) for line in table.splitlines() if re.match(r"\| \w", line)]
    assert [row[:2] for row in rows if row[0] in gpu.MODALITIES] == [[k, b] for k in gpu.MODALITIES for b in ("2", "4")]
    assert [row[1] for row in rows if row[0] == "2"] == ["dynamic", "static"]
    for row in rows:
        if row[0] in gpu.MODALITIES:
            assert float(row[2]) > 0
            assert float(row[6]) > 0
            assert 5 < float(row[-2]) < 8  # near the logarithm of a vocabulary of 640
            assert float(row[-1]) < 1e-3


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_operations_are_counted_from_shapes(gpu: Any, kind: str) -> None:
    device = torch.device("cpu")
    model = gpu.build(gpu.settings_of("tiny"), device)
    batch = gpu.batch_of(kind, 2, model.settings, gpu.TINY, device)
    trainer = gpu.Trainer(model, device)
    with gpu.seen(model) as lengths:
        tokens = trainer.step(batch).tokens
    llm = model.settings.language_model.config
    counted = gpu.work(model.settings, llm, kind, 2, lengths[0], tokens, gpu.TINY.clip)
    with sdpa_kernel(SDPBackend.MATH):  # torch counts no products inside the fused kernel of a CPU
        with torch.no_grad(), FlopCounterMode(display=False) as encoder:
            model.encode_media(kind, [medium[0] for medium in batch[kind]])
        with FlopCounterMode(display=False) as step:
            trainer.step(batch)
    assert counted.encoder == pytest.approx(encoder.get_total_flops(), rel=0.01)
    assert counted.all == pytest.approx(step.get_total_flops(), rel=0.01)


def test_real_sizes_are_those_of_the_shipped_model(gpu: Any) -> None:
    settings = gpu.settings_of("13b")
    assert (settings.vision.depth, settings.vision.width, settings.perceiver.queries) == (39, 1408, 32)
    assert settings.vision.weights is settings.language_model.weights is settings.checkpoint is None
    work = gpu.work(settings, settings.language_model.config, "image", 1, 64, 30)
    assert work.encoder == pytest.approx(2 * 0.98e9 * 257, rel=0.06)  # two operations a weight and token, and attention
    assert work.language_model == pytest.approx(4 * 12.7e9 * 64, rel=0.02)
    assert gpu.bytes_of_token(settings, 8, 100) == 2 * (13_015_864_320 - 32000 * 5120 + 8 * 100 * 2 * 40 * 5120)


@pytest.mark.parametrize(("limit", "expected"), [(3, 0), (4, 4), (7, 6), (12, 12), (13, 12), (1000, 32)])
def test_the_largest_batch_that_fits(gpu: Any, limit: int, expected: int) -> None:
    def trial(batch: int) -> None:
        if batch > limit:
            raise torch.OutOfMemoryError

    assert gpu.largest(lambda batch: gpu.fits(lambda: trial(batch)), 4, 32) == expected
