"""The builders' table: names, files looked for before anything starts, conversion, mixtures."""

from __future__ import annotations

import csv
import json
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.plugin import compat
from lavis_chatbridge.prompting import Message, Text
from lavis_chatbridge.schema import Medium, Sample, write_jsonl

compat.apply()
registry = pytest.importorskip("lavis.common.registry").registry
builders = pytest.importorskip("lavis_chatbridge.datasets.builders")

STAGE_1 = ["coco_caption", "sbu", "cc3m", "cc12m", "laion115m", "webvid10m", "wavcaps"]
STAGE_2 = ["vqav2", "vgqa", "coco_caption", "msrvtt_qa", "msrvtt_caption", "audiocaps"]
STAGE_2 += [
    f"{s}_{k}" for s in ("llava", "msrvtt", "audiocaps", "valor") for k in ("conversation", "detail", "reasoning")
]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CHATBRIDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CHATBRIDGE_DATA", raising=False)


def builder(name, **section):
    return registry.get_builder_class(name)(section)


def test_every_data_set_is_registered():
    known = registry.list_datasets()
    assert {f"align_{name}" for name in STAGE_1} <= set(known)
    assert {f"multis_{name}" for name in STAGE_2} | {"multis", "chatbridge_jsonl"} <= set(known)
    assert list(builder("multis").settings.parts) == [f"multis_{name}" for name in STAGE_2]
    names = registry.get_builder_class("chatbridge_jsonl").split_names
    assert names({"splits": {"train": "a.jsonl", "val": None, "test": ["b.jsonl"]}}) == ["train", "test"]
    for name in known:
        cls = registry.get_builder_class(name)
        if issubclass(cls, builders.ChatBridgeBuilder):
            path = cls.default_config_path()
            assert name in builders.OmegaConf.load(path).datasets


def test_own_data_becomes_one_source_per_modality(pictures):
    own = Sample("a", (Medium("image", str(pictures / "p0.png")),), ("c",))
    write_jsonl(pictures / "own.jsonl", [own, Sample("t", turns=(Message("user", "q"),))])
    groups = builder("chatbridge_jsonl", splits={"train": str(pictures / "own.jsonl")}).build_datasets()
    assert [source.name for source in groups["train"].sources] == ["chatbridge_jsonl/image", "chatbridge_jsonl/text"]
    item = groups["train"][0]
    assert item["image"][0].shape == (3, 224, 224)
    assert item["pieces"][-1] == Text("c\n", target=True)
    assert groups["train"][1]["pieces"] == [Text("###Human: q###Assistant:")]


def test_paths_follow_the_data_root_and_limits_hold(pictures, monkeypatch):
    monkeypatch.setenv("CHATBRIDGE_DATA", str(pictures))
    group = builder("chatbridge_jsonl", splits={"train": "pictures.jsonl"}, limit=5).build_datasets()["train"]
    assert len(group) == 5
    assert group.name == "chatbridge_jsonl"
    assert group.sources[0].samples.root == str(pictures)


def test_the_worlds_layout(tmp_path):
    for kind in ("image", "video", "audio"):
        for split in ("train", "test", "heldout"):
            sample = Sample(split, (Medium(kind, str(tmp_path / "x")),), ("c",))
            write_jsonl(tmp_path / f"annotations/{kind}_{split}.jsonl", [sample], root=tmp_path)
    groups = builder("chatbridge_world_caption", data_root=str(tmp_path)).build_datasets()
    assert sorted(groups) == ["heldout", "test", "train"]
    assert [s.name.split("/")[1] for s in groups["train"].sources] == ["image", "video", "audio"]


def test_files_of_one_modality_are_named_by_file(pictures):
    write_jsonl(pictures / "more.jsonl", [Sample("x", (Medium("image", str(pictures / "p0.png")),), ("c",))])
    paths = [str(pictures / name) for name in ("pictures.jsonl", "more.jsonl")]
    group = builder("chatbridge_jsonl", splits={"train": paths}).build_datasets()["train"]
    assert [source.name for source in group.sources] == ["chatbridge_jsonl/pictures", "chatbridge_jsonl/more"]


def test_faults_of_a_section_are_found_before_anything_is_loaded(tmp_path):
    check = registry.get_builder_class("chatbridge_jsonl").check_config
    with pytest.raises(ConfigError, match=r"unknown key datasets.x.reeder, did you mean 'reader'\?"):
        check({"reeder": "jsonl", "splits": {"train": "x"}}, "datasets.x")
    with pytest.raises(ConfigError, match="splits is missing"):
        check({}, "datasets.x")
    with pytest.raises(ConfigError, match="unknown reader 'cocoa'"):
        check({"reader": "cocoa", "splits": {"train": "x"}}, "datasets.x")
    with pytest.raises(ConfigError, match=r"2 of its files .*data root .*a\.jsonl, .*b\.jsonl"):
        check({"splits": {"train": ["a.jsonl", "b.jsonl"]}, "data_root": str(tmp_path)}, "datasets.x")
    world = registry.get_builder_class("chatbridge_world_caption")
    world.check_config({**world.ROW, "data_root": str(tmp_path)}, "datasets.world")


@pytest.mark.parametrize(
    ("own", "variable", "place", "said"),
    [
        ("mine", "other", "mine", "set by datasets.x.data_root)"),
        (None, "other", "other", "set by env.data_root or $CHATBRIDGE_DATA)"),
        (None, None, "", "this folder, since neither datasets.x.data_root nor env.data_root nor $"),
    ],
)
def test_missing_files_come_with_who_chose_the_data_root(tmp_path, monkeypatch, own, variable, place, said):
    monkeypatch.chdir(tmp_path)
    if variable:
        monkeypatch.setenv("CHATBRIDGE_DATA", variable)
    check = registry.get_builder_class("chatbridge_jsonl").check_config
    with pytest.raises(ConfigError) as caught:
        check({"splits": {"train": "a.jsonl"}, "data_root": own}, "datasets.x")
    assert f"(data root {tmp_path / place}, {said}" in str(caught.value)


def test_all_missing_files_are_named_at_once(tmp_path):
    with pytest.raises(DataError) as caught:
        builders.require_files(
            {"align_webvid10m": {"data_root": str(tmp_path)}, "multis": {"data_root": str(tmp_path)}}
        )
    for part in ("results_10M_train.csv", "v2_mscoco_train2014_annotations.json", "videos/"):
        assert part in str(caught.value)
    with pytest.raises(DataError, match=r"align_cc3m: 1 of its files .*\*\.tar"):
        builder("align_cc3m", data_root=str(tmp_path)).build_datasets()


def test_other_formats_are_converted_once(tmp_path, caplog):
    (tmp_path / "audiocaps/audio").mkdir(parents=True)
    table = tmp_path / "audiocaps/train.csv"

    def write(*rows):
        with open(table, "w", newline="") as file:
            csv.writer(file).writerows([["audiocap_id", "youtube_id", "start_time", "caption"], *rows])

    write([1, "ab", 30, "A dog"], [2, "cd", 0, "A bell"])
    section = {"data_root": str(tmp_path)}
    with caplog.at_level("INFO"):
        first = builder("multis_audiocaps", **section).build_datasets()["train"]
        builder("multis_audiocaps", **section).build_datasets()
    assert sum("converting" in message for message in caplog.messages) == 1
    sample = first.sources[0].sample(0)
    assert sample.media == (Medium("audio", str(tmp_path / "audiocaps/audio/ab_30.wav")),)
    assert first.sources[0].settings.task == "audio_caption"
    pieces = first.sources[0].pieces(sample, None)
    assert pieces[2].text == ".###Human: Describe the sound in a sentence.###Assistant:"
    write([1, "ab", 30, "A dog"], [2, "cd", 0, "A bell"], [3, "ef", 5, "A car"])
    assert len(builder("multis_audiocaps", **section).build_datasets()["train"]) == 3
    write([1, "../../x", 30, "A dog"])
    with pytest.raises(DataError, match=r"train\.csv:2: .* leaves the media root"):
        builder("multis_audiocaps", **section).build_datasets()


def test_shards_are_read_in_place(tmp_path):
    (tmp_path / "cc3m/shards").mkdir(parents=True)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(picture := BytesIO(), "JPEG")
    for number in range(2):
        (tmp_path / "7.jpg").write_bytes(picture.getvalue())
        (tmp_path / "7.txt").write_text("a cat")
        with tarfile.open(tmp_path / f"cc3m/shards/0000{number}.tar", "w") as shard:
            for name in ("7.jpg", "7.txt"):
                shard.add(tmp_path / name, name)
    group = builder("align_cc3m", data_root=str(tmp_path)).build_datasets()["train"]
    assert len(group) == 2
    assert group[1]["image"][0].shape == (3, 224, 224)
    assert group[1]["text_output"] == "a cat\n"


def test_missing_web_media_can_be_left_out(tmp_path, caplog):
    (tmp_path / "webvid/videos/p").mkdir(parents=True)
    (tmp_path / "webvid/videos/p/2.mp4").write_bytes(b"x")
    lines = ["videoid,contentUrl,duration,page_dir,name", "1,u,PT1S,p,one", "2,u,PT1S,p,two"]
    (tmp_path / "webvid/results_10M_train.csv").write_text("\n".join(lines) + "\n")
    group = builder("align_webvid10m", data_root=str(tmp_path)).build_datasets()["train"]
    assert [group.sources[0].sample(i).id for i in range(len(group))] == ["2"]
    assert "left out 1 samples" in caplog.text
    (tmp_path / "webvid/videos/p/1.mp4").write_bytes(b"x")
    caplog.clear()
    assert len(builder("align_webvid10m", data_root=str(tmp_path)).build_datasets()["train"]) == 1
    [message] = [message for message in caplog.messages if "left out 1 samples" in message]
    Path(message.split("delete ")[1].split(" when")[0]).unlink()
    caplog.clear()
    assert len(builder("align_webvid10m", data_root=str(tmp_path)).build_datasets()["train"]) == 2
    assert "left out" not in caplog.text


def test_a_mixture_of_parts(tmp_path):
    (tmp_path / "msrvtt/videos").mkdir(parents=True)
    (tmp_path / "multis").mkdir()
    rows = [{"answer": "dog", "category_id": 1, "id": i, "question": "what is it?", "video_id": i} for i in range(3)]
    (tmp_path / "msrvtt/train_qa.json").write_text(json.dumps(rows))
    talk = [{"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "A dog runs."}]
    (tmp_path / "multis/video_detail_10k.json").write_text(json.dumps([{"video_id": "video1", "conversations": talk}]))
    parts = ["multis_msrvtt_qa", "multis_msrvtt_detail"]
    group = builder("multis", parts=parts, data_root=str(tmp_path)).build_datasets()["train"]
    assert [(source.name, len(source), source.ratio) for source in group.sources] == [
        ("multis_msrvtt_qa", 3, None),
        ("multis_msrvtt_detail", 1, None),
    ]
    asked = [source.pieces(source.sample(0), None)[2].text.partition("Human: ")[2] for source in group.sources]
    assert asked == ["what is it? Answer in a word or two.###Assistant:", "What happens?###Assistant:"]
    ratios = dict.fromkeys(parts, 2.0)
    shared = builder("multis", parts=parts, ratios=ratios, data_root=str(tmp_path), limit=2).build_datasets()["train"]
    assert [(len(source), source.ratio) for source in shared.sources] == [(2, 2.0), (1, 2.0)]
    with pytest.raises(ConfigError, match="multis_msrvtt_detail has none"):
        builder("multis", parts=parts, ratios={"multis_msrvtt_qa": 1}, data_root=str(tmp_path)).build_datasets()
    with pytest.raises(ConfigError, match="did you mean 'multis_vgqa'"):
        builder("multis", parts=["multis_vqga"], data_root=str(tmp_path)).build_datasets()


def test_templates_of_ones_own(pictures):
    (pictures / "mine.yaml").write_text("tasks: {greet: {templates: ['Hi, {question}']}}\n")
    write_jsonl(
        pictures / "t.jsonl", [Sample("t", turns=(Message("user", "who?"), Message("assistant", "I")), task="greet")]
    )
    section = {"splits": {"test": str(pictures / "t.jsonl")}, "templates": [str(pictures / "mine.yaml")]}
    item = builder("chatbridge_jsonl", **section).build_datasets()["test"][0]
    assert item["pieces"][0] == Text("###Human: Hi, who?###Assistant:")


def test_an_unknown_task_is_refused_whichever_stage_uses_it(pictures):
    (pictures / "mine.yaml").write_text("tasks: {greet: {templates: ['Hi, {question}']}}\n")
    section = {"splits": {"test": "t.jsonl"}, "stage": "alignment"}
    with pytest.raises(ConfigError, match=r"task: no instruction template is for 'image_captoin', did you mean 'im"):
        builder("chatbridge_jsonl", **section, task="image_captoin")
    with pytest.raises(ConfigError, match=r"for 'greet'; known are audio_caption"):
        builder("chatbridge_jsonl", **section, task="greet")
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        builder("chatbridge_jsonl", **section, task="greet", templates=["none.yaml"])
    for templates in ([str(pictures / "mine.yaml")], False):
        assert builder("chatbridge_jsonl", **section, task="greet", templates=templates).settings.task == "greet"


def test_nothing_is_cached_if_no_media_exist(tmp_path):
    (tmp_path / "valor" / "videos").mkdir(parents=True)
    rows = [{"video_id": "abC_20.000_30.000", "desc": "A door shuts."}]
    (tmp_path / "valor" / "desc_test.json").write_text(json.dumps(rows))
    for _ in range(2):
        with pytest.raises(DataError, match=r"none of the 1 samples of .*desc_test\.json has its media; the first"):
            builder("eval_valor", data_root=str(tmp_path)).build_datasets()
    (tmp_path / "valor" / "videos" / "abC_20.000_30.000.mp4").write_bytes(b"x")
    assert len(builder("eval_valor", data_root=str(tmp_path)).build_datasets()["test"]) == 1


def test_lists_and_patterns_of_any_format_are_read(tmp_path):
    (tmp_path / "audiocaps" / "audio").mkdir(parents=True)
    for name, line in (("first", "1,-abcdefghij,30,a sound"), ("second", "2,_abcdefghij,0,another sound")):
        (tmp_path / f"{name}.csv").write_text(f"audiocap_id,youtube_id,start_time,caption\n{line}\n")
    for files in (["first.csv", "second.csv"], "*.csv", ["f*.csv", "second.csv"]):
        section = {"data_root": str(tmp_path), "splits": {"train": files}}
        assert len(builder("multis_audiocaps", **section).build_datasets()["train"]) == 2
    with pytest.raises(ConfigError, match=r"splits\.train names .*first\.csv twice: name each file once"):
        builder("multis_audiocaps", data_root=str(tmp_path), splits={"train": ["*.csv", "first.csv"]}).build_datasets()


def test_chats_of_multis_that_do_not_exist_are_left_out_of_the_mixture(tmp_path, caplog):
    (tmp_path / "audiocaps" / "audio").mkdir(parents=True)
    (tmp_path / "multis").mkdir()
    talk = [{"from": "human", "value": "What sounds?"}, {"from": "gpt", "value": "A door."}]
    (tmp_path / "multis/audio_conversation.json").write_text(json.dumps([{"video_id": "a", "conversations": talk}]))
    parts = ["multis_audiocaps_conversation", "multis_audiocaps_detail"]
    group = builder("multis", parts=parts, data_root=str(tmp_path)).build_datasets()["train"]
    assert [source.name for source in group.sources] == ["multis_audiocaps_conversation"]
    assert "left out multis_audiocaps_detail, whose files do not exist" in caplog.text
    with pytest.raises(DataError, match=r"audio_detail\*\.json"):
        builder("multis_audiocaps_detail", data_root=str(tmp_path)).build_datasets()
