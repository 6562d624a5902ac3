"""docs/data.md on your own data: its three ways of three commands each, and its reader and row for a format."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import yaml
from PIL import Image

from lavis_chatbridge.datasets.readers import READERS
from tests.chat.building import sound
from tests.test_guides import ROOT, blocks, commands, run

GUIDE = ROOT / "docs" / "data.md"
CALLED = {"run.yaml": "mine", "table.yaml": "table", "chat.yaml": "chat"}


def picture(grey):
    out = BytesIO()
    Image.new("RGB", (32, 32), (grey, 60, 0)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The guide's three kinds of files, five samples each."""
    data = tmp_path / "my_data"
    (data / "pictures").mkdir(parents=True)
    (data / "sounds").mkdir()
    (data / "pictures" / "tea.jpg").write_bytes(picture(200))
    (data / "sounds" / "bell.wav").write_bytes(sound())
    lines = [json.loads(line) for line in next(b.text for b in blocks(GUIDE) if not b.language).splitlines()]
    five = [{**lines[i % 2], "id": str(i)} for i in range(5)]
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in five))
    photos = [{"bytes": picture(i), "path": f"{i}.jpg"} for i in range(5)]
    table = pyarrow.table({"photo": photos, "text": ["a red circle"] * 5})
    pyarrow.parquet.write_table(table, data / "photos.parquet")
    talk = [{"from": "human", "value": "<image>what is it ?"}, {"from": "gpt", "value": "a red circle"}]
    chats = [json.dumps({"conversations": talk, "images": ["pictures/tea.jpg"]}) for _ in range(5)]
    (data / "chat.jsonl").write_text("\n".join(chats) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHATBRIDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CHATBRIDGE_DATA", raising=False)
    return tmp_path


@pytest.mark.parametrize("config", CALLED)
def test_the_guides_three_commands(folder, config):
    found = blocks(GUIDE)
    at = next(i for i, block in enumerate(found) if block.text.startswith(f"# my_data/{config}"))
    (folder / "my_data" / config).write_text(found[at].text)
    three = commands(found[at + 1].text)
    assert len(three) == 3
    for command in three:
        status, printed = run(command)
        assert status == 0, printed[-3000:]
    [path] = folder.glob(f"output/{CALLED[config]}/result/test*.jsonl")
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(record["sample_id"] for record in written) == [str(i) for i in range(5)]
    modalities = {"/image", "/audio"} if config == "run.yaml" else {""}
    assert {record["source"] for record in written} == {f"chatbridge_jsonl{modality}" for modality in modalities}


def test_a_row_and_a_reader_of_ten_lines_make_a_data_set(tmp_path, monkeypatch):
    registry = pytest.importorskip("lavis.common.registry").registry
    builders = pytest.importorskip("lavis_chatbridge.datasets.builders")
    python = next(block.text for block in blocks(GUIDE) if block.language == "python")
    row = next(block.text for block in blocks(GUIDE) if "align_birds" in block.text)
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
