"""The benchmarks as modules, loaded once each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def benchmark(repository: Path) -> Callable[[str], Any]:
    """A benchmark by its name; its folder is on the path meanwhile, as it is for the script itself."""

    def load(name: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(repository / "benchmarks"))
            return importlib.import_module(name)

    return load
