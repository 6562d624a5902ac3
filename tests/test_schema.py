"""The sample schema: the content of a line, the message about a faulty one, and files of lines."""

from __future__ import annotations

import json
import pickle
import re

import pytest

from lavis_chatbridge import schema
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.schema import Medium, Sample, SampleFile, check_inside, read_jsonl, to_record, write_jsonl


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_media_follow_the_order_in_which_turns_bring_them(tmp_path):
    record = {
        "id": 7,
        "media": [{"type": "image", "path": "a.png"}, {"type": "audio", "path": "b.wav", "words": None}],
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
    assert read == samples == list(SampleFile(tmp_path / "out/x.jsonl", root=tmp_path))
    assert to_record(samples[0], str(tmp_path))["media"] == [{"type": "image", "path": "i/a.png"}]
    assert (read[3].modalities, read[3].modality, len(read[3].files)) == (("video", "audio"), "video", 1)


IMAGE = {"type": "image", "path": "a.png"}
USER, REPLY = {"role": "user", "text": "q"}, {"role": "assistant", "text": "a"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": None}, "has neither 'captions' (alignment) nor 'turns' (instructions)"),
        ({"id": True}, "sample.id: expected"),
        ({"id": ""}, "sample.id: String should have at least 1 character"),
        ({"caption": "x"}, "unknown key sample.caption, did you mean 'captions'?"),
        ({"media": [{"type": "picture"}]}, "sample.media[0].type: 'picture' is not one of 'image', 'video', 'audio'"),
        ({"media": [{"type": "image"}]}, "path is None"),
        ({"media": [{**IMAGE, "offset": -1, "size": 1}]}, "sample.media[0].offset is -1, expected at least 0"),
        ({"media": [{**IMAGE, "size": 5}]}, "a medium inside a file needs offset and size, found one of them"),
        ({"media": [{**IMAGE, "path": "../x"}]}, "'../x' leaves the media root"),
        ({"media": [{**IMAGE, "path": "/etc/x"}]}, "'/etc/x' leaves the media root"),
        ({"media": [{**IMAGE, "path": "file:///etc/passwd"}]}, "is a URL"),
        ({"media": [{"type": "audio", "words": ["low"], "path": "a.wav"}]}, "either words or a path"),
        ({"media": [{"type": "audio", "words": [""]}]}, "words[0]: String should have at least 1 character"),
        ({"turns": [REPLY]}, "turns[0]: role is 'assistant', expected 'user'"),
        ({"media": [IMAGE], "turns": [{**USER, "media": [1]}]}, "names 1, but the sample has 1 media"),
        ({"media": [IMAGE], "turns": [USER, {**REPLY, "media": [0]}]}, "an assistant's turn has no media"),
        ({"media": [IMAGE, IMAGE], "turns": [{**USER, "media": [0]}]}, "each of the 2 media belongs to one turn"),
        ({"captions": ["\ud800"]}, "not JSON: unexpected end of hex escape"),
        ({"x" * 1000: 1}, "unknown key sample.'xxx"),
    ],
)
def test_a_fault_names_line_and_cause(tmp_path, changes, message):
    ok = {"id": "a", "captions": ["fine"]}
    file = write(tmp_path / "a.jsonl", ok, ok | changes)
    with pytest.raises(DataError, match=rf"^{file}:2: .*{re.escape(message)}") as caught:
        list(read_jsonl(file))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_sample_file_indexes_lines(tmp_path, encoding):
    lines = [json.dumps({"id": f"s{i}", "captions": [f"grey {i}"], "media": [IMAGE]}) for i in range(12)]
    file = tmp_path / "gaps.jsonl"
    file.write_text("\n\n".join(lines), encoding=encoding)
    samples = SampleFile(file, limit=11)
    assert [sample.id for sample in samples] == [f"s{i}" for i in range(11)]
    assert pickle.loads(pickle.dumps(samples))[10].captions[0] == "grey 10"
    assert samples.lengths[0] == 32 + len("grey 0") // 4 + 1
    for text, message in (("\n\n{}\n", r"gaps\.jsonl:3: sample.id is missing"), ("\n", "contains no sample")):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            SampleFile(file)
    file.unlink()
    with pytest.raises(DataError, match="No such file"):
        SampleFile(file)


def test_the_index_of_a_large_file_is_kept_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "_CACHED_FROM", 1)
    records = [{"id": str(i), "captions": ["c" * i]} for i in range(1, 4)]
    file, cache = write(tmp_path / "a.jsonl", *records), tmp_path / "cache"
    first = SampleFile(file, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(SampleFile, "_scan", None)
        assert SampleFile(file, cache=cache)[2] == first[2]
    assert len(SampleFile(write(file, *records, records[0]), cache=cache)) == 4


def test_symbolic_links_may_not_lead_out(tmp_path):
    root, disk = tmp_path / "root", tmp_path / "disk"
    for file in (tmp_path / "secret", root / "fine", disk / "a.png"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
    (root / "link").symlink_to(tmp_path / "secret")
    (disk / "out").symlink_to(tmp_path / "secret")
    (root / "coco").symlink_to(disk)
    for inside in ("fine", "coco/a.png"):
        check_inside(str(root / inside), str(root))
    for outside in ("link", "coco/out", "../secret"):
        with pytest.raises(DataError, match="leads out of the media root"):
            check_inside(str(root / outside), str(root))
