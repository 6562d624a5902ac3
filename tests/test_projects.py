"""Every shipped configuration opens with its command; the large ones are valid apart from absent files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lavis_chatbridge.config import read_yaml
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.runners.config import load_config

PROJECTS = Path(__file__).parents[1] / "projects" / "chatbridge"


@pytest.mark.parametrize("stage", ["align", "instruct"])
@pytest.mark.parametrize("size", ["small", "qwen3_8b", "vicuna7b", "vicuna13b"])
def test_large_configurations_lack_nothing_but_files(size: str, stage: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CHATBRIDGE_DATA", str(tmp_path))
    monkeypatch.setenv("CHATBRIDGE_WEIGHTS", str(tmp_path))
    for part in ("siglip2-base-patch16-224", "siglip2-so400m-patch14-384", "whisper-small", "whisper-large-v3"):
        (tmp_path / part).mkdir()
    with pytest.raises(ConfigError) as caught:
        load_config(PROJECTS / size / f"{stage}.yaml")
    message = str(caught.value)
    assert "missing files or folders" in message
    assert not re.search(r"unknown|expected|is not one of|give either", message), message


@pytest.mark.parametrize("size", ["vicuna7b", "vicuna13b"])
def test_large_configurations_follow_the_paper(size: str) -> None:
    align, instruct = (read_yaml(PROJECTS / size / f"{stage}.yaml").run for stage in ("align", "instruct"))
    assert (align.max_iters, align.batch_size_train * 8 * align.accum_grad_iters) == (150_000, 256)
    assert (instruct.max_iters, instruct.batch_tokens) == (10_000, 4096)


@pytest.mark.parametrize("path", sorted(PROJECTS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_each_opens_with_the_command_that_runs_it(path: Path) -> None:
    head = path.read_text().split("\nmodel:")[0]
    assert all(line.startswith("#") or not line for line in head.splitlines())
    assert re.search(r"-m lavis\.(train|evaluate) --cfg-path|chatbridge evaluate --suite", head), head
