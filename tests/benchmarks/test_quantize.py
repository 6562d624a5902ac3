"""The benchmark of fewer bits runs through, and its table says that bytes are saved and numbers nearly kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_the_benchmark_runs_through(
    benchmark: Callable[[str], Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = benchmark("quantize")
    monkeypatch.setattr(script, "CAPTIONS", 6)
    written = tmp_path / "quantize.md"
    script.main(["--size", "tiny", "--write", str(written)])
    text = written.read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    rows = [
        re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if re.match(r"\| (16 bits|\dbit) ", line)
    ]
    assert [row[0] for row in rows] == ["16 bits", "8bit", "4bit"] * 2
    for plain, eight, four in (rows[:3], rows[3:]):
        assert float(plain[2]) == 1 > float(eight[2]) > float(four[2])
        of_the_logits = [float(row[3].rstrip("%")) for row in (plain, eight, four)]
        assert of_the_logits == sorted(of_the_logits)
        assert 0 < of_the_logits[0] < of_the_logits[2] < 30
        assert float(four[6]) == pytest.approx(float(plain[6]), rel=0.1)
