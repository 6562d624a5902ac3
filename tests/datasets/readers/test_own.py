"""Readers of your own data: tables of Hugging Face ``datasets``, and chat messages of fine-tuning tools."""

from __future__ import annotations

import json
import os
from io import BytesIO

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
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


def tone():
    out = BytesIO()
    soundfile.write(out, np.zeros(1600, np.float32), 16_000, format="WAV")
    return out.getvalue()


def convert(*words):
    return cli.main(["convert-data", *map(str, words)])


def opened(medium):
    source = media_content(medium)
    return np.asarray(Image.open(BytesIO(source) if isinstance(source, bytes) else source))[0, 0, 0]


@pytest.fixture
def table(tmp_path):
    """Three pictures with captions, as bytes in a Parquet file."""
    images = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(3)]
    columns = {"photo": images, "text": [f"grey {i}" for i in range(3)], "number": [7, 8, 9]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "photos.parquet")
    return tmp_path / "photos.parquet"


def test_a_table_of_bytes_becomes_a_jsonl_and_a_tar(tmp_path, table, capsys):
    columns = ["--options", "columns.image=photo", "columns.id=number"]
    assert convert(table, tmp_path / "out" / "own.jsonl", "--skip-missing", *columns) == 0
    assert "3 samples" in capsys.readouterr().out
    samples = list(SampleFile(tmp_path / "out" / "own.jsonl"))
    assert [(s.id, s.captions) for s in samples] == [("7", ("grey 0",)), ("8", ("grey 1",)), ("9", ("grey 2",))]
    assert [opened(s.media[0]) for s in samples] == [0, 1, 2]
    assert {s.media[0].path for s in samples} == {str(tmp_path / "out" / "own.tar")}
    assert convert(table, tmp_path / "shards", "--shards", *columns) == 0
    assert [opened(s.media[0]) for s in SampleFile(tmp_path / "shards" / "photos.jsonl")] == [0, 1, 2]


def test_columns_are_checked(tmp_path, table, capsys):
    for name, option, fault in (
        ("photos", "columns.imge=photo", "unknown key options.columns.imge, did you mean 'image'?"),
        ("photos", "columns.image=foto", "has no column 'foto'; it has photo, text, number"),
        ("none", "columns.image=photo", "none.parquet does not exist"),
    ):
        assert convert(tmp_path / f"{name}.parquet", tmp_path / "x.jsonl", "--options", option) == 2
        assert fault in capsys.readouterr().err
    assert not list(tmp_path.glob("x.*"))


def test_existing_files_are_not_overwritten(tmp_path, table, capsys):
    (tmp_path / "chat.jsonl").write_text(content := json.dumps(ALPACA) + "\n")
    assert convert(tmp_path / "chat.jsonl", tmp_path / "chat.jsonl") == 2
    assert "chat.jsonl exists: name a new file" in capsys.readouterr().err
    assert (tmp_path / "chat.jsonl").read_text() == content
    (tmp_path / "own.tar").write_text("mine")
    assert convert(table, tmp_path / "own.jsonl", "--options", "columns.image=photo") == 2
    assert "own.tar exists: name a new file" in capsys.readouterr().err
    assert convert(tmp_path / "chat.jsonl", tmp_path / "own.jsonl") == 0  # needs no tar, and keeps this one
    assert (tmp_path / "own.tar").read_text() == "mine"


def test_a_table_with_a_cell_of_another_type_is_one_line(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("image,captions\na.png\n")
    assert convert(tmp_path / "t.csv", tmp_path / "x.jsonl") == 2
    assert "t.csv: datasets cannot read it: Couldn't cast array of type double" in capsys.readouterr().err
    assert not list(tmp_path.glob("*x.*"))


def test_a_conversion_that_ends_between_its_two_files_leaves_no_jsonl(tmp_path, table, monkeypatch):
    replace, written = os.replace, []

    def only_once(source, target):
        if written:
            raise KeyboardInterrupt
        written.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", only_once)
    assert convert(table, tmp_path / "own.jsonl", "--options", "columns.image=photo") == 130
    assert written == ["own.tar"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.tar", "photos.parquet"]


@pytest.mark.parametrize("name", ["imagefolder", "audiofolder"])
def test_folders_of_media_are_read(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    ending, content = ("png", picture(5)) if name == "imagefolder" else ("wav", tone())
    (folder / f"a.{ending}").write_bytes(content)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": f"a.{ending}", "text": "grey or silent"}) + "\n")
    [sample] = READERS["huggingface"](Origin("own", {"file": [str(folder)]}, str(folder)))
    modality = "image" if name == "imagefolder" else "audio"
    assert (sample.modality, sample.captions) == (modality, ("grey or silent",))
    assert sample.media[0] == Medium(modality, str(folder / f"a.{ending}"))


def test_a_folder_of_media_needs_a_table_of_them(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(picture(5))
    (tmp_path / "train.jsonl").write_text('{"id": "1", "captions": ["c"]}\n')
    assert cli.main(["check-data", str(tmp_path)]) == 2
    assert "needs a metadata.csv or metadata.jsonl; or name its annotations" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.tsv", "\t"), ("T.TSV", "\t")])
def test_tables_of_text_are_detected(tmp_path, capsys, name, delimiter):
    (tmp_path / "a.png").write_bytes(picture(5))
    (tmp_path / name).write_text(f"photo{delimiter}words\na.png{delimiter}grey\n")
    options = ["--options", "columns.image=photo", "columns.captions=words"]
    assert cli.main(["check-data", str(tmp_path / name), "--decode", *options]) == 0
    assert "image                                      1" in capsys.readouterr().out


def test_a_table_without_a_known_column_of_media_is_a_warning(tmp_path, caplog):
    (tmp_path / "t.csv").write_text("photo,text\na.png,grey\n")
    [sample] = READERS["huggingface"](Origin("own", {"file": [str(tmp_path / "t.csv")]}, str(tmp_path)))
    assert sample.media == ()
    assert "no column of media; set it, as in options.columns.image=NAME; found photo, text" in caplog.text


def test_questions_and_messages_of_a_table(tmp_path):
    talk = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "Grey."}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": talk, "image": "a.png"}) + "\n")
    (tmp_path / "ask.jsonl").write_text(
        json.dumps({"question": "What?", "answers": ["a", "b"], "image": "a.png"}) + "\n"
    )

    def read(name):
        [sample] = READERS["huggingface"](Origin("own", {"file": [str(tmp_path / name)]}, str(tmp_path)))
        assert sample.media == (Medium("image", str(tmp_path / "a.png")),)
        return sample

    assert read("chat.jsonl").turns == (Message("user", "What is it?", ("image",)), Message("assistant", "Grey."))
    assert read("ask.jsonl").turns == (Message("user", "What?", ("image",)), Message("assistant", "a"))
    assert read("ask.jsonl").answers == ("a", "b")


SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "<image>What is it?"},
        {"from": "gpt", "value": "A bus."},
        {"from": "human", "value": "And here?\n<image>"},
        {"from": "gpt", "value": "A dog."},
    ],
    "images": ["a.png", "b.png"],
}
MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "<video>What sounds?"},
        {"role": "assistant", "content": "A bell."},
    ],
    "videos": ["c.mp4"],
    "audios": [{"path": "d.wav"}],
}
TYPED = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]},
    ],
    "images": ["a.png"],
}
ALPACA = {"instruction": "Name the colour.", "input": "<image>", "output": "Red.", "images": ["a.png"]}
COMPLETION = {
    "prompt": [{"role": "user", "content": "Name <it> <image>"}],
    "completion": [{"role": "assistant", "content": "Red."}],
    "images": ["a.png"],
}


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
        (COMPLETION, [("Name <it>", ("image",)), ("Red.", ())], ["a.png"]),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_messages_of_fine_tuning_tools(tmp_path, row, turns, paths, form):
    path = tmp_path / f"chat.{form}"
    path.write_text(json.dumps(row) + "\n" if form == "jsonl" else json.dumps([row]))
    [sample] = READERS["messages"](Origin("own", {"file": [str(path)]}, str(tmp_path)))
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
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        list(READERS["messages"](Origin("own", {"file": [str(tmp_path / "chat.jsonl")]}, str(tmp_path))))


def test_messages_are_accepted_by_check_data(tmp_path, capsys):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(picture(1))
    (tmp_path / "chat.jsonl").write_text(json.dumps(SHAREGPT) + "\n")
    assert cli.main(["check-data", str(tmp_path / "chat.jsonl"), "--decode"]) == 0
    (tmp_path / "chat.jsonl").write_text(json.dumps(SHAREGPT | {"images": []}) + "\n")
    assert cli.main(["check-data", str(tmp_path / "chat.jsonl")]) == 1
    assert "FAULT: malformed line: 1" in capsys.readouterr().out


def test_without_the_package_datasets_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'lavis-chatbridge\[data\]'"):
        list(READERS["huggingface"](Origin("own", {"file": ["org/name"]}, str(tmp_path))))
