"""The builders: names, files looked for before anything starts, conversion, mixtures."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import soundfile
import yaml

from lavis_chatbridge.datasets.readers import READERS
from lavis_chatbridge.datasets.settings import DataSettings
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.prompting.conversation import Message, Text
from lavis_chatbridge.schema import Medium, Sample, write_jsonl
from tests.test_guides import ROOT, blocks

registry = pytest.importorskip("lavis.common.registry").registry
builders = pytest.importorskip("lavis_chatbridge.datasets.builders")

AUDIOCAPS = "audiocap_id,youtube_id,start_time,caption\n"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CHATBRIDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CHATBRIDGE_DATA", raising=False)


def builder(name, **section):
    return registry.get_builder_class(name)(section)


def train(name, **section):
    return builder(name, **section).build_datasets()["train"]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_every_data_set_is_registered():
    alignment = ("coco_caption", "sbu", "cc3m", "cc12m", "laion115m", "webvid10m", "wavcaps")
    chats = map("_".join, product(("llava", "msrvtt", "audiocaps", "valor"), ("conversation", "detail", "reasoning")))
    parts = ("vqav2", "vgqa", "coco_caption", "msrvtt_qa", "msrvtt_caption", "audiocaps", *chats)
    parts = [f"multis_{name}" for name in parts]
    names = {*(f"align_{name}" for name in alignment), *parts, "multis", "chatbridge_jsonl"}
    assert names <= set(registry.list_datasets())
    assert list(builder("multis").settings.parts) == parts
    splits = registry.get_builder_class("chatbridge_jsonl").split_names
    assert splits({"splits": {"train": "a.jsonl", "val": None, "test": ["b.jsonl"]}}) == ["train", "test"]


def test_own_data_becomes_one_source_per_modality(pictures, monkeypatch):
    own = Sample("a", (Medium("image", str(pictures / "p0.png")),), ("c",))
    write_jsonl(pictures / "own.jsonl", [own, Sample("t", turns=(Message("user", "q"),)), own])
    monkeypatch.setenv("CHATBRIDGE_DATA", str(pictures))
    group = train("chatbridge_jsonl", splits={"train": "own.jsonl"}, limit=2)
    assert [source.name for source in group.sources] == ["chatbridge_jsonl/image", "chatbridge_jsonl/text"]
    assert (len(group), group.name) == (2, "chatbridge_jsonl")
    assert group[0]["image"][0].shape == (3, 224, 224)
    assert group[0]["pieces"][-1] == Text("c\n", target=True)
    assert group[1]["pieces"] == [Text("###Human: q###Assistant:")]
    write_jsonl(pictures / "own.jsonl", [own])
    group = train("chatbridge_jsonl", splits={"train": ["own.jsonl", "pictures.jsonl"]})
    assert [source.name for source in group.sources] == ["chatbridge_jsonl/own", "chatbridge_jsonl/pictures"]


def test_a_task_that_captions_ignore_is_named_once(pictures, caplog):
    section = {"splits": {"train": str(pictures / "pictures.jsonl")}, "task": "image_caption"}
    train("chatbridge_jsonl", **section, stage="instruction")
    train("chatbridge_jsonl", **section)
    assert caplog.text.count("which ignores task: image_caption; set stage: instruction") == 1


def test_faults_of_a_section_are_found_before_anything_is_loaded(tmp_path):
    check = registry.get_builder_class("chatbridge_jsonl").check_config
    missing = rf"missing files or folders \(data root {tmp_path}; datasets\.x\.data_root, .*a\.jsonl, .*b\.jsonl"
    table = {"reader": "huggingface"}
    for section, fault in (
        ({"reeder": "jsonl"}, r"unknown key datasets.x.reeder, did you mean 'reader'\?"),
        ({"splits": {}}, "splits is missing"),
        ({"reader": "cocoa"}, "unknown reader 'cocoa'"),
        ({"data_root": str(tmp_path)}, missing),
        ({"options": {"foo": 1}}, "unknown key options.foo: reader jsonl has no options"),
        ({**table, "options": {"colums": {"image": "x"}}}, "unknown key options.colums, did you mean 'columns'"),
        ({**table, "options": {"train": {"colums": {}}}}, "unknown key options.train.colums, did you mean 'columns'"),
        ({**table, "options": {"train": 1}}, "options.train: expected a mapping, the options of this split, found 1"),
        ({"task": "image_captoin"}, r"task 'image_captoin' has no instruction template, did you mean 'im"),
        ({"task": "greet"}, r"task 'greet' has no instruction template; known are audio_caption"),
        ({"task": "greet", "templates": ["none.yaml"]}, r"none\.yaml"),
    ):
        with pytest.raises(ConfigError, match=fault):
            check({"splits": {"train": ["a.jsonl", "b.jsonl"]}, **section}, "datasets.x")
    world = registry.get_builder_class("chatbridge_world_caption")
    world.check_config({**world.DEFAULTS, "data_root": str(tmp_path)}, "datasets.world")


def test_all_missing_files_are_named_at_once(tmp_path):
    root = {"data_root": str(tmp_path)}
    with pytest.raises(DataError) as caught:
        builders.require_files({"align_webvid10m": root, "multis": root})
    for part in ("results_10M_train.csv", "v2_mscoco_train2014_annotations.json", f"{tmp_path}/webvid/videos/"):
        assert part in str(caught.value)
    assert DataSettings(media={"image": "coco/images/{image}"}, reader="webvid").missing() == ["coco/images/"]


def test_other_formats_are_converted_once(tmp_path, caplog):
    (tmp_path / "audiocaps/audio").mkdir(parents=True)
    table, section = tmp_path / "audiocaps/train.csv", {"data_root": str(tmp_path)}
    write(table, AUDIOCAPS + "1,ab,30,A dog\n2,cd,0,A bell\n")
    with caplog.at_level("INFO"):
        first = train("multis_audiocaps", **section)
        train("multis_audiocaps", **section)
    assert sum("converting" in message for message in caplog.messages) == 1
    sample = first.sources[0].sample(0)
    assert sample.media == (Medium("audio", str(tmp_path / "audiocaps/audio/ab_30.wav")),)
    write(table, AUDIOCAPS + "1,ab,30,A dog\n2,cd,0,A bell\n3,ef,5,A car\n")
    assert len(train("multis_audiocaps", **section)) == 3


def test_lists_and_patterns_of_any_format_are_read(tmp_path):
    (tmp_path / "audiocaps" / "audio").mkdir(parents=True)
    write(tmp_path / "first.csv", AUDIOCAPS + "1,-abcdefghij,30,a sound\n")
    write(tmp_path / "second.csv", AUDIOCAPS + "2,_abcdefghij,0,another sound\n")
    for files in (["first.csv", "second.csv"], "*.csv", ["f*.csv", "second.csv"]):
        assert len(train("multis_audiocaps", data_root=str(tmp_path), splits={"train": files})) == 2
    with pytest.raises(ConfigError, match=r"splits\.train names .*first\.csv twice: name each file once"):
        train("multis_audiocaps", data_root=str(tmp_path), splits={"train": ["*.csv", "first.csv"]})


def test_missing_web_media_are_left_out(tmp_path, caplog):
    lines = ["videoid,contentUrl,duration,page_dir,name", "1,u,PT1S,p,one", "2,u,PT1S,p,two"]
    write(tmp_path / "webvid/results_10M_train.csv", "\n".join(lines) + "\n")
    (tmp_path / "webvid/videos").mkdir()

    def ids():
        caplog.clear()
        return [sample.id for sample in train("align_webvid10m", data_root=str(tmp_path)).sources[0].samples]

    for _ in range(2):  # an empty result is not cached
        with pytest.raises(DataError, match=r"none of the 2 samples of .*train\.csv has its media; the first path is"):
            ids()
    write(tmp_path / "webvid/videos/p/2.mp4", "x")
    assert ids() == ["2"]
    write(tmp_path / "webvid/videos/p/1.mp4", "x")
    assert ids() == ["2"]
    [message] = [message for message in caplog.messages if "left out 1 samples" in message]
    Path(message.split("delete ")[1].split(" when")[0]).unlink()
    assert ids() == ["1", "2"]
    assert "left out" not in caplog.text


def test_a_mixture_of_parts(tmp_path, caplog):
    (tmp_path / "msrvtt/videos").mkdir(parents=True)
    rows = [{"answer": "dog", "category_id": 1, "id": i, "question": "what is it?", "video_id": i} for i in range(3)]
    write(tmp_path / "msrvtt/train_qa.json", rows)
    talk = [{"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "A dog runs."}]
    write(tmp_path / "multis/video_detail_10k.json", [{"video_id": "video1", "conversations": talk}])
    parts = ["multis_msrvtt_qa", "multis_msrvtt_detail", "multis_msrvtt_reasoning"]
    root = {"data_root": str(tmp_path)}
    group = train("multis", parts=parts, **root)
    sources = [(source.name, len(source), source.ratio) for source in group.sources]
    assert sources == [("multis_msrvtt_qa", 3, None), ("multis_msrvtt_detail", 1, None)]
    assert "left out multis_msrvtt_reasoning, whose files do not exist" in caplog.text
    with pytest.raises(DataError, match=r"video_complex_reasoning\*\.json"):
        train("multis_msrvtt_reasoning", **root)
    asked = [source.pieces(source.sample(0), None)[2].text.partition("Human: ")[2] for source in group.sources]
    assert asked == ["what is it? Answer in a word or two.###Assistant:", "What happens?###Assistant:"]
    shared = train("multis", parts=parts, ratios=dict.fromkeys(parts, 2.0), **root, limit=2)
    assert [(len(source), source.ratio) for source in shared.sources] == [(2, 2.0), (1, 2.0)]
    with pytest.raises(ConfigError, match="multis_msrvtt_detail, multis_msrvtt_reasoning is in only one"):
        train("multis", parts=parts, ratios={"multis_msrvtt_qa": 1}, **root)
    with pytest.raises(ConfigError, match="did you mean 'multis_vgqa'"):
        train("multis", parts=["multis_vqga"], **root)


def test_templates_of_ones_own(pictures):
    mine = pictures / "mine.yaml"
    write(mine, "tasks: {greet: {templates: ['Hi, {question}']}}\n")
    write_jsonl(pictures / "t.jsonl", [Sample("t", turns=(Message("user", "who?"),), task="greet")])
    section = {"splits": {"train": str(pictures / "t.jsonl")}}
    group = train("chatbridge_jsonl", **section, templates=[str(mine)])
    assert group[0]["pieces"][0] == Text("###Human: Hi, who?###Assistant:")
    for templates in ([str(mine)], False):
        assert builder("chatbridge_jsonl", **section, task="greet", templates=templates).settings.task == "greet"


def test_the_guides_reader_of_ten_lines_and_its_section_make_a_data_set(tmp_path, monkeypatch):
    page = [text for _, text in blocks(ROOT / "docs/data.md")]
    python, section = (next(text for text in page if word in text) for word in ("def birds", "align_birds:"))
    body = python[python.index("def birds") : python.index("READERS[")]
    assert len(body.strip().splitlines()) <= 10
    monkeypatch.setitem(READERS, "birds", None)
    exec(compile(python, "data.md", "exec"), {"__name__": "guide"})
    (tmp_path / "birds" / "audio").mkdir(parents=True)
    soundfile.write(tmp_path / "birds" / "audio" / "a.wav", [0.0, 0.1] * 8000, 16_000)
    write(tmp_path / "birds" / "train.csv", "file,song\na.wav,two falling notes\n")
    own = yaml.safe_load(section)["datasets"]["align_birds"]
    [source] = train("chatbridge_jsonl", **own, data_root=str(tmp_path)).sources
    assert (source[0]["text_output"], len(source[0]["audio"])) == ("two falling notes\n", 1)
    assert Path(source.sample(0).media[0].path) == tmp_path / "birds" / "audio" / "a.wav"
