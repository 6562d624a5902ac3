"""Shared by the tests of evaluation."""

import pytest

from lavis_chatbridge.plugin.launch import Runs
from lavis_chatbridge.tasks.scoring import captions


@pytest.fixture(scope="package", autouse=True)
def cached(tmp_path_factory):
    """Converted annotations go to a folder of the test run; no metric starts Java."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHATBRIDGE_CACHE", str(tmp_path_factory.mktemp("converted")))
        patch.setattr(captions.shutil, "which", lambda name: None)
        yield


@pytest.fixture(scope="module")
def runs():
    """One model for all tests of a file."""
    with Runs() as one:
        yield one
