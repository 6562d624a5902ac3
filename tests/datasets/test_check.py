"""check-data: what it counts, what it calls a fault, and the exit code."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from lavis_chatbridge import cli
from lavis_chatbridge.datasets.check import check_file
from lavis_chatbridge.datasets.settings import DataSettings
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.schema import Medium, Sample, to_record, write_jsonl


def command(*arguments):
    return cli.main(["check-data", *map(str, arguments)])


def write(path, *media):
    """A JSONL with a sample per medium."""
    write_jsonl(path, [Sample(str(i), (medium,), ("c",)) for i, medium in enumerate(media)])
    return path


def test_every_kind_of_fault_is_counted_and_placed(pictures, capsys):
    (pictures / "p1.png").write_bytes(b"no picture at all")
    (pictures / "p2.png").write_bytes(b"")
    (pictures / "p3.png").unlink()
    (pictures / "p4.png").unlink()
    (pictures / "p4.png").symlink_to("/etc/hostname")
    file = pictures / "pictures.jsonl"
    lines = file.read_text().splitlines()
    long = Sample("long", turns=(Message("user", "q" * 3000), Message("assistant", " ")), task="text_qa", source="mine")
    lines += [lines[0], "{", '{"id": "x"}', json.dumps(to_record(long))]
    file.write_text("\n".join(lines) + "\n")
    assert command(file, "--json", "--decode") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["faults"] == {
        "unreadable medium": 2,
        "missing medium": 1,
        "medium outside the root": 1,
        "duplicate id": 1,
        "malformed line": 2,
        "overlong text": 1,
        "empty text": 1,
    }
    assert found["lines"] == 16
    assert found["modalities"] == {"image": 13, "text": 1}
    assert found["tasks"] == {"captions": 13, "text_qa": 1}
    assert found["sources"] == {"mine": 1}
    assert found["examples"]["duplicate id"] == [f"{file}:13: an earlier sample has the id 's0'"]
    assert found["examples"]["missing medium"][0].startswith(f"{file}:4: {pictures}/p3.png")
    without = check_file(file)
    assert without.examples["unreadable medium"] == [f"{file}:3: {pictures}/p2.png: the file is empty"]


def test_a_sound_too_short_for_training_is_unreadable(tmp_path):
    soundfile.write(tmp_path / "short.wav", np.zeros(160), 16_000)
    file = write(tmp_path / "a.jsonl", Medium("audio", str(tmp_path / "short.wav")))
    [fault] = check_file(file, decode=True).examples["unreadable medium"]
    assert fault.endswith("short.wav: 10 ms of sound are less than 25 ms")


@pytest.mark.parametrize("name", ["none", "data/none", "../none", "data/none.csv", "data/none/none"])
@pytest.mark.parametrize("options", [[], ["--reader", "huggingface"]])
def test_a_missing_path_is_no_id_of_the_hub(tmp_path, monkeypatch, capsys, name, options):
    (tmp_path / "work" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert command(name, *options) == 2
    assert f"{Path(name).name} does not exist" in capsys.readouterr().err
    section = DataSettings(reader="huggingface", data_root=str(tmp_path / "work"), splits={"train": name})
    monkeypatch.chdir(tmp_path)
    assert section.missing() == [str((tmp_path / "work" / name).resolve())]


def test_only_the_first_examples_are_shown_and_an_empty_text_is_a_warning(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("{\n" * 9)
    assert command(tmp_path / "a.jsonl") == 1
    out = capsys.readouterr().out
    assert out.count("not JSON") == 5
    assert "... and 4 more" in out
    write_jsonl(tmp_path / "a.jsonl", [Sample("a", captions=("c", ""))])
    assert command(tmp_path / "a.jsonl") == 0
    assert "warning: empty text: 1" in capsys.readouterr().out


def test_a_pattern_of_shards(pictures, monkeypatch, capsys):
    monkeypatch.chdir(pictures)
    (pictures / "tars").mkdir()
    for number in range(2):
        (pictures / f"{number}.txt").write_text("grey")
        with tarfile.open(f"tars/{number}.tar", "w") as tar:
            tar.add(f"p{number}.png", f"{number}.png")
            tar.add(f"{number}.txt")
    assert command("tars/*.tar", "--decode") == 0
    assert "tars/*.tar: 2 samples" in capsys.readouterr().out
    assert command("none/*.tar") == 2
    assert "none/*.tar does not exist" in capsys.readouterr().err
    assert cli.main(["shard", "pictures.jsonl", "--output", "own"]) == 0
    assert command("own/pictures-00000.tar") == 2
    assert "is a shard of chatbridge shard: name its JSONL, own/pictures.jsonl" in capsys.readouterr().err


def test_media_relative_to_another_folder(pictures, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = (pictures / "pictures.jsonl").rename(tmp_path / "elsewhere/pictures.jsonl")
    assert command(moved) == 1
    assert command(moved, "--root", pictures, "--decode") == 0


def test_short_shards_and_empty_files(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"x" * 100)
    file = write(tmp_path / "a.jsonl", *(Medium("image", str(tmp_path / "s.tar"), at, 50) for at in (0, 50, 60)))
    assert check_file(file).faults == {"unreadable medium": 1}
    file.write_text("\n")
    assert not check_file(file).usable


def test_media_shared_with_evaluation_data_are_found(pictures, capsys):
    copy = pictures / "copy.png"
    copy.write_bytes((pictures / "p3.png").read_bytes())
    named = pictures / "test" / "p5.jpg"
    named.parent.mkdir()
    named.write_bytes(b"another picture of the same name")
    other = [Medium("image", str(path)) for path in (copy, named)]
    against = [pictures / "pictures.jsonl", "--against", write(pictures / "test.jsonl", *other)]
    assert command(*against) == 1
    out = capsys.readouterr().out
    by_content = "FAULT: medium of the evaluation data, by content: 1\n"
    assert f"{by_content}      {pictures}/pictures.jsonl:4: {pictures}/p3.png" in out
    assert "warning: medium of the evaluation data, by name: 1" in out
    write(pictures / "test.jsonl", *other[1:])
    assert command(*against) == 0
