"""The sample schema: what a line holds, and what the message says when it does not."""

from __future__ import annotations

import json
import os

import pytest

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.schema import Medium, Sample, check_inside, read_jsonl, to_record, write_jsonl


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def fault(path, **settings):
    with pytest.raises(DataError) as caught:
        list(read_jsonl(path, **settings))
    return str(caught.value)


def test_media_follow_the_order_in_which_turns_bring_them(tmp_path):
    record = {
        "id": 7,
        "media": [{"type": "image", "path": "a.png"}, {"type": "audio", "path": "b.wav"}],
        "turns": [
            {"role": "user", "text": "What sounds?", "media": [1]},
            {"role": "assistant", "text": "A bell."},
            {"role": "user", "text": "And <image> here?", "media": [0]},
            {"role": "assistant", "text": "A cat."},
        ],
    }
    [sample] = read_jsonl(write(tmp_path / "a.jsonl", record), root="/data")
    assert (sample.id, sample.modality) == ("7", "image+audio")
    assert [medium.path for medium in sample.media] == ["/data/b.wav", "/data/a.png"]
    assert sample.turns[0].media == ("audio",)
    assert sample.turns[2] == Message("user", "And <image> here?", ("image",))
    for turn in record["turns"]:
        turn.pop("media", None)
    [sample] = read_jsonl(write(tmp_path / "a.jsonl", record))
    assert sample.turns[0].media == ("image", "audio")
    assert sample.media[0].path == str(tmp_path / "a.png")


def test_writing_and_reading_gives_the_same(tmp_path):
    spelt = Medium("audio", words=("a low flute", "low, flute"))
    asked = (Message("user", "what is it?", ("video", "audio")), Message("assistant", "a flute"))
    samples = [
        Sample("1", (Medium("image", str(tmp_path / "i/a.png")),), ("ä", "b"), facts={"colour": "red"}, held_out=True),
        Sample("2", (), (), (Message("user", "q"), Message("assistant", "a")), ("a", "an a"), "s", "short", "text"),
        Sample("3", (Medium("image", str(tmp_path / "s.tar"), 512, 99),), ("c",)),
        Sample("4", (Medium("video", str(tmp_path / "a.mp4")), spelt), turns=asked),
        Sample("i\u2028d", captions=("only a line feed ends a line:\u2028 \x85.",)),
    ]
    assert write_jsonl(tmp_path / "out/x.jsonl", samples, root=tmp_path) == 5
    read = list(read_jsonl(tmp_path / "out/x.jsonl", root=tmp_path))
    assert read == samples
    assert to_record(samples[0], str(tmp_path))["media"] == [{"type": "image", "path": "i/a.png"}]
    assert (read[3].modalities, read[3].modality, len(read[3].files)) == (("video", "audio"), "video", 1)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.jsonl"
    write_jsonl(file, [Sample("1", captions=("a",))])

    def broken():
        yield Sample("2", captions=("b",))
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        write_jsonl(file, broken())
    assert [sample.id for sample in read_jsonl(file)] == ["1"]
    assert os.listdir(tmp_path) == ["x.jsonl"]


def _nested(depth):
    return [_nested(depth - 1)] if depth else []


IMAGE = {"type": "image", "path": "a.png"}
USER, REPLY = {"role": "user", "text": "q"}, {"role": "assistant", "text": "a"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": None}, "has neither 'captions' (alignment) nor 'turns' (instructions)"),
        ({"id": ""}, "id is '', expected a string or a whole number"),
        ({"id": True}, "id is True, expected a string or a whole number"),
        ({"caption": "x"}, "unknown key 'caption', did you mean 'captions'?"),
        ({"zzz": "x"}, "put your own under 'meta'"),
        ({"captions": [1]}, "captions[0]: expected a string, found 1"),
        ({"media": ["x.png"]}, "media[0]: expected an object, found 'x.png'"),
        ({"media": [{"type": "picture"}]}, "media[0].type: expected 'image', 'video' or 'audio', found 'picture'"),
        ({"media": [{"path": "a.png"}]}, "media[0].type is missing"),
        ({"media": [{"type": "image"}]}, "path is None"),
        ({"media": [{**IMAGE, "file": 1}]}, "unknown key 'media[0].file'"),
        ({"media": [{**IMAGE, "offset": -1, "size": 1}]}, "media[0].offset: expected greater than or equal to 0"),
        ({"media": [{**IMAGE, "size": 5}]}, "a medium inside a file needs offset and size, found one of them"),
        ({"media": [{**IMAGE, "path": "../x"}]}, "'../x' leaves the media root"),
        ({"media": [{**IMAGE, "path": "/etc/x"}]}, "'/etc/x' leaves the media root"),
        ({"media": [{**IMAGE, "path": "..\\\\x"}]}, "leaves the media root"),
        ({"media": [{**IMAGE, "path": "file:///etc/passwd"}]}, "is a URL"),
        ({"media": [{**IMAGE, "path": "a\0.png"}]}, "expected the path of a file"),
        ({"media": [{"type": "audio", "words": []}]}, "words"),
        ({"media": [{"type": "audio", "words": ["low"], "path": "a.wav"}]}, "either words or a path"),
        ({"facts": {"n": 3}}, "facts.n: expected a string, found 3"),
        ({"turns": [REPLY]}, "turns[0]: role is 'assistant', expected 'user'"),
        ({"turns": [USER, USER]}, "turns[1]: role is 'user', expected 'assistant'"),
        ({"turns": [{"role": "user"}]}, "turns[0].text is missing"),
        ({"media": [IMAGE], "turns": [{**USER, "media": [1]}]}, "names 1, but the sample has 1 media"),
        ({"media": [IMAGE], "turns": [USER, {**REPLY, "media": [0]}]}, "an assistant's turn has no media"),
        ({"media": [IMAGE, IMAGE], "turns": [{**USER, "media": [0]}]}, "each of the 2 media belongs to one turn"),
        ({"media": [IMAGE], "turns": [{**USER, "media": [0, 0]}]}, "each of the 1 media belongs to one turn"),
        ({"captions": ["\ud800"]}, "not JSON: unexpected end of hex escape"),
        ({"meta": {"deep": _nested(300)}}, "not JSON: recursion limit exceeded"),
        ({"x" * 1000: 1}, "unknown key 'xxx"),
    ],
)
def test_a_fault_names_line_and_cause(tmp_path, changes, message):
    ok = {"id": "a", "captions": ["fine"]}
    file = write(tmp_path / "a.jsonl", ok, ok | changes)
    text = fault(file)
    assert text.startswith(f"{file}:2: ")
    assert message in text
    assert len(text) < 400


def test_broken_json_bad_encoding_and_missing_file(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('\n{"id": 1,\n')
    assert f"{file}:2: not JSON" in fault(file)
    file.write_text("[1]")
    assert "the line: expected an object, found [1]" in fault(file)
    file.write_bytes(b'{"id": 1, "captions": ["\xff"]}\n')
    assert "not UTF-8" in fault(file)
    assert "cannot be read: No such file" in fault(tmp_path / "none.jsonl")


def test_paths_outside_when_allowed(tmp_path):
    file = write(tmp_path / "a.jsonl", {"id": "a", "captions": ["c"], "media": [{"type": "audio", "path": "/x/y.wav"}]})
    [sample] = read_jsonl(file, allow_outside=True)
    assert sample.media[0].path == "/x/y.wav"


def test_symbolic_links_may_not_lead_out(tmp_path):
    """A folder directly below the root may be a link to another disk; its files may not."""
    root, disk = tmp_path / "root", tmp_path / "disk"
    root.mkdir()
    disk.mkdir()
    for file in (tmp_path / "secret", root / "fine", disk / "a.png"):
        file.write_text("x")
    (root / "link").symlink_to(tmp_path / "secret")
    (disk / "out").symlink_to(tmp_path / "secret")
    (root / "coco").symlink_to(disk)
    for inside in ("fine", "coco/a.png"):
        check_inside(str(root / inside), str(root))
    for outside in ("link", "coco/out", "../secret"):
        with pytest.raises(DataError, match="leads out of the media root"):
            check_inside(str(root / outside), str(root))
