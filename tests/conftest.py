"""What every test shares: an offline environment with few threads, and the folder of golden numbers."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import av  # noqa: F401  before LAVIS, which loads decord, whose libvpx would take the place of PyAV's when VP9 is encoded
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Set before torch and the Hugging Face libraries are imported: they read these once. Subprocesses inherit them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# A job in a shell's background ignores Ctrl-C, and so do its subprocesses. Some tests send it to them.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of golden numbers: ``GOLDEN_DIR``, or the copy beside the tests."""
    return Path(os.environ.get("GOLDEN_DIR") or ROOT / "tests" / "golden")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT
