"""Readers of your own data: tables of Hugging Face ``datasets``, and chat messages of fine-tuning tools."""

from __future__ import annotations

import json
import os
import sys
from io import BytesIO

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from lavis_chatbridge import cli
from lavis_chatbridge.datasets.dataset import media_content
from lavis_chatbridge.datasets.readers import READERS, Origin
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.schema import Medium, SampleFile


def picture(grey):
    out = BytesIO()
    Image.new("RGB", (8, 8), (grey,) * 3).save(out, "PNG")
    return out.getvalue()


def run(*words):
    return cli.main([*map(str, words)])


def read(reader, path, row=None):
    """The samples of a file, which is first written with one row."""
    if row is not None:
        path.write_text(json.dumps(row) + "\n" if path.suffix == ".jsonl" else json.dumps([row]))
    return list(READERS[reader](Origin("own", {"file": [str(path)]}, str(path.parent))))


@pytest.fixture
def table(tmp_path):
    """Three pictures with captions, as bytes in a Parquet file."""
    images = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(3)]
    columns = {"photo": images, "text": [f"grey {i}" for i in range(3)], "number": [7, 8, 9]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "photos.parquet")
    return tmp_path / "photos.parquet"


def test_a_table_of_bytes_becomes_a_jsonl_and_a_tar(tmp_path, table, capsys):
    columns = ["--options", "columns.image=photo", "columns.id=number"]
    assert run("convert-data", table, tmp_path / "out" / "own.jsonl", "--skip-missing", *columns) == 0
    assert "3 samples" in capsys.readouterr().out
    samples = list(SampleFile(tmp_path / "out" / "own.jsonl"))
    assert [(s.id, s.captions) for s in samples] == [("7", ("grey 0",)), ("8", ("grey 1",)), ("9", ("grey 2",))]
    assert {s.media[0].path for s in samples} == {str(tmp_path / "out" / "own.tar")}
    assert run("convert-data", table, tmp_path / "shards", "--shards", *columns) == 0
    for path in (tmp_path / "out" / "own.jsonl", tmp_path / "shards" / "photos.jsonl"):
        assert [media_content(sample.media[0]) for sample in SampleFile(path)] == [picture(i) for i in range(3)]


def test_faults_of_a_table_are_one_line(tmp_path, table, capsys):
    (tmp_path / "cells.csv").write_text("image,captions\na.png\n")
    (tmp_path / "head.csv").write_text("image,captions\n")
    (tmp_path / "row.csv").write_text("image,captions\na.png,x\na.png,\n")
    for name, option, fault in (
        ("photos.parquet", "columns.imge=photo", "unknown key options.columns.imge, did you mean 'image'?"),
        ("photos.parquet", "columns.image=foto", "has no column 'foto'; it has photo, text, number"),
        ("none.parquet", "columns.image=photo", "none.parquet does not exist"),
        ("cells.csv", "columns.image=image", "cells.csv: datasets cannot read it: Couldn't cast array of type double"),
        ("head.csv", "columns.image=image", "head.csv: has no rows"),
        ("row.csv", "columns.image=image", "row.csv: row 2: captions is None, expected text"),
        ("row.csv", "colums.image=image", "unknown key options.colums, did you mean 'columns'?"),
    ):
        assert run("convert-data", tmp_path / name, tmp_path / "x.jsonl", "--options", option) == 2
        assert fault in capsys.readouterr().err
    assert not list(tmp_path.glob("*x.*"))


def test_existing_files_are_not_overwritten(tmp_path, table, capsys):
    (tmp_path / "chat.jsonl").write_text(content := json.dumps(ALPACA) + "\n")
    assert run("convert-data", tmp_path / "chat.jsonl", tmp_path / "chat.jsonl") == 2
    assert "chat.jsonl exists: name a new file" in capsys.readouterr().err
    assert (tmp_path / "chat.jsonl").read_text() == content
    (tmp_path / "own.tar").write_text("mine")
    assert run("convert-data", table, tmp_path / "own.jsonl", "--options", "columns.image=photo") == 2
    assert "own.tar exists: name a new file" in capsys.readouterr().err
    assert run("convert-data", tmp_path / "chat.jsonl", tmp_path / "own.jsonl") == 0  # needs no tar, and keeps this one
    assert (tmp_path / "own.tar").read_text() == "mine"


def test_a_conversion_that_ends_between_its_two_files_leaves_no_jsonl(tmp_path, table, monkeypatch):
    replace, written = os.replace, []

    def only_once(source, target):
        if written:
            raise KeyboardInterrupt
        written.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", only_once)
    assert run("convert-data", table, tmp_path / "own.jsonl", "--options", "columns.image=photo") == 130
    assert written == ["own.tar"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.tar", "photos.parquet"]


@pytest.mark.parametrize(("modality", "name"), [("image", "a.png"), ("audio", "a.wav")])
def test_a_folder_of_media_needs_a_table_of_them(tmp_path, capsys, modality, name):
    (tmp_path / name).write_bytes(b"not opened")
    assert run("check-data", tmp_path) == 2
    assert "needs a metadata.csv or metadata.jsonl; or name its annotations" in capsys.readouterr().err
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "grey or silent"}) + "\n")
    [sample] = read("huggingface", tmp_path)
    assert (sample.media, sample.captions) == ((Medium(modality, str(tmp_path / name)),), ("grey or silent",))


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.tsv", "\t"), ("T.TSV", "\t")])
def test_tables_of_text_are_detected(tmp_path, capsys, caplog, name, delimiter):
    (tmp_path / "a.png").write_bytes(picture(5))
    (tmp_path / name).write_text(f"photo{delimiter}text\na.png{delimiter}grey\n")
    assert run("check-data", tmp_path / name, "--decode", "--options", "columns.image=photo") == 0
    assert "image                                      1" in capsys.readouterr().out
    [sample] = read("huggingface", tmp_path / name)
    assert sample.media == ()
    assert "no column of media; set it, as in options.columns.image=NAME; found photo, text" in caplog.text


def test_questions_and_messages_of_a_table(tmp_path):
    talk = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "Grey."}]
    [chat] = read("huggingface", tmp_path / "chat.jsonl", {"messages": talk, "image": "a.png"})
    assert chat.turns == (Message("user", "What is it?", ("image",)), Message("assistant", "Grey."))
    [ask] = read("huggingface", tmp_path / "a.jsonl", {"question": "What?", "answers": ["a", "b"], "image": "a.png"})
    assert (ask.turns[1], ask.answers) == (Message("assistant", "a"), ("a", "b"))
    assert ask.media == chat.media == (Medium("image", str(tmp_path / "a.png")),)


def said(*contents, role="role", content="content", speakers=("user", "assistant")):
    return [{role: speakers[i % 2], content: text} for i, text in enumerate(contents)]


SHAREGPT = {
    "conversations": said(
        "<image>What is it?", "A bus.", "And here?\n<image>", "A dog.",
        role="from", content="value", speakers=("human", "gpt"),
    ),
    "images": ["a.png", "b.png"],
}  # fmt: skip
MESSAGES = {
    "messages": [{"role": "system", "content": "Be short."}, *said("<video>What sounds?", "A bell.")],
    "videos": ["c.mp4"],
    "audios": [{"path": "d.wav"}],
}
_ASKED = [{"type": "text", "text": "What is it?"}, {"type": "image"}]
TYPED = {"messages": said(_ASKED, [{"type": "text", "text": "A bus."}]), "images": ["a.png"]}
ALPACA = {"instruction": "Name the colour.", "input": "<image>", "output": "Red.", "images": ["a.png"]}
COMPLETION = {"prompt": said("Name <it> <image>"), "completion": said("Red.", speakers=["assistant"])}


@pytest.mark.parametrize(
    ("row", "turns", "paths"),
    [
        (
            SHAREGPT,
            [("What is it?", ("image",)), ("A bus.", ()), ("And here?", ("image",)), ("A dog.", ())],
            ["a.png", "b.png"],
        ),
        (MESSAGES, [("Be short.\nWhat sounds?", ("audio", "video")), ("A bell.", ())], ["d.wav", "c.mp4"]),
        (TYPED, [("What is it?", ("image",)), ("A bus.", ())], ["a.png"]),
        (ALPACA, [("Name the colour.", ("image",)), ("Red.", ())], ["a.png"]),
        (COMPLETION | {"images": ["a.png"]}, [("Name <it>", ("image",)), ("Red.", ())], ["a.png"]),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_messages_of_fine_tuning_tools(tmp_path, row, turns, paths, form):
    [sample] = read("messages", tmp_path / f"chat.{form}", row)
    assert [(turn.text, turn.media) for turn in sample.turns] == turns
    assert [turn.role for turn in sample.turns] == ["user", "assistant"] * (len(turns) // 2)
    assert [medium.path for medium in sample.media] == [str(tmp_path / name) for name in paths]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**SHAREGPT, "images": ["a.png"]}, "the list images has no medium for <image>"),
        ({**ALPACA, "images": ["../a.png"]}, "leaves the media root"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role is 'tool', expected system, user or assistant"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "must alternate between user and assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "type is 'file', expected text, image"),
        ({"text": "x"}, "output is None, expected text"),
    ],
)
def test_faults_of_messages_are_named(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read("messages", tmp_path / "chat.jsonl", row)


def test_check_data_names_the_first_fault_of_a_reader(tmp_path, capsys):
    (tmp_path / "chat.jsonl").write_text(json.dumps(ALPACA | {"images": []}))
    assert run("check-data", tmp_path / "chat.jsonl") == 2
    assert "chat.jsonl:1: the list images has no medium" in capsys.readouterr().err


def test_media_outside_the_folder_of_the_jsonl_need_an_option(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(picture(5))
    (tmp_path / "a.csv").write_text("image,text\na.png,grey\n")
    assert run("convert-data", tmp_path / "a.csv", tmp_path / "in.jsonl") == 0
    assert "media are outside" not in capsys.readouterr().out
    assert run("convert-data", tmp_path / "a.csv", out := tmp_path / "out" / "a.jsonl") == 0
    assert f"media are outside {out.parent}: use it with --allow-outside, or" in capsys.readouterr().out
    assert (run("check-data", tmp_path / "in.jsonl"), run("check-data", out, "--allow-outside")) == (0, 0)


def test_without_the_package_datasets_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'lavis-chatbridge\[data\]'"):
        list(READERS["huggingface"](Origin("own", {"file": ["org/name"]}, str(tmp_path))))
