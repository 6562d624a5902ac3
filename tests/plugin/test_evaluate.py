"""What an evaluation prints at its end, and when it fails because nothing could be scored."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavis_chatbridge import cli
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.models.chatbridge import ChatBridge
from lavis_chatbridge.plugin import evaluate, scores, train
from lavis_chatbridge.plugin.suite_table import text_table
from lavis_chatbridge.prompting import Message
from lavis_chatbridge.runners.config import load_config
from lavis_chatbridge.schema import Medium, Sample, write_jsonl
from lavis_chatbridge.tasks.settings import EvaluationSettings

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


def evaluated(config, *options, main=cli.main, words=("evaluate",)):
    return main([*words, "--cfg-path", str(config), *(["--options", *options] if options else [])])


def test_the_scores_and_their_files_are_printed(config, capsys):
    assert evaluated(config, main=evaluate.main, words=()) == 0  # as python -m lavis.evaluate does
    result = config.parent / "out/result"
    found = json.loads((result / "test_step0_metrics.json").read_text())
    assert (found["samples"], found["not_predicted"]) == (2, 1)
    own = found["by_source"]["chatbridge_jsonl"]
    assert (own["samples"], own["not_predicted"]) == (2, 1)
    lines = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{2,}", lines[0]) == ["split and data set", "samples", "metric", "score"]
    assert re.split(r"\s{2,}", lines[2]) == ["test chatbridge_jsonl", "2", "exact_match", f"{own['headline']:.1f}"]
    assert lines[4] == "test chatbridge_jsonl: 1 sample has no prediction (unreadable media)"
    assert lines[-1] == f"written to {result}/test_step0.json, {result}/test_step0_metrics.json"


def test_nothing_to_score_is_an_error(config, capsys):
    assert evaluated(config, "run.test_splits=[gone]") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    line = "nothing could be scored. gone chatbridge_jsonl: none of its samples (3) could be read, the log says why"
    assert f"error: {line}\n" in printed.err


def test_a_split_that_cannot_be_scored_beside_one_that_can_is_status_1(config, capsys):
    options = ("run.task=chatbridge_alignment", "run.test_splits=[gone,test]")
    assert evaluated(config, *options) == 1
    rows = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()[2:4]]
    assert rows[0] == ["gone", "0", "failed"]
    assert rows[1][:3] == ["test", "2", "loss"]
    assert 0 < float(rows[1][3]) < 20


def test_one_configuration_is_scored_again_without_its_media(config, capsys, monkeypatch):
    built = []
    real = ChatBridge.from_config.__func__
    monkeypatch.setattr(ChatBridge, "from_config", classmethod(lambda *args: built.append(1) or real(*args)))
    words = ("evaluate", "--ablate", "withheld:image,audio", "shuffled")  # the data have pictures only
    assert evaluated(config, "run.output_dir=" + str(config.parent / "ablated"), words=words) == 0
    result = config.parent / "ablated/result"
    rows = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["split and data set", "media", "samples", "metric", "score", "drop"]
    whole, withheld, shuffled = rows[2:5]
    assert whole[:3] == ["test chatbridge_jsonl", "2", "exact_match"]
    assert withheld[1:4] == ["image withheld", "2", "exact_match"]  # of the same samples
    assert shuffled[1] == "image shuffled"
    assert float(withheld[5]) == pytest.approx(float(whole[3]) - float(withheld[4]))
    names = ["test", "test_withheld_image", "test_shuffled_image"]
    files = [str(result / f"{name}_step0{end}.json") for name in names for end in ("", "_metrics")]
    assert rows[-1] == ["written to " + ", ".join(files)]
    prompts = [[record["prompt"] for record in json.loads(Path(file).read_text())] for file in files[:4:2]]
    assert all("[image 0]" in prompt for prompt in prompts[0])
    assert not any("[image 0]" in prompt for prompt in prompts[1])
    assert built == [1]  # one model answers under every condition


def test_an_interrupted_ablation_goes_on(config, monkeypatch):
    folder = config.parent / "interrupted"
    generate, seen, limit = ChatBridge.generate, [], [3]

    def counted(model, samples, **more):
        if len(seen) == limit[0]:
            raise KeyboardInterrupt
        seen.append(len(samples["sample_id"]))
        return generate(model, samples, **more)

    monkeypatch.setattr(ChatBridge, "generate", counted)
    words = ("evaluate", "--ablate", "withheld", "shuffled")
    options = (f"run.output_dir={folder}", "run.batch_size_eval=1")
    assert evaluated(config, *options, words=words) == 130  # two samples with their media, one without
    limit[0] = -1
    assert evaluated(config, *options, words=words) == 0
    assert sum(seen) == 6
    assert not (folder / "result/journal").exists()
    assert evaluated(config, *options, "run.keep_journal=true", words=words) == 0
    assert evaluated(config, *options, words=words) == 0
    assert sum(seen) == 12
    assert not (folder / "result/journal").exists()


def test_the_table_says_what_became_of_the_media(config, capsys):
    options = ("run.media=withheld", "run.media_kinds=[image]", f"run.output_dir={config.parent / 'without'}")
    assert evaluated(config, *options) == 0
    rows = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert rows[2][:2] == ["test chatbridge_jsonl", "image withheld"]
    file = config.parent / "without/result/test_withheld_image_step0.json"
    assert cli.main(["evaluate", "--rescore", str(file)]) == 0
    rows = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert rows[2][:2] == ["chatbridge_jsonl", "image withheld"]
    assert evaluated(config, "run.media=withheld", "run.media_kinds=[audio]") == 2
    assert "run.media is withheld, but chatbridge_jsonl hold no audio" in capsys.readouterr().err


RUN = EvaluationSettings()


@pytest.mark.parametrize(
    ("found", "run", "row"),
    [
        ({"by_source": {"a": {"samples": 4, "exact_match": 0.75, "accuracy": 0.75, "text_prior": 0.5}}}, RUN,
         ["test a", "4", "exact_match", "75.0", "text_prior 50.0"]),
        ({"by_source": {"a": {"samples": 4, "attribute_accuracy": 0.9, "all_attributes_right": 0.5}}}, RUN,
         ["test a", "4", "attribute_accuracy", "90.0", "all_attributes_right 50.0"]),
        ({"by_source": {"a": {"samples": 4}}, "samples": 4}, EvaluationSettings(report_metric=False), ["test a", "4"]),
        ({"agg_metrics": -1.5, "loss": 1.5, "loss_a": 1.0, "loss_b": 2.0, "samples": 9}, RUN,
         ["test", "9", "loss", "1.500", "loss_a 1.000, loss_b 2.000"]),
        ({"agg_metrics": 45.25, "other": 3}, RUN, ["test", "agg_metrics", "45.250", "other 3.000"]),
        (None, RUN, ["test"]),
    ],
)  # fmt: skip
def test_what_every_task_gives_is_a_line(found, run, row):
    text = text_table(scores.lines_of({"test": found}, run))
    assert re.split(r"\s{2,}", text.splitlines()[2]) == row


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({"by_source": {}, "samples": 0, "not_predicted": 0}, "test: it has no samples"),
        ({"by_source": {"a": {"samples": 3}}}, "test a: no accepted answers and no facts to compare with: name"),
        ({"by_source": {"a": {"samples": 3, "scores": {}, "left_out": {"SPICE": "no Java"}}}}, "test a: SPICE"),
        ({"by_source": {"a": {"samples": 3, "fault": "no truth"}}}, "test a: no truth"),
        ({"samples": 3, "not_predicted": 0}, "test: its samples have no target token"),
    ],
)  # fmt: skip
def test_what_is_no_score_is_an_error(found, why):
    with pytest.raises(DataError, match=f"nothing could be scored. {why}"):
        scores.report(scores.lines_of({"test": found}, EvaluationSettings(metrics=["SPICE"])), ["out"])


@pytest.mark.parametrize("task", ["vqa", "gqa", "aok_vqa", "captioning"])
def test_laviss_tasks_score_no_data_sets_of_ours(config, task, capsys):
    assert evaluated(config, f"run.task={task}") == 2
    said = capsys.readouterr().err
    number = "image_id" if task == "captioning" else "question_id"
    assert f"run.task '{task}' is LAVIS's own and scores by {number}, which chatbridge_jsonl does not have" in said
    assert "set run.task=chatbridge_captioning" in said


def test_laviss_tasks_may_train_on_data_sets_of_ours(config):
    options = [f"run.{key}" for key in ("task=vqa", "evaluate=false", "max_iters=1", "train_splits=[test]")]
    cfg = load_config(config, [*options, "run.test_splits=[]"])
    assert cfg.run.task == "vqa"
    with pytest.raises(ConfigError, match=r"run.task 'vqa' is LAVIS's own .*chatbridge_jsonl"):
        load_config(config, [*options, "run.test_splits=[]", "run.valid_splits=[test]"])


def test_laviss_runner_is_refused_where_it_cannot_run(config, tmp_path, capsys):
    assert evaluated(config, "run.runner=runner_base") == 2
    assert "run.runner 'runner_base' is LAVIS's own, which needs a CUDA device" in capsys.readouterr().err
    suites = tmp_path / "suites"
    suites.mkdir()
    for name in ("one", "two"):
        (suites / f"{name}.yaml").write_text(config.read_text())
    words = ["evaluate", "--suite", "all", "--suite-folder", str(suites), "--output", str(tmp_path / "table")]
    assert cli.main([*words, "--options", "run.runner=runner_base"]) == 1
    table = json.loads((tmp_path / "table/scores.json").read_text())["suites"]
    assert [(line["suite"], line["status"]) for line in table] == [("one", "failed"), ("two", "failed")]
    why = f"which runs only once in a process: use chatbridge_runner, or score {suites / 'one.yaml'} alone (--cfg-path)"
    assert table[0]["remarks"] == [f"run.runner 'runner_base' is LAVIS's own, {why}"]


@pytest.mark.parametrize("words", [["--suite", ""], ["--suite", " , "], ["--suite", "", "--ablate"]])
def test_no_suite_is_no_suite(words, capsys):
    assert cli.main(["evaluate", *words]) == 2
    assert "error: --suite names no suite; known are zero-shot, all, " in capsys.readouterr().err


@pytest.mark.parametrize("module", [train, evaluate])
def test_repeated_options_all_count(tmp_path, module, capsys):
    (tmp_path / "run.yaml").write_text(
        "model: {arch: chatbridge, model_type: tiny}\nrun: {task: chatbridge_alignment}\n"
    )
    words = ["--cfg-path", str(tmp_path / "run.yaml"), "--options", "run.max_itres=1", "--options", "run.sed=1"]
    assert module.main(words) == 2
    message = capsys.readouterr().err
    assert "unknown key run.max_itres, did you mean 'max_iters'?" in message
    assert "unknown key run.sed, did you mean 'seed'?" in message
