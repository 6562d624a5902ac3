"""Every annotation format, on a tiny file written here in the published layout."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

from lavis_chatbridge.datasets.dataset import PromptSettings, SampleDataset
from lavis_chatbridge.datasets.readers import READERS, Origin, options
from lavis_chatbridge.datasets.readers.common import json_rows, json_value, table_rows
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.prompting import Message
from lavis_chatbridge.prompting.pieces import Slot
from lavis_chatbridge.prompting.templates import TaskTemplates, Templates

_TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A bus."}]
_QUESTIONS = {
    "data_subtype": "train2014",
    "questions": [{"image_id": 9, "question": "What is it?", "question_id": 90}],
}
_VOTES = [{"answer": "cat", "answer_confidence": "yes", "answer_id": 1}]
_ANNOTATIONS = {
    "annotations": [{"multiple_choice_answer": "cat", "answers": _VOTES, "answer_type": "other", "question_id": 90}]
}
_KARPATHY = {
    "images": [
        {"filepath": "val2014", "filename": "a.jpg", "split": "train", "cocoid": 1, "sentences": [{"raw": "A cat."}]}
    ]
}
_WAV = {"data": [{"caption": "Rain falls.", "id": "101", "duration": 12.5}]}
_MUSIC = {
    "video_id": "0272",
    "question_id": 50,
    "type": '["Audio", "Counting"]',
    "question_deleted": 0,
    "question_content": "Is the <Object> sounding?",
    "templ_values": '["violin"]',
    "anser": "yes",
}
_MSRVTT = {
    "videos": [{"video_id": "video0", "split": "train"}],
    "sentences": [{"caption": "x", "video_id": "video0", "sen_id": 1}],
}
_AVSD = {"dialogs": [{"image_id": "7UPGT", "dialog": [{"question": "who?", "answer": "a man"}] * 2}]}
_MULTIS = [
    {"video_id": "v1", "conversations": _TALK},
    {"image_id": "v2", "question": ["q1", "q2"], "answer": ["a1", "a2"]},
    {"video_id": "v4", "desc": "d"},
    {"video_id": "v5", "text": ["STOP", "exit"]},
]
FORMATS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "audiocaps": (
        {"audio": "{youtube_id}_{start_time}.wav"},
        {"file": 'audiocap_id,youtube_id,start_time,caption\n5,ab-c,30,"A dog, barking"\n6,ab-c,30,Barking\n'},
    ),
    "avsd": ({"video": "{image_id}.mp4"}, {"file": _AVSD}),
    "clotho": (
        {"audio": "{file_name}"},
        {"file": "file_name," + ",".join(f"caption_{i}" for i in range(1, 6)) + "\n rain on tin.wav,a,b,c,d, e \n"},
    ),
    "coco_annotations": (
        {"image": "{file_name}"},
        {
            "file": {
                "annotations": [{"image_id": 1, "caption": "A dog."}],
                "images": [{"id": 1, "file_name": "a.jpg", "domain": "near"}],
            }
        },
    ),
    "coco_karpathy": ({"image": "coco/{image}"}, {"file": _KARPATHY}),
    "gqa": (
        {"image": "{image_id}.jpg"},
        {"file": {"1": {"imageId": "5", "question": "q?", "answer": "a", "types": {"structural": "query"}}}},
    ),
    "llava": ({"image": "coco/{image}"}, {"file": [{"id": "1", "image": "1.jpg", "conversations": _TALK}]}),
    "msrvtt": ({"video": "{video_id}.mp4"}, {"file": _MSRVTT}),
    "msrvtt_qa": (
        {"video": "video{video_id}.mp4"},
        {"file": [{"answer": "couch", "id": 3, "question": "where?", "video_id": 1}]},
    ),
    "multis": ({"video": "{id}.mp4"}, {"file": _MULTIS}),
    "music_avqa": ({"video": "{video_id}.mp4"}, {"file": [_MUSIC]}),
    "pairs_json": ({"image": "{row}.jpg"}, {"file": [{"url": "http://x/1", "caption": "a dog", "image": "a.jpg"}]}),
    "pairs_tsv": ({"image": "{shard:05d}/{inner:04d}.jpg"}, {"file": "caption\turl\na dog\thttp://x/1\n"}),
    "valor": ({"video": "{video_id}.mp4"}, {"file": [{"video_id": "ab", "desc": ["A man plays.", "x"]}]}),
    "vatex": ({"video": "{video_id}.mp4"}, {"file": [{"videoID": "ab_1_2", "enCap": ["one", "two"]}]}),
    "visual_genome": (
        {"image": "{folder}/{image_id}.jpg"},
        {
            "questions": [{"id": 5, "qas": [{"image_id": 5, "qa_id": 9, "question": "What?", "answer": "Green."}]}],
            "images": [{"image_id": 5, "url": "https://x/VG_100K_2/5.jpg"}],
        },
    ),
    "vqav2": (
        {"image": "{data_subtype}/{image_id:012d}.jpg"},
        {"questions": _QUESTIONS, "annotations": _ANNOTATIONS},
    ),
    "wavcaps": ({"audio": "{id}.flac"}, {"file": _WAV}),
    "webvid": (
        {"video": "{page_dir}/{videoid}.mp4"},
        {"file": "videoid,contentUrl,duration,page_dir,name\n2,http://x/a.mp4,PT1S,006,Aerial shot\n"},
    ),
}
"""Reader -> where its media lie, and its files in the published layout (text, or JSON's types)."""
FIRST = {
    "audiocaps": ("5", "ab-c_30.wav", ["A dog, barking", "Barking"]),
    "avsd": ("7UPGT", "7UPGT.mp4", ["who?", "a man", "who?", "a man"]),
    "clotho": (" rain on tin.wav", " rain on tin.wav", ["a", "b", "c", "d", "e"]),
    "coco_annotations": ("1", "a.jpg", ["A dog."]),
    "coco_karpathy": ("1", "coco/val2014/a.jpg", ["A cat."]),
    "gqa": ("1", "5.jpg", ["q?", "a"]),
    "llava": ("1#0", "coco/1.jpg", ["What is it?", "A bus."]),
    "msrvtt": ("video0", "video0.mp4", ["x"]),
    "msrvtt_qa": ("3", "video1.mp4", ["where?", "couch"]),
    "multis": ("v1#0", "v1.mp4", ["What is it?", "A bus."]),
    "music_avqa": ("50", "0272.mp4", ["Is the violin sounding?", "yes"]),
    "pairs_json": ("0", "0.jpg", ["a dog"]),
    "pairs_tsv": ("0", "00000/0000.jpg", ["a dog"]),
    "valor": ("ab", "ab.mp4", ["A man plays.", "x"]),
    "vatex": ("ab_1_2", "ab_1_2.mp4", ["one", "two"]),
    "visual_genome": ("9", "VG_100K_2/5.jpg", ["What?", "Green"]),
    "vqav2": ("90", "train2014/000000000009.jpg", ["What is it?", "cat"]),
    "wavcaps": ("101", "101.flac", ["Rain falls."]),
    "webvid": ("2", "006/2.mp4", ["Aerial shot"]),
}
"""Reader -> id, path and texts of the first sample of these files."""


@pytest.fixture
def read(tmp_path):
    """Write files by purpose (JSON for objects, text otherwise) and read them."""

    def reading(reader, media=None, settings=None, **files):
        paths = {}
        for role, content in files.items():
            path = tmp_path / f"{role}.txt"
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
            paths[role] = [str(path)]
        return list(READERS[reader](Origin("set", paths, "/d", media or {}, settings or {})))

    return reading


def asked(sample):
    return [turn.text for turn in sample.turns]


@pytest.mark.parametrize("reader", sorted(FORMATS))
def test_the_published_layout_is_read(read, reader):
    media, files = FORMATS[reader]
    sample = read(reader, media, **files)[0]
    assert (sample.id, sample.media[0].path, asked(sample) or list(sample.captions)) == (
        FIRST[reader][0],
        f"/d/{FIRST[reader][1]}",
        FIRST[reader][2],
    )


def test_vqav2(read):
    votes = [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(["cat", "cat", "a cat"])]
    questions = {"questions": [{"image_id": 9, "question": "What is it?", "question_id": 9000}]}
    annotation = {"question_type": "what", "multiple_choice_answer": "cat", "answers": votes, "question_id": 9000}
    annotations = {"annotations": [annotation | {"answer_type": "other"}]}
    media = {"image": "{image_id}.jpg"}
    [sample] = read("vqav2", media, questions=questions, annotations=annotations)
    assert sample.turns == (Message("user", "What is it?", ("image",)), Message("assistant", "cat"))
    assert sample.answers == ("cat", "cat", "a cat")
    assert sample.meta == {"question_id": 9000, "image_id": 9, "type": "other", "question_type": "what"}
    [test] = read("vqav2", media, questions=questions)
    assert [turn.role for turn in test.turns] == ["user"]
    del annotation["multiple_choice_answer"]
    annotations = {"annotations": [annotation]}
    assert asked(read("vqav2", media, questions=questions, annotations=annotations)[0])[1] == "cat"
    votes[2]["answer"] = ""  # nothing said is an answer too
    assert read("vqav2", media, questions=questions, annotations=annotations)[0].answers == ("cat", "cat", "")
    votes[2]["answer"] = None
    with pytest.raises(DataError, match=r"answers\[2\]: answer is None, expected text"):
        read("vqav2", media, questions=questions, annotations=annotations)
    votes[2]["answer"] = "cat"
    with pytest.raises(DataError, match=r"questions\[0\]: question 9000 has no annotation"):
        read("vqav2", media, questions=questions, annotations={"annotations": []})


def test_coco_karpathy_in_both_layouts(read):
    def image(name, split, number):
        sentences = [{"tokens": ["a"], "raw": f"A {name} {i}.", "imgid": number, "sentid": i} for i in range(2)]
        return {"filepath": "val2014", "filename": f"{name}.jpg", "split": split, "cocoid": number, "imgid": 0,
                "sentids": [0, 1], "sentences": sentences}  # fmt: skip

    whole = {"images": [image("a", "train", 1), image("b", "restval", 2), image("c", "test", 3)], "dataset": "coco"}
    media = {"image": "coco/{image}"}
    first, second = read("coco_karpathy", media, file=whole)
    assert (first.id, second.id) == ("1", "2")
    assert first.captions == ("A a 0.", "A a 1.")
    assert first.media[0].path == "/d/coco/val2014/a.jpg"
    assert [s.id for s in read("coco_karpathy", media, {"split": "test"}, file=whole)] == ["3"]
    training = [{"caption": "A dog.", "image": "val2014/COCO_val2014_000000522418.jpg", "image_id": "coco_522418"}]
    [sample] = read("coco_karpathy", media, file=training)
    assert sample.meta == {"image_id": "COCO_val2014_000000522418"}
    testing = [{"image": "val2014/x.jpg", "caption": ["one", "two"]}]
    assert read("coco_karpathy", media, file=testing)[0].captions == ("one", "two")


def test_msrvtt_captions(read):
    videos = [{"video_id": "video0", "split": "train"}, {"video_id": "video1", "split": "validate"}]
    said = [("x", "video0"), ("y", "video1"), ("z", "video0")]
    content = {"videos": videos, "sentences": [{"caption": caption, "video_id": video} for caption, video in said]}
    [sample] = read("msrvtt", settings={"split": "train"}, file=content)
    assert sample.captions == ("x", "z")
    assert len(read("msrvtt", file=content)) == 2
    content["sentences"][0]["video_id"] = "video7"
    with pytest.raises(DataError, match="'video7' is not among the videos"):
        read("msrvtt", file=content)


def test_wavcaps(read):
    parts = {part: {"data": [{"caption": "Rain.", "id": name, "duration": 12.5}]} for part, name in
             (("FreeSound", "101"), ("AudioSet_SL", "Yab.wav"))}  # fmt: skip
    samples = read("wavcaps", {"audio": "{part}/{id}.flac"}, **parts)
    assert [s.media[0].path for s in samples] == ["/d/FreeSound/101.flac", "/d/AudioSet_SL/Yab.flac"]
    assert (samples[0].id, samples[0].meta) == ("FreeSound/101", {"seconds": 12.5})


def test_tables_of_web_pictures(read):
    media = {"image": "{shard:05d}/{shard:05d}{inner:04d}.jpg"}
    cc3m = 'a "large" dog\thttp://x/1\nsecond\thttp://x/2\n'
    samples = read("pairs_tsv", media, {"columns": ["caption", "url"]}, file=cc3m)
    assert [s.captions[0] for s in samples] == ['a "large" dog', "second"]
    assert samples[1].media[0].path == "/d/00000/000000001.jpg"
    cc12m = read("pairs_tsv", {"image": "{url_md5}.jpg"}, {"columns": ["url", "caption"]}, file="http://x/1\tdog\n")
    assert cc12m[0].media[0].path == "/d/a247d79628e388a8def1087b6dbe8776.jpg"
    headed = read("pairs_tsv", media, file="caption\turl\ndog\thttp://x/1\n")
    assert headed[0].captions == ("dog",)
    with pytest.raises(DataError, match=":1: 1 columns, expected 2"):
        read("pairs_tsv", media, {"columns": ["caption", "url"]}, file="only\n")


def test_json_lists_of_web_pictures(read):
    media = {"image": "{row}.jpg"}
    laion = [{"url": "http://x/1", "caption": "a dog"}, {"url": "http://x/2", "caption": "a cat"}]
    assert [s.captions[0] for s in read("pairs_json", media, file=laion)] == ["a dog", "a cat"]
    sbu = {"image_urls": ["http://x/1"], "user_ids": ["u"], "captions": ["on the beach"]}
    assert read("pairs_json", media, file=sbu)[0].captions == ("on the beach",)
    [lavis] = read("pairs_json", {"image": "{image}"}, file=[{"image": "a/b.jpg", "caption": "c"}])
    assert lavis.media[0].path == "/d/a/b.jpg"
    with pytest.raises(DataError, match="of equal length"):
        read("pairs_json", media, file=sbu | {"captions": []})


def shard(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return Origin("set", {"file": [str(path)]}, "/d")


def test_webdataset_shards(tmp_path):
    meta = json.dumps({"caption": "from json", "url": "u", "status": "success"}).encode()
    members = [
        ("000000000.jpg", b"JPEG0"), ("000000000.json", meta), ("000000000.txt", b" a cat \n"),
        ("000000001.png", b"PNG"), ("000000001.json", meta),
        ("000000002.jpg", b"no text"),
        ("000000003.wav", b"WAV"), ("000000003.txt", "Glöckchen".encode()),
    ]  # fmt: skip
    samples = list(READERS["webdataset"](shard(tmp_path / "00000.tar", members)))
    assert [(s.id, s.captions[0], s.modality) for s in samples] == [
        ("00000.tar/000000000", "a cat", "image"),
        ("00000.tar/000000001", "from json", "image"),
        ("00000.tar/000000003", "Glöckchen", "audio"),
    ]
    content = (tmp_path / "00000.tar").read_bytes()
    found = [content[m.offset : m.offset + m.size] for s in samples for m in s.media]
    assert found == [b"JPEG0", b"PNG", b"WAV"]
    with pytest.raises(DataError, match="not an uncompressed tar file"):
        list(READERS["webdataset"](shard(tmp_path / "z.tar.gz", members, "w:gz")))
    with pytest.raises(DataError, match=r"a.json: not JSON"):
        list(READERS["webdataset"](shard(tmp_path / "b.tar", [("a.json", b"{")])))


PAIRS = [(f"{i}.{suffix}", f"{i}{suffix}".encode() * 40) for i in range(4) for suffix in ("jpg", "txt")]


def test_a_shard_that_is_not_read_to_its_end_is_refused(tmp_path, caplog):
    """Python's tarfile takes each of these for a shorter archive."""
    good = Path(shard(tmp_path / "good.tar", PAIRS).every_file[0]).read_bytes()
    damaged = {
        "header": good[:4099] + b"?" + good[4100:],
        "second tar": good + good,
        "zeros": good[:4096] + bytes(1024) + good[4096:],
        "cut header": good[:4196],
    }
    for name, content in {**damaged, "cut": good[:4800], "open": good[:4096]}.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
    origin = {
        name: Origin("set", {"file": [str(tmp_path / f"{name}.tar")]}, "/d") for name in (*damaged, "cut", "open")
    }
    for name in damaged:
        with pytest.raises(DataError, match=rf"{name}\.tar: cannot be read from byte (4096|8192) on"):
            list(READERS["webdataset"](origin[name]))
    with pytest.raises(DataError, match="unexpected end of data"):
        list(READERS["webdataset"](origin["cut"]))
    assert caplog.text == ""
    assert len(list(READERS["webdataset"](origin["open"]))) == 2
    assert "open.tar: a tar without an end marker" in caplog.text


def test_keys_without_medium_or_text_are_counted_and_members_that_come_twice_refused(tmp_path, caplog):
    members = [("x.jpg", b"J"), ("y.jpg", b"J"), ("y.txt", b"t"), ("z.mov", b"M"), ("z.txt", b"t"), ("z.cls", b"1")]
    origin = shard(tmp_path / "a.tar", [*members, ("z.cls", b"2"), ("README", b"")])
    assert [sample.id for sample in READERS["webdataset"](origin)] == ["a.tar/y", "a.tar/z"]
    assert "set: left out 2 of 4 keys without a medium or without a text; the first is a.tar/x" in caplog.text
    for twice in (("y.JPG", b"K"), ("y.txt", b"other")):
        origin = shard(tmp_path / "b.tar", [*members[:3], twice])
        with pytest.raises(DataError, match=rf"a second \.{twice[0][2:].lower()} of one key, '{twice[0]}'"):
            list(READERS["webdataset"](origin))


def test_resource_forks_of_macos_in_a_shard_are_ignored(tmp_path):
    members = [("._x.jpg", b"fork"), ("x.jpg", b"JPEG"), ("._x.txt", b"fork"), ("x.txt", b"a cat")]
    [sample] = READERS["webdataset"](shard(tmp_path / "a.tar", members))
    assert (sample.captions, len(sample.media), sample.media[0].size) == (("a cat",), 1, 4)


def test_llava(read):
    talk = [
        {"from": "human", "value": "What is <image> here?\n<image>"},
        {"from": "gpt", "value": "A bus."},
        {"from": "human", "value": "<image>\nAnd now?"},
        {"from": "gpt", "value": "Still a bus."},
    ]
    content = [{"id": "000000442786", "image": "000000442786.jpg", "conversations": talk}]
    [sample] = read("llava", {"image": "coco/{image}"}, file=content)
    assert asked(sample) == ["What is  here?", "A bus.", "And now?", "Still a bus."]
    assert [turn.media for turn in sample.turns] == [("image",), (), (), ()]
    assert sample.media[0].path == "/d/coco/000000442786.jpg"
    assert len(read("llava", None, {"messages": 2}, file=content)[0].turns) == 2
    content[0]["conversations"] = talk[:3]
    assert len(read("llava", file=content)[0].turns) == 2
    content[0]["conversations"] = talk[1:]
    with pytest.raises(DataError, match=r"\[0\].conversations\[0\]: from is 'gpt', expected 'human'"):
        read("llava", file=content)


def test_avsd(read):
    talk = [{"question": "who is there?", "answer": "a man"}, {"question": "what then?", "answer": "he leaves"}]
    entry = {"image_id": "7UPGT", "dialog": talk, "caption": "c", "summary": "s"}
    content = {"type": "train", "version": "0.1", "dialogs": [entry]}
    media = {"video": "charades/{image_id}.mp4"}
    [sample] = read("avsd", media, file=content)
    assert asked(sample) == ["who is there?", "a man", "what then?", "he leaves"]
    assert sample.media[0].path == "/d/charades/7UPGT.mp4"
    talk[1]["answer"] = "__UNDISCLOSED__"
    with pytest.raises(DataError, match=r"dialog\[1\]: the answer is __UNDISCLOSED__.*lbl_test_set4DSTC7-AVSD"):
        read("avsd", media, file=content)
    each = read("avsd", media, {"each_turn": True, "undisclosed": True}, file=content)
    assert [(s.id, len(s.turns)) for s in each] == [("7UPGT_0", 2), ("7UPGT_1", 3)]


def test_music_avqa(read):
    [sample] = read("music_avqa", file=[_MUSIC, _MUSIC | {"question_deleted": 1}])
    assert sample.meta["type"] == ["Audio", "Counting"]
    with pytest.raises(DataError, match=r"1 placeholders in .*, but 0 values"):
        read("music_avqa", file=[_MUSIC | {"templ_values": "[]"}])


def test_released_multis_files(read):
    samples = read("multis", {"video": "{id}.mp4"}, file=_MULTIS)
    assert [asked(s) for s in samples[1:3]] == [["q1", "a1"], ["q2", "a2"]]
    assert [s.captions for s in samples[3:]] == [("d",), ("STOP, exit",)]
    with pytest.raises(DataError, match="2 questions, but 1 answers"):
        read("multis", file=[_MULTIS[1] | {"answer": ["a1"]}])


def test_paths_are_checked(read):
    row = {"answer": "a", "id": 3, "question": "q?", "video_id": 1}
    with pytest.raises(ConfigError, match=r"media path 'x/{nope}.mp4' does not fit this format's fields"):
        read("msrvtt_qa", {"video": "x/{nope}.mp4"}, file=[row])
    with pytest.raises(DataError, match="leaves the media root"):
        read("valor", {"video": "{video_id}.mp4"}, file=[{"video_id": "../../etc/passwd", "desc": "d"}])
    with pytest.raises(ConfigError, match="the split names no 'questions' file, only file"):
        read("vqav2", file=[])


def test_json_is_read_row_by_row(tmp_path):
    path = str(tmp_path / "a.json")
    values = {"info": {"n": [1, 2], "s": 'a "]" b'}, "pi": 3.25, "rows": [{"i": i, "t": "ü" * i} for i in range(9)]}
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps(values, indent=indent))
        assert [row.values for row in json_rows(path, "rows")] == values["rows"]
        assert json_value(path, "pi") == 3.25
        assert json_value(path, "none") is None
    (tmp_path / "a.json").write_text(" [ ] ")
    assert list(json_rows(path)) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"rows": [{"a": 1}, {"a": }]}', "not JSON: parse error: unallowed token"),
        (b'{"rows": [{"a": 1}', "not JSON: parse error: premature EOF"),
        (b'{"rows": [1]}', r"rows\[0\]: expected an object, found 1"),
        (b'{"rows": 3}', "expected a field 'rows' that is a list, found number; docs/data.md"),
        (b'{"other": []}', "expected a field 'rows' that is a list, found none"),
        (b"[]", "expected a field 'rows' that is a list, found none"),
        (b'{"rows":\n [{"a": "\xff"}]}', r"a\.json:2: not UTF-8 at byte 9 of the line"),
    ],
)
def test_broken_json_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(json_rows(str(tmp_path / "a.json"), "rows"))


def test_tables_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        list(table_rows(str(tmp_path / "none.csv")))
    (tmp_path / "a.csv").write_bytes(b"a,b\n\xff,1\n")
    with pytest.raises(DataError, match=r"a\.csv:2: not UTF-8 at byte 0"):
        list(table_rows(str(tmp_path / "a.csv")))


def test_gqa(read):
    entry = {"question": "Is it red?", "imageId": "n16", "answer": "no", "types": {"structural": "verify"}}
    first, second = read("gqa", file={"2013": entry, "2014": entry | {"types": None}})
    assert (first.meta, second.meta) == ({"image_id": "n16", "type": "verify"}, {"image_id": "n16"})
    assert read("gqa", file={}) == []
    with pytest.raises(DataError, match="2013: question is None, expected text"):
        read("gqa", file={"2013": {"imageId": "n1", "answer": "no"}})
    with pytest.raises(DataError, match="expected an object of objects, found start_array"):
        read("gqa", file=[entry])


def test_nocaps_and_flickr30k(read):
    images = [{"id": 3, "file_name": "a.jpg", "domain": "in-domain"}, {"id": 4, "file_name": "b.jpg"}]
    annotations = [{"image_id": 3, "id": i, "caption": f"A cat {i}."} for i in range(2)]
    nocaps = {"info": {}, "images": images, "annotations": annotations}
    [sample] = read("coco_annotations", {"image": "nocaps/{file_name}"}, file=nocaps)  # the other one has no caption
    assert (sample.captions, sample.meta) == (("A cat 0.", "A cat 1."), {"image_id": 3, "type": "in-domain"})
    image = {"filename": "7.jpg", "imgid": 7, "split": "test", "sentences": [{"raw": "A dog."}]}
    [sample] = read("coco_karpathy", {"image": "f/{image}"}, {"split": "test"}, file={"images": [image]})
    assert (sample.id, sample.media[0].path, sample.captions) == ("7", "/d/f/7.jpg", ("A dog.",))


def test_msvd_qa_finds_the_names_of_its_videos(read):
    questions = [{"id": 5, "video_id": 12, "question": "what is it?", "answer": "cat"}]
    media = {"video": "msvd/{name}.avi"}
    [sample] = read("msrvtt_qa", media, questions=questions, mapping="a_0_5 vid1\n-b_3_9 vid12\n")
    assert sample.media[0].path == "/d/msvd/-b_3_9.avi"
    with pytest.raises(DataError, match=r"questions.txt: \[0\]: video 12 is not in"):
        read("msrvtt_qa", media, questions=questions, mapping="a_0_5 vid1\n")


OUTSIDE = ["../x.jpg", "/etc/passwd", "a/../../x.jpg", "..\\x.jpg"]
NO_PATHS = ["file:///etc/passwd", "http://127.0.0.1/x.jpg", "a\0b.jpg", ""]


@pytest.mark.parametrize("reader", sorted(FORMATS))
def test_every_reader_refuses_media_outside_the_root(tmp_path, reader):
    files = {}
    for role, content in FORMATS[reader][1].items():
        (tmp_path / role).write_text(content if isinstance(content, str) else json.dumps(content))
        files[role] = [str(tmp_path / role)]
    for path in (*OUTSIDE, *NO_PATHS):
        with pytest.raises(DataError, match=r"leaves the media root|is a URL|NUL|expected the path of a file"):
            list(READERS[reader](Origin("set", files, "/d", {"image": path})))
    for path in OUTSIDE:
        samples = list(READERS[reader](Origin("set", files, "/d", {"image": path}, allow_outside=True)))
        assert samples[0].media[0].path == os.path.join("/d", path)
    for path in NO_PATHS:
        with pytest.raises(DataError, match=r"is a URL|NUL|expected the path of a file"):
            list(READERS[reader](Origin("set", files, "/d", {"image": path}, allow_outside=True)))


def test_every_reader_is_tried_with_paths_that_lead_out():
    unnamed = {"webdataset", "huggingface", "messages"}  # whose media are in the shard, or named by the data: test_own
    benchmarks = {name for name in READERS if hasattr(options, name)}  # tests/tasks/eval has their layouts
    assert set(FORMATS) == set(READERS) - unnamed - benchmarks


@pytest.mark.parametrize("number", ["1.5", "true", '"x"', "null"])
def test_what_is_no_whole_number_is_refused(read, number):
    with pytest.raises(DataError, match="expected a whole number"):
        read("msrvtt_qa", file=f'[{{"answer": "a", "id": 3, "question": "q?", "video_id": {number}}}]')


# ---- findings of real annotation files (one small file of each published layout)


def test_answers_of_music_avqa_are_words_of_its_vocabulary(read):
    def answers(given):
        row = {"video_id": "1", "question_id": 1, "question_content": "What?", "templ_values": "[]", "anser": given}
        return read("music_avqa", file=[row])[0].answers

    assert answers("electric_bass") == ("electric bass",)
    assert (answers("two"), answers("2")) == (("two", "2"), ("2", "two"))
    assert answers("more than ten") == ("more than ten",)


def test_repeated_ids_become_unique(read):
    row = {"video_id": "2", "question_id": 7, "question_content": "How many?", "templ_values": "[]", "anser": "one"}
    samples = read("music_avqa", file=[row, row | {"anser": "three"}, row | {"question_id": 8}])
    assert [(sample.id, asked(sample)[1]) for sample in samples] == [("7", "one"), ("7#2", "three"), ("8", "one")]


def test_okvqas_types_of_questions_have_names(read):
    questions = {"questions": [{"image_id": 11, "question": "Which game?", "question_id": 111}]}
    annotation = {"answer_type": "other", "question_type": "one", "question_id": 111, "answers": [{"answer": "chess"}]}
    annotations = {"question_types": {"one": "Sports", "two": "Plants"}, "annotations": [annotation]}
    [sample] = read("vqav2", questions=questions, annotations=annotations)
    assert sample.meta["type"] == sample.meta["question_type"] == "Sports"


@pytest.mark.parametrize("reader", ["coco_karpathy", "msrvtt"])
def test_a_split_that_a_file_lacks_is_named_with_those_that_it_has(read, reader):
    with pytest.raises(DataError, match=r"file\.txt has no split test; it has train \(1\)"):
        read(reader, None, {"split": "test"}, **FORMATS[reader][1])


def test_only_the_ending_of_a_media_file_is_cut_off(read):
    talk = [{"from": "human", "value": "What sounds?"}, {"from": "gpt", "value": "A door."}]
    rows = [{"video_id": name, "conversations": talk} for name in ("abC_20.000_30.000", "a.MP4")]
    samples = read("multis", {"video": "v/{stem}.mp4"}, file=rows)
    assert [sample.media[0].path for sample in samples] == ["/d/v/abC_20.000_30.000.mp4", "/d/v/a.mp4"]


@pytest.mark.parametrize("reader", sorted(FORMATS))
def test_every_reader_takes_several_files(tmp_path, reader):
    media, contents = FORMATS[reader]
    files = {}
    for role, content in contents.items():
        (tmp_path / role).write_text(content if isinstance(content, str) else json.dumps(content))
        files[role] = [str(tmp_path / role)]
    one = list(READERS[reader](Origin("set", files, "/d", media)))
    two = list(READERS[reader](Origin("set", {role: paths * 2 for role, paths in files.items()}, "/d", media)))
    if reader not in ("audiocaps", "coco_annotations"):  # which join the captions of a medium
        assert len(two) == 2 * len(one)
    assert len({sample.id for sample in two}) == len(two)


def test_a_table_without_a_header_names_the_option(read):
    with pytest.raises(DataError, match=r"options: \{columns: \[caption, url\]\}"):
        read("pairs_tsv", file="a dog\thttp://x/1\na cat\thttp://x/2\n")


def test_wavcaps_leaves_out_the_clips_of_other_tests(tmp_path, caplog):
    def entry(name):
        return {"id": name, "caption": "Rain.", "duration": 1.0}

    paths = {part: tmp_path / "json_files" / part / "x.json" for part in ("AudioSet_SL", "FreeSound")}
    for part, path in paths.items():
        path.parent.mkdir(parents=True)
        ids = ["Yab.wav", "Ycd.wav"] if part == "AudioSet_SL" else ["101", "Yab"]
        path.write_text(json.dumps({"data": [entry(name) for name in ids]}))
    files = {part: [str(path)] for part, path in paths.items()}

    def ids(**settings):
        return [sample.id for sample in READERS["wavcaps"](Origin("set", files, str(tmp_path), {}, settings))]

    every = ["AudioSet_SL/Yab", "AudioSet_SL/Ycd", "FreeSound/101", "FreeSound/Yab"]
    assert ids() == every
    assert "blacklist_exclude_all_ac.json does not exist, so training includes clips" in caplog.text
    listed = tmp_path / "json_files" / "blacklist" / "blacklist_exclude_all_ac.json"
    listed.parent.mkdir()
    listed.write_text(json.dumps({"AudioSet": ["Yab.wav"], "FreeSound": ["101"]}))
    assert ids() == ids(exclude="json_files/blacklist/blacklist_exclude_all_ac.json") == [every[1], every[3]]
    assert ids(exclude=None) == every


def test_the_originals_conversations():
    """The released annotation files through reader and prompt are the original's conversations (its data_task.py)."""
    rules = json.loads((Path(__file__).parents[2] / "golden" / "data_rules.json").read_text())
    named = {"ti": ("image",), "tv": ("video",), "ta": ("audio",), "tva": ("video", "audio"), "tia": ("image", "audio")}
    for case in rules["conversation_templates"]:
        media, task = case["task"].split("-")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "a.json")
            path.write_text(json.dumps([case["annotation"]]))
            most = {"messages": 8 if task == "conv" else 2}
            origin = Origin("set", {"file": [str(path)]}, "/d", dict.fromkeys(named[media], "{id}"), most)
            [sample] = READERS["multis"](origin)
        wording = (case["prompt_list"] or ["?"])[0].replace("<QUESTION>", "{question}")
        templates = Templates({"t": TaskTemplates(templates=[wording])} if case["prompt_list"] else {}, {})
        settings = PromptSettings(task="t", templates=templates, reply_end="###" if task == "conv" else "\n###")
        pieces = SampleDataset("set", [sample], settings).pieces(sample, None)
        assert "".join("<query>" if isinstance(p, Slot) else p.text for p in pieces) == case["conversation"]
