"""Runs on the oldest supported transformers, which ``make test`` puts on the path, with the Makefile's OLDEST_TESTS."""

from __future__ import annotations

import os


def test_transformers_is_the_version_asked_for():
    import transformers

    assert transformers.__version__ == os.environ.get("EXPECTED_TRANSFORMERS", transformers.__version__)


def test_lavis_imports_and_registers_the_plugins_names():
    from lavis.common.registry import registry
    from lavis.models import model_zoo

    assert set(dict(model_zoo)["chatbridge"]) >= {"tiny", "vicuna7b", "vicuna13b"}
    assert "blip2_opt" in dict(model_zoo)
    assert registry.get_runner_class("chatbridge_runner") is not None
    assert registry.get_task_class("chatbridge_alignment") is not None
    assert registry.get_processor_class("chatbridge_image_eval") is not None
