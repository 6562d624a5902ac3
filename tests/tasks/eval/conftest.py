"""Shared by the tests of evaluation."""

from __future__ import annotations

import pytest

from lavis_chatbridge.plugin.launch import Runs
from lavis_chatbridge.tasks.scoring import captions


@pytest.fixture
def cached(tmp_path_factory, monkeypatch) -> None:
    """Converted annotations go to a folder of the test run; no metric starts Java."""
    monkeypatch.setenv("CHATBRIDGE_CACHE", str(tmp_path_factory.getbasetemp() / "converted"))
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)


@pytest.fixture(scope="module")
def runs():
    """One model for all tests of a file."""
    with Runs() as one:
        yield one
