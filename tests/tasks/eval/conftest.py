"""Shared by the tests of evaluation: the data of all suites, written once, and a way to run suites in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tasks.eval import layouts

SHORT = ["run.num_workers=0", "run.max_len=6", "run.min_len=1", "run.device=cpu", "model.checkpoint=null"]
"""Overrides that make a run of the tiny model quick; its bridge is then random."""


@pytest.fixture(scope="session")
def benchmark_data(tmp_path_factory) -> Path:
    """A data root with three samples of every benchmark."""
    return layouts.build(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture
def cached(tmp_path_factory, monkeypatch) -> None:
    """Converted annotations go to a folder of the test run; no metric starts Java."""
    from lavis_chatbridge.tasks.scoring import captions

    monkeypatch.setenv("CHATBRIDGE_CACHE", str(tmp_path_factory.getbasetemp() / "converted"))
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
