"""Predictions do not depend on batches, processes and interruptions."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from PIL import Image

from lavis_chatbridge import cli
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.models.chatbridge import ChatBridge
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.prompting.templates import listed
from lavis_chatbridge.schema import Medium, Sample, read_jsonl, write_jsonl
from tests.runners.runner_parts import in_processes

QUESTIONS = ["What is it?", "Which colour does the whole picture have, if it has only one?", "Is it red or blue? " * 4]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven questions about pictures and four about sounds, of very different lengths."""
    root = tmp_path_factory.mktemp("data")
    samples = []
    for n in range(11):
        modality, path = ("image", root / f"{n}.png") if n < 7 else ("audio", root / f"{n}.wav")
        if modality == "image":
            Image.fromarray(np.random.default_rng(n).integers(0, 255, (56, 56, 3), np.uint8)).save(path)
        else:
            soundfile.write(path, np.random.default_rng(n).uniform(-0.3, 0.3, 16000), 16000)
        turns = (Message("user", QUESTIONS[n % 3], (modality,)), Message("assistant", "red"))
        samples.append(Sample(f"s{n}", (Medium(modality, str(path)),), turns=turns))
    write_jsonl(root / "test.jsonl", samples)
    (root / "run.yaml").write_text(
        "model: {arch: chatbridge, model_type: tiny, checkpoint: null}\n"
        f"datasets: {{chatbridge_jsonl: {{data_root: '{root}', splits: {{test: test.jsonl}}, templates: false}}}}\n"
        "run:\n  task: chatbridge_captioning\n  evaluate: true\n  test_splits: [test]\n  metrics: [exact_match]\n"
        "  num_workers: 0\n  max_len: 8\n  batch_size_eval: 3\n  device: cpu\n  job_id: ''\n"
    )
    return root


@pytest.fixture
def evaluate(data, runs, tmp_path):
    """Evaluate into a folder of the test and return the file of predictions."""

    def evaluating(name, *options):
        runs.run(str(data / "run.yaml"), [f"run.output_dir={tmp_path / name}", *options], evaluate=True)
        return (tmp_path / name / "result/test_step0.jsonl").read_text()

    return evaluating


def in_any_batches(evaluate, *options):
    """The predictions, which must be the same one by one and in batches of 16."""
    one = evaluate("one", "run.batch_size_eval=1", *options)
    assert evaluate("sixteen", "run.batch_size_eval=16", *options) == one
    return [json.loads(line) for line in one.splitlines()]


@pytest.mark.parametrize("beams", [1, 3])
def test_batches_and_beams(evaluate, beams):
    records = in_any_batches(evaluate, f"run.num_beams={beams}")
    assert [record["sample_id"] for record in records] == [f"s{n}" for n in (*range(7, 11), *range(7))]
    assert len({record["prediction"] for record in records}) > 1


@pytest.fixture
def calls(monkeypatch):
    """The sizes of the batches that the model has answered; it raises after ``most`` of them."""
    calls, generate = SimpleNamespace(sizes=[], most=100), ChatBridge.generate

    def counted(model, samples, **more):
        if len(calls.sizes) == calls.most:
            raise KeyboardInterrupt
        calls.sizes.append(len(samples["sample_id"]))
        return generate(model, samples, **more)

    monkeypatch.setattr(ChatBridge, "generate", counted)
    return calls


def test_only_what_is_missing_or_changes_is_predicted(evaluate, tmp_path, calls):
    whole = evaluate("whole")
    calls.sizes, calls.most = [], 2
    with pytest.raises(KeyboardInterrupt):
        evaluate("cut")
    [part] = (tmp_path / "cut/result").glob(".*.rank0.jsonl")
    assert len(part.read_text().splitlines()) == sum(calls.sizes)
    with open(part, "ab") as file:
        file.write(b'{"sample_id": "a\xc3')  # a line that a kill cut off, inside a character
    calls.most = 100
    assert evaluate("cut") == whole
    assert sum(calls.sizes) == 11
    assert not part.exists()
    calls.sizes = []
    assert evaluate("cut", "run.metrics=[vqa_accuracy]") == whole  # other scores of the same predictions
    assert not calls.sizes
    evaluate("cut", "run.repetition_penalty=1.5")
    assert sum(calls.sizes) == 11


def evaluate_as(rank: int, words: list[str], folder: Path) -> None:
    """``chatbridge evaluate`` as one of several processes; keep what is printed and the exit status."""
    with open(folder / f"printed{rank}.txt", "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        status = cli.main(["evaluate", *words])
    (folder / f"status{rank}.txt").write_text(str(status), encoding="utf-8")


def test_two_processes_write_the_file_of_one(evaluate, data, tmp_path):
    one = evaluate("one")
    words = ["--cfg-path", str(data / "run.yaml"), "--options", f"run.output_dir={tmp_path / 'two'}"]
    in_processes(evaluate_as, 2, words, tmp_path)
    assert (tmp_path / "two/result/test_step0.jsonl").read_text() == one
    assert "test chatbridge_jsonl/image  7        exact_match" in (tmp_path / "printed0.txt").read_text()
    assert (tmp_path / "printed1.txt").read_text() == ""


@pytest.mark.parametrize("method", ["generate", "rank"])
def test_multiple_choice_does_not_depend_on_batches(evaluate, data, method):
    samples = []
    for n, sample in enumerate(read_jsonl(data / "test.jsonl", data)):
        options = ["red", "blue", "a large circle", "nothing"][: 2 + n % 3]
        question = replace(sample.turns[0], text=f"{QUESTIONS[n % 3]}\n{listed(options)}")
        meta = {"options": options, "correct": 0}
        samples.append(replace(sample, turns=(question, *sample.turns[1:]), meta=meta))
    write_jsonl(data / "choice.jsonl", samples)
    options = [
        "run.task=chatbridge_choice", "run.metrics=[choice]", f"run.inference_method={method}",
        "datasets.chatbridge_jsonl.splits.test=choice.jsonl",
    ]  # fmt: skip
    records = in_any_batches(evaluate, *options)
    assert len({(record["prediction"], *record.get("replies", ())) for record in records}) > 1


def test_an_error_on_one_process_ends_the_suite_on_both_and_the_next_suite_runs(data, tmp_path):
    suites, text = tmp_path / "suites", (data / "run.yaml").read_text()
    suites.mkdir()
    for name in ("first", "second"):
        (suites / f"{name}.yaml").write_text(text + f"  output_dir: {tmp_path / name}\n")
    (tmp_path / "first/result/test_step0.jsonl").mkdir(parents=True)  # the main process cannot write there
    words = ["--suite", "all", "--suite-folder", str(suites), "--output", str(tmp_path / "table")]
    in_processes(evaluate_as, 2, words, tmp_path)
    assert [(tmp_path / f"status{rank}.txt").read_text() for rank in (0, 1)] == ["1", "1"]
    table = json.loads((tmp_path / "table/tiny/scores.json").read_text())["suites"]
    assert [(line["suite"], line["status"]) for line in table] == [
        ("first", "failed"),
        ("second test chatbridge_jsonl/audio", "scored"),
        ("second test chatbridge_jsonl/image", "scored"),
    ]
    assert "cannot write to" in table[0]["remarks"][0]
    assert len((tmp_path / "second/result/test_step0.jsonl").read_text().splitlines()) == 11


def test_answers_are_chosen_from_a_list(evaluate, tmp_path):
    (tmp_path / "answers.json").write_text(json.dumps(["red", "a large blue circle", "yes"]))
    options = ("run.inference_method=rank", f"run.answer_list={tmp_path / 'answers.json'}")
    records = in_any_batches(evaluate, *options)
    assert {record["prediction"] for record in records} <= {"red", "a large blue circle", "yes"}
    with pytest.raises(ConfigError, match=r"run.answer_list: nowhere.json is not a readable JSON list"):
        evaluate("none", "run.inference_method=rank", "run.answer_list=nowhere.json")
    with pytest.raises(ConfigError, match="needs answer_list, the candidates"):
        evaluate("none", "run.inference_method=rank")
    two = evaluate("two", *options, "run.num_ans_candidates=2")
    (tmp_path / "answers.json").write_text(json.dumps(["red", "red", "a large blue circle", "yes", "red"]))
    assert evaluate("repeated", *options, "run.num_ans_candidates=2") == two  # each answer counts once
