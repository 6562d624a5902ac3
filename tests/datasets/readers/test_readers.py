"""Annotation formats on tiny files in the published layout; tests/tasks/eval/layouts.py has the benchmarks'."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from lavis_chatbridge.datasets.dataset import SampleDataset
from lavis_chatbridge.datasets.readers import READERS
from lavis_chatbridge.datasets.readers.common import Origin
from lavis_chatbridge.datasets.settings import DataSettings
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.prompting.conversation import Message, Slot
from lavis_chatbridge.prompting.templates import TaskTemplates, Templates
from tests.datasets.conftest import sample_file

_TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A bus."}]
_VOTES = [{"answer": answer, "answer_id": 1} for answer in ("cat", "cat", "")]
_KARPATHY = {"filepath": "val2014", "filename": "a.jpg", "split": "train", "cocoid": 1, "sentences": [{"raw": "A cat"}]}
_MUSIC = {"video_id": "0272", "question_id": 50, "question_content": "Is the <Object> heard?", "anser": "yes"}
_MUSIC |= {"type": '["Audio", "Counting"]', "templ_values": '["violin"]', "question_deleted": 0}
_MSRVTT = {"videos": [{"video_id": "v0", "split": "train"}], "sentences": [{"caption": "x", "video_id": "v0"}]}
_MULTIS = [
    {"video_id": "v1", "conversations": _TALK},
    {"image_id": "v2", "question": ["q1", "q2"], "answer": ["a1", "a2"]},
    {"video_id": "v4", "desc": "d"},
    {"video_id": "v5", "text": ["STOP", "exit"]},
]
_NOCAPS = {
    "annotations": [{"image_id": 1, "caption": "A dog."}],
    "images": [{"id": 1, "file_name": "a.jpg", "domain": "near"}, {"id": 2, "file_name": "b.jpg"}],
}
_GQA = {"1": {"imageId": "n5", "question": "q?", "answer": "a", "types": {"structural": "query"}}}
_GENOME = {
    "questions": [{"id": 5, "qas": [{"image_id": 5, "qa_id": 9, "question": "What?", "answer": "Green."}]}],
    "images": [{"image_id": 5, "url": "https://x/VG_100K_2/5.jpg"}],
}
_AUDIOCAPS = 'audiocap_id,youtube_id,start_time,caption\n5,ab-c,30,"A dog, barking"\n6,ab-c,30,Barking\n'
_CLOTHO = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n rain on tin.wav,a,b,c,d, e \n"
_WEBVID = "videoid,contentUrl,duration,page_dir,name\n2,http://x/a.mp4,PT1S,006,Aerial shot\n"
_CHOICE = {"id": "q", "audio_id": "./a.wav", "question": "Which?", "choices": ["A. a drum", "B. a flute"]}
_HALLUCINATION = {"video_id": "v", "task": "AV Matching", "text": "Describe it.", "label": "A dog barks."}


@pytest.fixture
def read(tmp_path):
    """Write files by purpose (JSON for objects, text otherwise) and read them ``times`` times."""

    def reading(reader, media=None, settings=None, times=1, allow_outside=False, **files):
        paths = {}
        for role, content in files.items():
            path = tmp_path / f"{role}.txt"
            path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8", "surrogateescape")
            paths[role] = [str(path)] * times
        patterns = {"video": media} if isinstance(media, str) else media or {}
        return list(READERS[reader](Origin("set", paths, "/d", patterns, settings or {}, allow_outside)))

    return reading


def asked(sample):
    return [turn.text for turn in sample.turns]


@pytest.mark.parametrize(
    ("reader", "media", "files", "name", "path", "texts"),
    [
        ("audiocaps", "{youtube_id}_{start_time}.wav", _AUDIOCAPS, "5", "ab-c_30.wav", ["A dog, barking", "Barking"]),
        ("clotho", "{file_name}", _CLOTHO, " rain on tin.wav", " rain on tin.wav", ["a", "b", "c", "d", "e"]),
        ("coco_annotations", "{file_name}", _NOCAPS, "1", "a.jpg", ["A dog."]),
        ("coco_karpathy", "coco/{image}", {"images": [_KARPATHY]}, "1", "coco/val2014/a.jpg", ["A cat"]),
        ("gqa", "{image_id}.jpg", _GQA, "1", "n5.jpg", ["q?", "a"]),
        ("msrvtt", "{video_id}.mp4", _MSRVTT, "v0", "v0.mp4", ["x"]),
        ("multis", "{id}.mp4", _MULTIS, "v1#0", "v1.mp4", ["What is it?", "A bus."]),
        ("visual_genome", "{folder}/{image_id}.jpg", _GENOME, "9", "VG_100K_2/5.jpg", ["What?", "Green"]),
        ("wavcaps", "{id}.flac", {"data": [{"caption": "Rain.", "id": "101"}]}, "101", "101.flac", ["Rain."]),
        ("webvid", "{page_dir}/{videoid}.mp4", _WEBVID, "2", "006/2.mp4", ["Aerial shot"]),
    ],
)
def test_the_published_layout_is_read_from_one_file_or_several(read, reader, media, files, name, path, texts):
    files = files if reader == "visual_genome" else {"file": files}
    samples = read(reader, media, **files)
    first = samples[0]
    assert (first.id, first.media[0].path, asked(first) or list(first.captions)) == (name, f"/d/{path}", texts)
    two = read(reader, media, times=2, **files)
    times = 1 if reader == "audiocaps" else 2  # which joins the captions of a sound
    assert len({sample.id for sample in two}) == len(two) == len(samples) * times


def test_media_outside_the_root_and_unknown_fields_are_refused(read):
    with pytest.raises(ConfigError, match=r"media path 'x/{nope}.mp4' does not fit this format's fields"):
        read("webvid", "x/{nope}.mp4", file=_WEBVID)
    for path in ("a/../../x.jpg", "..\\x.jpg"):
        with pytest.raises(DataError, match="leaves the media root"):
            read("webvid", path, file=_WEBVID)
        assert read("webvid", path, allow_outside=True, file=_WEBVID)[0].media[0].path == f"/d/{path}"


def test_vqav2_and_okvqa(read):
    question = {"image_id": 9, "question": "What is it?", "question_id": 90}
    label = {"multiple_choice_answer": "cat", "answers": _VOTES, "answer_type": "other", "question_id": 90}

    def vqa(label=None, **more):
        labels = {} if label is None else {"annotations": {"annotations": [label], **more}}
        return read("vqav2", questions={"questions": [question]}, **labels)[0]

    sample = vqa(label | {"question_type": "what"})
    assert sample.turns == (Message("user", "What is it?"), Message("assistant", "cat"))
    assert sample.answers == ("cat", "cat", "")  # an empty answer is an answer too
    assert sample.meta == {"question_id": 90, "image_id": 9, "type": "other", "question_type": "what"}
    assert [turn.role for turn in vqa().turns] == ["user"]
    okvqa = {"question_type": "one", "question_id": 90, "answers": _VOTES}
    sample = vqa(okvqa, question_types={"one": "Sports", "two": "Plants"})
    assert (asked(sample)[1], sample.meta["type"], sample.meta["question_type"]) == ("cat", "Sports", "Sports")
    with pytest.raises(DataError, match=r"answers\[0\]: answer is None, expected text"):
        vqa(label | {"answers": [{"answer": None}]})
    with pytest.raises(DataError, match=r"questions\[0\]: question 90 has no annotation"):
        vqa(label | {"question_id": 91})
    with pytest.raises(ConfigError, match="the split names no 'questions' file, only file"):
        read("vqav2", file=[])


def test_karpathys_splits_and_laviss_lists(read):
    splits = [_KARPATHY | {"split": split, "cocoid": i} for i, split in enumerate(("train", "restval", "test"))]
    assert [s.id for s in read("coco_karpathy", file={"images": splits})] == ["0", "1"]
    assert [s.id for s in read("coco_karpathy", None, {"split": "test"}, file={"images": splits})] == ["2"]
    training = [{"caption": "A dog.", "image": "val2014/COCO_val2014_000000522418.jpg", "image_id": "coco_522418"}]
    [sample] = read("coco_karpathy", file=training)
    assert sample.meta == {"image_id": "COCO_val2014_000000522418"}
    testing = [{"image": "val2014/x.jpg", "caption": ["one", "two"]}]
    assert read("coco_karpathy", file=testing)[0].captions == ("one", "two")
    for reader, content in (("coco_karpathy", {"images": splits[:1]}), ("msrvtt", _MSRVTT)):
        with pytest.raises(DataError, match=r"file\.txt has no split val; it has train \(1\)"):
            read(reader, None, {"split": "val"}, file=content)


def test_pairs_from_the_web(read):
    cc3m = 'a "large" dog\thttp://x/1\nsecond\thttp://x/2\n'
    samples = read("pairs_tsv", "{row}.jpg", {"columns": ["caption", "url"]}, file=cc3m)
    assert [(s.captions[0], s.media[0].path) for s in samples] == [
        ('a "large" dog', "/d/0.jpg"),
        ("second", "/d/1.jpg"),
    ]
    [cc12m] = read("pairs_tsv", "{url_md5}.jpg", {"columns": ["url", "caption"]}, file="http://x/1\tdog\n")
    assert cc12m.media[0].path == "/d/a247d79628e388a8def1087b6dbe8776.jpg"
    with pytest.raises(DataError, match=r"options: \{columns: \[caption, url\]\}"):
        read("pairs_tsv", file=cc3m)
    sbu = {"image_urls": ["http://x/1"], "user_ids": ["u"], "captions": ["on the beach"]}
    assert read("pairs_json", file=sbu)[0].captions == ("on the beach",)
    lines = '{"url": "http://x/1", "caption": "a"}\n{"url": "http://x/2", "caption": "b"}\n'
    assert [s.captions[0] for s in read("pairs_json", file=lines)] == ["a", "b"]
    with pytest.raises(DataError, match="1 image_urls, but 2 captions"):
        read("pairs_json", file=sbu | {"captions": ["a", "b"]})


def test_domains_and_types_become_metadata(read):
    assert read("coco_annotations", file=_NOCAPS)[0].meta == {"image_id": 1, "type": "near"}
    assert read("gqa", file=_GQA)[0].meta == {"image_id": "n5", "type": "query"}
    assert read("music_avqa", file=[_MUSIC])[0].meta["type"] == ["Audio", "Counting"]


def test_a_video_that_the_mapping_of_msvd_qa_does_not_have_is_named(read):
    questions = [{"id": 5, "video_id": 12, "question": "what is it?", "answer": "cat"}]
    with pytest.raises(DataError, match=r"questions.txt: \[0\]: video 12 is not in"):
        read("msrvtt_qa", questions=questions, mapping="a_0_5 vid1\n")


def test_music_avqa(read):
    def answers(given):
        return read("music_avqa", file=[_MUSIC | {"anser": given}])[0].answers

    assert answers("electric_bass") == ("electric bass",)
    assert (answers("two"), answers("2")) == (("two", "2"), ("2", "two"))
    twice = [_MUSIC, _MUSIC | {"anser": "three"}, _MUSIC | {"question_deleted": 1}, _MUSIC | {"question_id": 8}]
    samples = read("music_avqa", file=twice)
    assert [(sample.id, asked(sample)[1]) for sample in samples] == [("50", "yes"), ("50#2", "three"), ("8", "yes")]
    with pytest.raises(DataError, match=r"1 placeholders in .*, but 0 values"):
        read("music_avqa", file=[_MUSIC | {"templ_values": "[]"}])


def test_llava(read):
    talk = [{"from": speaker, "value": "Is <image> it?\n<image>"} for speaker in ("human", "gpt", "human")]
    row = {"id": "4", "image": "4.jpg", "conversations": talk}
    [sample] = read("llava", "{image}", file=[row])  # without the question that has no answer
    assert [(turn.text, turn.media) for turn in sample.turns] == [("Is  it?", ("video",)), ("Is  it?", ())]
    with pytest.raises(DataError, match=r"\[0\].conversations\[0\]: from is 'gpt', expected 'human'"):
        read("llava", file=[row | {"conversations": talk[1:]}])


def test_avsd(read):
    talk = [{"question": "who is there?", "answer": "a man"}, {"question": "what then?", "answer": "__UNDISCLOSED__"}]
    content = {"dialogs": [{"image_id": "7UPGT", "dialog": talk}]}
    with pytest.raises(DataError, match=r"dialog\[1\]: the answer is __UNDISCLOSED__.*lbl_test_set4DSTC7-AVSD"):
        read("avsd", file=content)
    each = read("avsd", settings={"each_turn": True, "undisclosed": True}, file=content)
    assert [(s.id, len(s.turns)) for s in each] == [("7UPGT_0", 2), ("7UPGT_1", 3)]


def test_released_multis_files(read):
    samples = read("multis", file=_MULTIS)
    assert [asked(s) for s in samples[1:3]] == [["q1", "a1"], ["q2", "a2"]]
    assert [s.captions for s in samples[3:]] == [("d",), ("STOP, exit",)]
    rows = [{"video_id": name, "desc": "d"} for name in ("abC_20.000_30.000", "a.MP4")]
    samples = read("multis", "v/{stem}.mp4", file=rows)  # only the ending of a media file is cut off
    assert [sample.media[0].path for sample in samples] == ["/d/v/abC_20.000_30.000.mp4", "/d/v/a.mp4"]


def test_wavcaps_leaves_out_the_clips_of_other_tests(tmp_path, caplog):
    names = {"AudioSet_SL": ["Yab.wav", "Ycd.wav"], "FreeSound": ["101", "Yab"]}
    files = {}
    for part, ids in names.items():
        path = tmp_path / "json_files" / part / "x.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"data": [{"id": name, "caption": "Rain."} for name in ids]}))
        files[part] = [str(path)]

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


@pytest.mark.parametrize(("answer", "correct"), [("A", 0), ("(B)", 1), ("B. a flute", 1), ("a drum", 0)])
def test_an_answer_is_a_letter_or_an_option(read, answer, correct):
    [sample] = read("mmau", "{audio_id}", file=[_CHOICE | {"answer": answer, "task": "music"}])
    assert sample.meta == {"options": ["a drum", "a flute"], "correct": correct, "types": {"task": "music"}}
    assert sample.answers == (sample.meta["options"][correct],)
    assert asked(sample)[0].endswith("\nA. a drum\nB. a flute\nAnswer with the letter of the right option.")
    assert sample.media[0].path.endswith("/a.wav")


def test_mosi_quotes_what_is_said(read):
    lines = "video_id,clip_id,text,annotation,mode\nv,0,so,Positive,test\nv,1,so,Neutral,test\nv,2,so,Negative,train\n"
    [sample] = read("mosi", None, {"classes": ["Negative", "Positive"], "transcript": True}, file=lines)
    assert asked(sample)[0].startswith('The speaker says: "so". What is the sentiment')


@pytest.mark.parametrize(
    ("reader", "content", "message"),
    [
        ("valor", '[{"video_id": 1, "desc": }]', "not JSON: Expecting value: line 1"),
        ("valor", r'[{"video_id": "v", "desc": ["x", "\ud83d"]}]', r"desc is '\\ud83d', expected text"),
        ("gqa", "[]", r"expected an object, found \[\]; docs/data.md"),
        ("msrvtt", '{"videos": 3}', "videos is 3, expected a list"),
        ("msrvtt", {**_MSRVTT, "videos": []}, "'v0' is not among the videos"),
        ("multis", [_MULTIS[1] | {"answer": ["a1"]}], "2 questions, but 1 answers"),
        ("valor", '[\n{"video_id": "\udcff"}]', r"file\.txt:2: not UTF-8 at byte 14 of the line"),
        ("gqa", {"2013": {"imageId": "n1", "answer": "no"}}, "2013: question is None, expected text"),
        ("clotho", "file_name,caption_1\na.wav\n", ":2: expected 2 columns"),
        ("clotho", "file_name,caption_1\na.wav," + 200_000 * "x", "field larger than field limit"),
        *[("mmau", [_CHOICE | {"answer": text}], "answer .* is none of the options") for text in ("C", "A horn")],
        ("mmau", [_CHOICE | {"answer": ""}], "answer is '', expected text"),
        ("avhbench", [_HALLUCINATION], "label is 'A dog barks.', expected Yes or No"),
        *[("msrvtt_qa", f'[{{"video_id": {n}}}]', "expected a whole number") for n in ("1.5", "true", '"x"', "null")],
    ],
)
def test_a_fault_of_a_file_is_placed(read, reader, content, message):
    with pytest.raises(DataError, match=message):
        read(reader, file=content)


def shard(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return Origin("set", {"file": [str(path)]}, "/d")


def test_webdataset_shards(tmp_path, caplog):
    meta = json.dumps({"caption": "from json", "url": "u", "status": "success"}).encode()
    members = [
        ("000000000.jpg", b"JPEG0"), ("000000000.json", meta), ("000000000.txt", b" a cat \n"),
        ("._000000001.png", b"fork of macOS"), ("000000001.png", b"PNG"), ("000000001.json", meta),
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
    assert [content[m.offset : m.offset + m.size] for s in samples for m in s.media] == [b"JPEG0", b"PNG", b"WAV"]
    assert "left out 1 keys without a medium or without a text; the first is 00000.tar/000000002" in caplog.text
    with pytest.raises(DataError, match="not an uncompressed tar file"):
        list(READERS["webdataset"](shard(tmp_path / "z.tar.gz", members, "w:gz")))
    with pytest.raises(DataError, match=r"a.json: not JSON"):
        list(READERS["webdataset"](shard(tmp_path / "b.tar", [("a.json", b"{")])))
    with pytest.raises(DataError, match=r"c.tar: two members are named 1.jpg"):
        list(READERS["webdataset"](shard(tmp_path / "c.tar", [("1.jpg", b"a"), ("1.txt", b"t"), ("1.jpg", b"b")])))


def test_keys_of_webdataset_shards_may_have_dots(tmp_path):
    names = ("22.05", "235342 Track 2.0 (Clean Version)", "235342 Track 2.1", "v1.2/00")
    members = [(f"{name}{ending}", ending.encode()) for name in names for ending in (".mp3", ".seg.png", ".txt")]
    samples = list(READERS["webdataset"](shard(tmp_path / "a.tar", members)))
    assert [sample.id for sample in samples] == [f"a.tar/{name}" for name in names]
    assert {(sample.modality, sample.captions) for sample in samples} == {("audio", (".txt",))}


def test_a_shard_that_is_not_read_to_its_end_is_refused(tmp_path):
    """Python's tarfile takes each of these for a shorter archive."""
    pairs = [(f"{i}.{suffix}", f"{i}{suffix}".encode() * 40) for i in range(4) for suffix in ("jpg", "txt")]
    origin = shard(tmp_path / "good.tar", pairs)
    path = Path(origin.every_file[0])
    good = path.read_bytes()
    for damaged in (good[:4099] + b"?" + good[4100:], good + good, good[:4196]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"good\.tar: cannot be read from byte (4096|8192) on"):
            list(READERS["webdataset"](origin))


def test_the_originals_conversations(read):
    """The released annotation files through reader and prompt are the original's conversations (its data_task.py)."""
    rules = json.loads((Path(__file__).parents[2] / "golden" / "data_rules.json").read_text())
    named = {"ti": ("image",), "tv": ("video",), "ta": ("audio",), "tva": ("video", "audio"), "tia": ("image", "audio")}
    for case in rules["conversation_templates"]:
        media, task = case["task"].split("-")
        most: dict[str, Any] = {"messages": 8 if task == "conv" else 2}
        [sample] = read("multis", dict.fromkeys(named[media], "{id}"), most, file=[case["annotation"]])
        wording = (case["prompt_list"] or ["?"])[0].replace("<QUESTION>", "{question}")
        reply_end = "###" if task == "conv" else "\n###"
        settings = DataSettings(stage="instruction", task="t", templates=False, reply_end=reply_end)
        dataset = SampleDataset("set", sample_file(sample), settings)
        dataset.templates = Templates(tasks={"t": TaskTemplates(templates=[wording])} if case["prompt_list"] else {})
        pieces = dataset.pieces(sample, None)
        assert "".join("<query>" if isinstance(p, Slot) else p.text for p in pieces) == case["conversation"]
