"""What an evaluation prints and writes; conditions on media; predictions scored again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lavis.common.registry import registry
from PIL import Image

from lavis_chatbridge import cli
from lavis_chatbridge.chat import load_model
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.models.chatbridge import ChatBridge
from lavis_chatbridge.plugin import evaluate, report
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.runners.config import load_config
from lavis_chatbridge.schema import Medium, Sample, write_jsonl
from lavis_chatbridge.tasks.settings import EvaluationSettings
from tests.chat.building import TINY_TOKENIZER
from tests.models.standin import StandIn, serving

YAML = """
model: {{arch: chatbridge, model_type: tiny, checkpoint: null}}
datasets:
  chatbridge_jsonl: {{data_root: '{root}', splits: {{test: test.jsonl, gone: gone.jsonl}}, templates: false}}
run:
  task: chatbridge_captioning
  evaluate: true
  test_splits: [test]
  metrics: [exact_match]
  num_workers: 0
  max_len: 2
  device: cpu
  output_dir: '{root}/out'
  job_id: ''
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Three questions about pictures, one of which is not there, and a split of which none is."""
    root = tmp_path_factory.mktemp("data")
    for split, there in (("test", (0, 1)), ("gone", ())):
        samples = []
        for n in range(3):
            path = root / f"{split}{n}.png"
            if n in there:
                Image.fromarray(np.full((56, 56, 3), 80 * n, np.uint8)).save(path)
            turns = (Message("user", "What is it?", ("image",)), Message("assistant", "red"))
            samples.append(Sample(f"s{n}", (Medium("image", str(path)),), turns=turns))
        write_jsonl(root / f"{split}.jsonl", samples)
    path = root / "run.yaml"
    path.write_text(YAML.format(root=root))
    return path


def evaluated(config, *options, words=("evaluate",)):
    return cli.main([*words, "--cfg-path", str(config), *(["--options", *options] if options else [])])


def rows(printed):
    return [re.split(r"\s{2,}", line) for line in printed.splitlines()]


def test_the_scores_and_their_files_are_printed(config, capsys):
    assert evaluated(config) == 0
    result = config.parent / "out/result"
    found = json.loads((result / "test_step0_metrics.json").read_text())
    own = found["by_source"]["chatbridge_jsonl"]
    assert (found["samples"], found["not_predicted"]) == (own["samples"], own["not_predicted"]) == (2, 1)
    printed = rows(capsys.readouterr().out)
    assert printed[0] == ["data", "samples", "metric", "score", "95 %"]
    score = f"{own['headline']:.1f}"
    assert printed[2] == ["test chatbridge_jsonl", "2", "exact_match", score, "0.0 - 0.0"]
    assert printed[4] == ["test chatbridge_jsonl: 1 sample unreadable, the log has the reasons"]
    assert printed[-1] == [f"written to {result}/test_step0.jsonl, {result}/test_step0_metrics.json"]


def test_a_split_that_cannot_be_scored_beside_one_that_can_is_status_1(config, capsys):
    options = ("run.task=chatbridge_alignment", "run.test_splits=[gone,test]")
    assert evaluated(config, *options) == 1
    gone, test = rows(capsys.readouterr().out)[2:4]
    assert gone == ["gone", "0", "failed"]
    assert test[:3] == ["test", "2", "loss"]
    assert 0 < float(test[3]) < 20


def test_one_configuration_is_scored_again_without_its_media(config, capsys, monkeypatch):
    built = []
    real = ChatBridge.from_config.__func__
    monkeypatch.setattr(ChatBridge, "from_config", classmethod(lambda *args: built.append(1) or real(*args)))
    words = ("evaluate", "--ablate", "withheld:image,audio", "shuffled")  # the data have pictures only
    assert evaluated(config, "run.output_dir=" + str(config.parent / "ablated"), words=words) == 0
    result = config.parent / "ablated/result"
    printed = rows(capsys.readouterr().out)
    assert printed[0] == ["data", "media", "samples", "metric", "score", "95 %", "drop"]
    whole, withheld, shuffled = printed[2:5]
    assert whole[:3] == ["test chatbridge_jsonl", "2", "exact_match"]
    assert withheld[1:4] == ["image withheld", "2", "exact_match"]  # of the same samples
    assert shuffled[1] == "image shuffled"
    assert float(withheld[6]) == pytest.approx(float(whole[3]) - float(withheld[4]))
    names = ["test", "test_withheld_image", "test_shuffled_image"]
    files = [str(result / f"{name}_step0{end}") for name in names for end in (".jsonl", "_metrics.json")]
    assert printed[-1] == ["written to " + ", ".join(files)]
    prompts = [[json.loads(line)["prompt"] for line in Path(file).read_text().splitlines()] for file in files[:4:2]]
    assert all("[image 0]" in prompt for prompt in prompts[0])
    assert not any("[image 0]" in prompt for prompt in prompts[1])
    assert built == [1]  # one model answers under every condition


def test_an_engine_predicts_as_the_local_language_model(config):
    checkpoint = "model.checkpoint=" + str(TINY_TOKENIZER.parent / "chatbridge.safetensors")
    model, _ = load_model("tiny", device="cpu")
    standin = StandIn(model.llama_model, model.llama_tokenizer)
    predicted = []
    with serving(standin) as url:
        for name, words in (("local", []), ("remote", ["--engine", url])):
            options = [f"run.output_dir={config.parent / name}", checkpoint, "run.max_len=5"]
            assert evaluated(config, *options, words=("evaluate", *words)) == 0
            lines = (config.parent / name / "result/test_step0.jsonl").read_text().splitlines()
            predicted.append([json.loads(line)["prediction"] for line in lines])
    assert predicted[0] == predicted[1]
    assert len(standin.requests) >= len(predicted[1]) == 2


RUN = EvaluationSettings()


@pytest.mark.parametrize(
    ("found", "run", "row"),
    [
        ({"by_source": {"a": {"samples": 4, "scores": {"exact_match": 75.0, "x": 5.0}, "metric": "exact_match",
                              "headline": 75.0, "chance": 50.0, "intervals": {"exact_match": [25.0, 100.0]}}}}, RUN,
         ["test a", "4", "exact_match", "75.0", "25.0 - 100.0", "50.0", "x 5.0"]),
        ({"by_source": {"a": {"samples": 1, "scores": {"exact_match": 0.0}, "metric": "exact_match", "headline": 0.0,
                              "intervals": {"exact_match": None}}}}, RUN, ["test a", "1", "exact_match", "0.0", "-"]),
        ({"by_source": {"a": {"samples": 4}}, "samples": 4}, EvaluationSettings(report_metric=False), ["test a", "4"]),
        ({"agg_metrics": -1.5, "loss": 1.5, "loss_a": 1.0, "loss_b": 2.0, "samples": 9}, RUN,
         ["test", "9", "loss", "1.500", "loss_a 1.000, loss_b 2.000"]),
        ({"agg_metrics": 45.25, "other": 3}, RUN, ["test", "agg_metrics", "45.250", "other 3.000"]),
        (None, RUN, ["test"]),
    ],
)  # fmt: skip
def test_every_tasks_result_is_a_line(found, run, row):
    assert rows(report.text_table(report.lines_of({"test": found}, run)))[2] == row


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({"by_source": {}, "samples": 0, "not_predicted": 0}, "test: it has no samples"),
        ({"by_source": {"a": {"samples": 3}}}, "test a: no accepted answers and no facts to compare with: set"),
        ({"by_source": {"a": {"samples": 3, "scores": {}, "left_out": {"SPICE": "no Java"}}}}, "test a: SPICE"),
        ({"by_source": {"a": {"samples": 3, "fault": "no truth"}}}, "test a: no truth"),
        ({"samples": 3, "not_predicted": 0}, "test: its samples have no target token"),
    ],
)  # fmt: skip
def test_what_is_no_score_is_an_error(found, why):
    lines = report.lines_of({"test": found}, EvaluationSettings(metrics=["SPICE"]))
    with pytest.raises(DataError, match=f"nothing could be scored. {why}"):
        report.summary(lines)


def test_laviss_runner_needs_a_gpu_and_its_tasks_can_train_on_our_data_but_not_score_them(config, capsys):
    assert evaluated(config, "run.runner=runner_base") == 2
    assert "run.runner 'runner_base' is LAVIS's own, which needs a CUDA device" in capsys.readouterr().err
    options = [f"run.{key}" for key in ("task=vqa", "evaluate=false", "max_iters=1", "train_splits=[test]")]
    assert load_config(config, [*options, "run.test_splits=[]"]).run.task == "vqa"
    with pytest.raises(ConfigError, match=r"run.task 'vqa' is LAVIS's own .*question_id, which chatbridge_jsonl"):
        load_config(config, [*options, "run.test_splits=[]", "run.valid_splits=[test]"])


# --- conditions


def test_words_are_conditions():
    words = ["withheld", "shuffled:audio", "withheld:audio,image", "shuffled:audio", "withheld:told,audio", "all"]
    every, shuffled, both, told = evaluate.parse_conditions(words)
    assert [one.label for one in (every, shuffled, both, told)] == [
        "image and video and audio withheld", "audio shuffled", "image and audio withheld", "audio withheld, told",
    ]  # fmt: skip
    assert both.options == ["run.media=withheld", "run.media_modalities=[image,audio]", "run.withheld_words=kept"]
    assert told.file_suffix == "withheld_audio_told"


@pytest.mark.parametrize(
    "word", ["normal:image", "withheld:sound", "shuffled:told", "withheld:removed,told", "withheld:"]
)
def test_other_words_are_refused(word):
    why = f"--ablate {word}: write withheld or shuffled, and after a colon any of image, video, audio"
    with pytest.raises(ConfigError, match=why):
        evaluate.parse_conditions([word])


def test_conditions_suit_the_data(monkeypatch, caplog):
    present = {"seen": {"image"}, "both": {"image", "audio"}, "words": set()}
    ours = {"chatbridge_jsonl": {"splits": dict.fromkeys(present, "x.jsonl")}}
    monkeypatch.setattr(registry.get_builder_class("chatbridge_jsonl"), "media_of", lambda self, splits: present)
    cfg = SimpleNamespace(run=SimpleNamespace(test_splits=list(present)), datasets_cfg=ours)
    assert [(one.label, splits) for one, splits in evaluate.ablations([], cfg)] == [
        ("image withheld", ["seen", "both"]), ("image shuffled", ["seen", "both"]),
        ("audio withheld", ["both"]), ("audio shuffled", ["both"]),
    ]  # fmt: skip
    asked = evaluate.parse_conditions(["withheld", "shuffled:video", "withheld:image,audio"])
    [(one, splits)] = evaluate.ablations(asked, cfg)
    assert (one.label, splits) == ("image and audio withheld", ["seen", "both"])
    assert "video shuffled: no such media in splits seen, both, words" in caplog.text


def test_what_cannot_be_ablated_is_an_error_before_the_first_score(config, tmp_path, capsys):
    assert evaluated(config, "run.media=withheld", words=("evaluate", "--ablate")) == 2
    assert "scores with all media first, but run.media is 'withheld': remove one" in capsys.readouterr().err
    path = tmp_path / "run.yaml"
    path.write_text(re.sub("chatbridge_jsonl: .*", "coco_caption: {}", config.read_text()))
    assert evaluated(path, words=("evaluate", "--ablate")) == 2
    assert "datasets.coco_caption is LAVIS's own, which --ablate does not support" in capsys.readouterr().err


# --- scoring again


@pytest.fixture
def rescore(tmp_path):
    """Writes predictions and an evaluation's settings, and scores them again: status, and scores by data set."""

    def rescore(content, **settings):
        path = tmp_path / "test_step0.jsonl"
        path.write_text(content)
        path.with_name("test_step0_metrics.json").write_text(json.dumps(settings))
        status = cli.main(["evaluate", "--rescore", str(path), "--options", "run.metrics=[exact_match]"])
        written = path.with_name("test_step0_rescored.json")
        return status, json.loads(written.read_text())["by_source"] if written.exists() else None

    return rescore


def lines(*changes):
    """Predictions, right ones unless a field is changed."""
    right = {"source": "a", "prediction": "red", "answers": ["red"], "references": []}
    records = [right | {"index": n, "sample_id": f"s{n}"} | change for n, change in enumerate(changes)]
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lines({}, {})[:-9], "test_step0.jsonl:2: not JSON"),
        ("", "has no prediction"),
        ('{"image_id": 1, "caption": "a"}', "test_step0.jsonl:1.sample_id is missing"),
        (lines({}, {"sample_id": "s0", "index": 0}), "sample 's0' was predicted twice"),
        (lines({"answers": []}), "none of 1 predictions has references or answers"),
    ],
)
def test_other_files_than_predictions_are_errors(rescore, capsys, content, why):
    assert rescore(content) == (2, None)
    assert why in capsys.readouterr().err


def test_a_data_set_without_answers_does_not_affect_the_others(rescore, capsys):
    status, found = rescore(lines({"meta": {"type": 7}}, {"source": "b", "answers": []}))
    assert status == 1
    assert "b: none of 1 predictions has references" in capsys.readouterr().out
    assert found["a"]["by_type"] == {"type": {"7": {"samples": 1, "exact_match": 100.0}}}
    assert "fault" in found["b"]


def test_the_papers_figure_is_only_beside_the_score_with_all_media(rescore, capsys):
    published = {"published": {"exact_match": 45.2}}
    assert rescore(lines({}), **published)[0] == 0
    assert "45.2" in capsys.readouterr().out
    assert rescore(lines({}), **published, media="withheld", media_modalities=["audio"])[0] == 0
    printed = capsys.readouterr().out
    assert "audio withheld" in printed
    assert "45.2" not in printed


def test_only_newlines_end_a_line_and_halves_of_characters_are_replaced(rescore):
    separator = lines({"prediction": "red\u2028"}).replace("\\u2028", "\u2028")
    _, found = rescore(separator + lines({"sample_id": "s1", "index": 1, "prediction": "\ud800"}))
    assert found["a"]["scores"] == {"exact_match": 50.0}
