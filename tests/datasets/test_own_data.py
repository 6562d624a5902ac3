"""docs/data.md's reader and row for a format of one's own; tests/test_guides.py runs the guide's commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
import yaml

from lavis_chatbridge.datasets.readers import READERS
from tests.test_guides import ROOT, blocks


def test_a_row_and_a_reader_of_ten_lines_make_a_data_set(tmp_path, monkeypatch):
    registry = pytest.importorskip("lavis.common.registry").registry
    builders = pytest.importorskip("lavis_chatbridge.datasets.builders")
    page = blocks(ROOT / "docs" / "data.md")
    python = next(text for language, text in page if language == "python")
    row = next(text for _, text in page if "align_birds" in text)
    body = python[python.index("def birds") : python.index("READERS[")]
    assert len(body.strip().splitlines()) <= 10
    monkeypatch.setitem(READERS, "birds", None)
    exec(compile(python, "data.md", "exec"), {"__name__": "guide"})
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "birds.yaml").write_text(row)
    monkeypatch.setattr(builders, "CONFIG_FOLDER", rows)
    monkeypatch.setitem(registry.mapping["builder_name_mapping"], "align_birds", None)
    registry.mapping["builder_name_mapping"].pop("align_birds")
    builders.register_builders()
    (tmp_path / "birds" / "audio").mkdir(parents=True)
    soundfile.write(tmp_path / "birds" / "audio" / "a.wav", [0.0, 0.1] * 8000, 16_000)
    (tmp_path / "birds" / "train.csv").write_text("file,song\na.wav,two falling notes\n")
    monkeypatch.setenv("CHATBRIDGE_CACHE", str(tmp_path / "cache"))
    section = {**yaml.safe_load(row)["datasets"]["align_birds"], "data_root": str(tmp_path)}
    [source] = registry.get_builder_class("align_birds")(section).build_datasets()["train"].sources
    assert source[0]["text_output"] == "two falling notes\n"
    assert len(source[0]["audio"]) == 1
    assert source.name == "align_birds"
    assert Path(source.sample(0).media[0].path) == tmp_path / "birds" / "audio" / "a.wav"
