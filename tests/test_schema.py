"""The sample schema: what a line holds, and what the message says when it does not."""

from __future__ import annotations

import json
import os
from pathlib import Path

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


def test_alignment_line_is_read_relative_to_the_file(tmp_path):
    file = write(
        tmp_path / "a.jsonl", {"id": 7, "media": [{"type": "image", "path": "p/a.png"}], "captions": ["a cat"]}
    )
    [sample] = read_jsonl(file)
    assert sample == Sample("7", (Medium("image", str(tmp_path / "p/a.png")),), ("a cat",))
    assert sample.modality == "image"


def test_media_follow_the_order_in_which_turns_bring_them(tmp_path):
    record = {
        "id": "x",
        "media": [{"type": "image", "path": "a.png"}, {"type": "audio", "path": "b.wav"}],
        "turns": [
            {"role": "user", "text": "What sounds?", "media": [1]},
            {"role": "assistant", "text": "A bell."},
            {"role": "user", "text": "And <image> here?", "media": [0]},
            {"role": "assistant", "text": "A cat."},
        ],
    }
    [sample] = read_jsonl(write(tmp_path / "a.jsonl", record), root="/data")
    assert [medium.path for medium in sample.media] == ["/data/b.wav", "/data/a.png"]
    assert sample.turns[0].media == ("audio",)
    assert sample.turns[2] == Message("user", "And <image> here?", ("image",))
    assert sample.modality == "image+audio"


def test_without_positions_all_media_belong_to_the_first_turn(tmp_path):
    record = {
        "id": "x",
        "media": [{"type": "video", "path": "a.mp4"}, {"type": "audio", "path": "a.mp4"}],
        "turns": [{"role": "user", "text": "q"}, {"role": "assistant", "text": "a"}],
    }
    [sample] = read_jsonl(write(tmp_path / "a.jsonl", record))
    assert sample.turns[0].media == ("video", "audio")


def test_writing_and_reading_gives_the_same(tmp_path):
    samples = [
        Sample("1", (Medium("image", str(tmp_path / "i/a.png")),), ("ä", "b"), facts={"colour": "red"}, held_out=True),
        Sample("2", (), (), (Message("user", "q"), Message("assistant", "a")), ("a", "an a"), "s", "short", "text"),
        Sample("3", (Medium("image", str(tmp_path / "s.tar"), 512, 99),), ("c",)),
    ]
    assert write_jsonl(tmp_path / "out/x.jsonl", samples, root=tmp_path) == 3
    assert list(read_jsonl(tmp_path / "out/x.jsonl", root=tmp_path)) == samples
    assert to_record(samples[0], str(tmp_path))["media"] == [{"type": "image", "path": "i/a.png"}]


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
        ({"id": ""}, "'id' is missing, expected a string or a whole number"),
        ({"id": True}, "id is True"),
        ({"caption": "x"}, "unknown key 'caption', did you mean 'captions'?"),
        ({"zzz": "x"}, "put your own under 'meta'"),
        ({"captions": "x"}, "captions: expected a list, found 'x'"),
        ({"captions": [1]}, "captions[0]: expected a string, found 1"),
        ({"media": ["x.png"]}, "media[0]: expected an object, found 'x.png'"),
        ({"media": [{"type": "picture"}]}, "media[0].type: expected 'image', 'video' or 'audio', found 'picture'"),
        ({"media": [{"type": "image"}]}, "path is None"),
        ({"media": [{**IMAGE, "file": 1}]}, "unknown key 'file'"),
        ({"media": [{**IMAGE, "offset": -1}]}, "media[0].offset: expected greater than or equal to 0, found -1"),
        ({"media": [{**IMAGE, "offset": 5}]}, "a medium inside a file needs offset and size, found one of them"),
        ({"media": [{**IMAGE, "size": 5}]}, "a medium inside a file needs offset and size, found one of them"),
        ({"media": [{**IMAGE, "path": "../x"}]}, "'../x' leaves the media root"),
        ({"media": [{**IMAGE, "path": "/etc/x"}]}, "'/etc/x' leaves the media root"),
        ({"media": [{"type": "audio", "words": []}]}, "words"),
        ({"media": [{"type": "audio", "words": "low"}]}, "words"),
        ({"media": [{"type": "audio", "words": ["low"], "path": "a.wav"}]}, "either words or a file"),
        ({"facts": {"n": 3}}, "facts.n: expected a string, found 3"),
        ({"turns": [REPLY]}, "turns[0]: role is 'assistant', expected 'user'"),
        ({"turns": [USER, USER]}, "turns[1]: role is 'user', expected 'assistant'"),
        ({"turns": [{"role": "user"}]}, "turns[0]: 'text' is missing"),
        ({"turns": [{**USER, "image": 1}]}, "turns[0]: unknown key 'image'"),
        ({"media": [IMAGE], "turns": [{**USER, "media": [1]}]}, "names 1, but the sample has 1 media"),
        ({"media": [IMAGE], "turns": [{**USER, "media": 0}]}, "turns[0].media: expected a list, found 0"),
        ({"media": [IMAGE], "turns": [USER, {**REPLY, "media": [0]}]}, "an assistant's turn has no media"),
        ({"media": [IMAGE, IMAGE], "turns": [{**USER, "media": [0]}]}, "a medium belongs to no turn"),
        ({"media": [IMAGE], "turns": [{**USER, "media": [0, 0]}]}, "two turns have the same medium"),
        ({"media": [{**IMAGE, "path": "file:///etc/passwd"}]}, "is a URL"),
        ({"media": [{**IMAGE, "path": "a\0.png"}]}, "NUL"),
        ({"media": [{**IMAGE, "path": "..\\\\x"}]}, "leaves the media root"),
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
    file.write_text("[" * 100_000)
    assert "recursion limit exceeded" in fault(file)
    file.write_bytes(b'{"id": 1, "captions": ["\xff"]}\n')
    assert "not UTF-8" in fault(file)
    assert "cannot be read: No such file" in fault(tmp_path / "none.jsonl")


def test_paths_outside_when_allowed(tmp_path):
    file = write(tmp_path / "a.jsonl", {"id": "a", "captions": ["c"], "media": [{"type": "audio", "path": "/x/y.wav"}]})
    [sample] = read_jsonl(file, allow_outside=True)
    assert sample.media[0].path == "/x/y.wav"


def test_symbolic_links_may_not_lead_out(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_text("x")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "fine").write_text("x")
    check_inside(str(root / "fine"), str(root))
    with pytest.raises(DataError, match="leads out of the media root"):
        check_inside(str(root / "link"), str(root))
    other = tmp_path / "disk"
    other.mkdir()
    (other / "a.png").write_text("x")
    (other / "out").symlink_to(tmp_path / "secret")
    (root / "coco").symlink_to(other)
    check_inside(str(root / "coco" / "a.png"), str(root))
    with pytest.raises(DataError, match="leads out of the media root"):
        check_inside(str(root / "coco" / "out"), str(root))


def test_words_stand_for_a_medium(tmp_path: Path) -> None:
    media = (Medium("image", str(tmp_path / "a.png")), Medium("audio", words=("a low flute", "low, flute")))
    turns = (Message("user", "what is it?", ("image", "audio")), Message("assistant", "a flute"))
    sample = Sample(id="1", media=media, turns=turns)
    write_jsonl(tmp_path / "x.jsonl", [sample])
    (read,) = read_jsonl(tmp_path / "x.jsonl")
    assert read.media[1] == media[1]
    assert read.modalities == ("image", "audio")
    assert read.modality == "image"
    assert [medium.modality for medium in read.files] == ["image"]


def test_a_whole_character_may_be_spelt_in_two_halves(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "a", "captions": ["\\ud83d\\ude00"]}')
    assert next(read_jsonl(tmp_path / "a.jsonl")).captions == ("\N{GRINNING FACE}",)


def test_only_a_line_feed_ends_a_line(tmp_path):
    text = "a line\u2028that goes on\x85and on"
    write_jsonl(tmp_path / "a.jsonl", [Sample("i\u2028d", captions=(text,))])
    [sample] = read_jsonl(tmp_path / "a.jsonl")
    assert (sample.id, sample.captions) == ("i\u2028d", (text,))
