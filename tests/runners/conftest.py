"""A small embedded world, built once for all trainings of the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from lavis_chatbridge.runners import step
from lavis_chatbridge.toyworld.build import Sizes, build_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures, six clips and six sounds to train on, three of each modality to test with."""
    return build_world(tmp_path_factory.mktemp("world") / "w", Sizes(12, 6, 6, 3, 3, 2), processes=1)


@pytest.fixture(autouse=True)
def half_precision_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in half precision as on a GPU, whatever this processor is fast in."""
    monkeypatch.setattr(step, "slow_on_cpu", lambda dtype: False)
    monkeypatch.setattr("lavis_chatbridge.models.settings.slow_on_cpu", lambda dtype: False)
