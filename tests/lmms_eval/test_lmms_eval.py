"""The installed lmms-eval evaluates ChatBridge on tasks made here and gets what our own task predicts.

``make test-lmms-eval`` runs this in an environment of its own; elsewhere lmms-eval is not installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if not os.environ.get("TEST_LMMS_EVAL"):
    pytest.skip("lmms-eval has an environment of its own: make test-lmms-eval", allow_module_level=True)
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="lmms-eval-test-")  # read when the datasets library is imported

from lavis_chatbridge.plugin.launch import Runs
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.schema import Medium, Sample, write_jsonl
from lavis_chatbridge.toyworld.world import scenes
from tests.chat.test_engine import files_of

COUNT = 4
CHOICES = ["red", "blue", "green", "high", "low", "circle", "star"]
QUESTIONS = {
    "image": ["what is the colour of the picture?", "what is the shape of the picture?"],
    "video": ["what is the colour of the video?", "what is the shape of the video?"],
    "audio": ["what is the pitch of the sound?", "what is the timbre of the sound?"],
    "both": ["what is the colour of the video and the pitch of the sound?", "what is the pitch of the sound?"],
    "track": ["what is the pitch of the sound?", "what is the colour of the video?"],
}
MODALITIES = {name: (name,) for name in ("image", "video", "audio")} | dict.fromkeys(
    ("both", "track"), ("video", "audio")
)
ENDINGS = {"image": "png", "video": "mp4", "audio": "wav"}
UTILS = """
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(path) if path.endswith(".png") else path for path in doc["files"]]

def process_results(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
{more}
metadata: {{version: 0.0}}
"""
OURS = """
model: {{arch: chatbridge, model_type: tiny}}
datasets: {{chatbridge_jsonl: {{data_root: {folder}, splits: {{test: {data}.jsonl}}, templates: false}}}}
run:
  {{task: chatbridge_captioning, test_splits: [test], max_len: 12, batch_size_eval: 4, num_workers: 0, device: cpu,
    job_id: "", output_dir: {folder}/out_{name}}}
"""
WRITTEN = """output_type: generate_until
process_results: !function utils.process_results
generation_kwargs: {max_new_tokens: 12, temperature: 0, do_sample: false}
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]"""
CHOSEN = f"""output_type: multiple_choice
doc_to_choice: {json.dumps(CHOICES)}
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Media of the embedded world, lmms-eval's tasks about them, and the same questions as our samples."""
    root = tmp_path_factory.mktemp("world")
    (root / "utils.py").write_text(UTILS)
    for name, modalities in MODALITIES.items():
        drawn = [scenes(modality, False, 77) for modality in modalities]
        docs, samples = [], []
        for number in range(COUNT):
            found = tuple(next(one) for one in drawn)
            files = []
            for together in [found] if name == "track" else [(one,) for one in found]:
                for modality, content in files_of(together, number):
                    files.append(str(root / f"{name}{number}.{ENDINGS[modality]}"))
                    Path(files[-1]).write_bytes(content)
            text = QUESTIONS[name][number % 2]
            docs.append({"files": files, "question": text, "answer": CHOICES[0]})
            media = tuple(map(Medium, modalities, files * 2 if name == "track" else files))
            turns = (Message("user", text, modalities), Message("assistant", CHOICES[0]))
            samples.append(Sample(f"s{number}", media, turns=turns))
        (root / f"{name}_docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        write_jsonl(root / f"{name}.jsonl", samples)
        _write_task(root, name, name, WRITTEN)
    _write_task(root, "image_choice", "image", CHOSEN)
    (root / "choices.json").write_text(json.dumps(CHOICES))
    return root


def _write_task(root: Path, name: str, data: str, more: str) -> None:
    text = TASK.format(name=f"chatbridge_{name}", file=root / f"{data}_docs.jsonl", more=more)
    (root / f"{name}.yaml").write_text(text)


@pytest.fixture(scope="module")
def ours(world: Path) -> dict[str, list[str]]:
    """What our own task predicts for each set of questions, and of the pictures' what it chooses from a list."""
    found = {}
    chosen = ["run.inference_method=rank", f"run.answer_list={world / 'choices.json'}", "run.length_penalty=1.0"]
    with Runs() as runs:
        for name in [*MODALITIES, "image_choice"]:
            config = world / f"ours_{name}.yaml"
            config.write_text(OURS.format(folder=world, data=name.split("_")[0], name=name))
            runs.run(str(config), chosen if name == "image_choice" else [], evaluate=True)
            lines = (world / f"out_{name}/result/test_step0.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines]
            assert len(records) == COUNT
            found[name] = [record["prediction"] for record in records]
    return found


def evaluate(world: Path, names: list[str], **settings: Any) -> dict[str, list[dict[str, Any]]]:
    """The samples of each task, as the real evaluator logs them."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(world), include_defaults=False, model_name="chatbridge")
    tasks = [f"chatbridge_{name}" for name in names]
    found = simple_evaluate(model="chatbridge", tasks=tasks, task_manager=manager, device="cpu", **settings)
    return {name: sorted(found["samples"][f"chatbridge_{name}"], key=lambda s: s["doc_id"]) for name in names}


WRITERS = ["image", "video", "audio", "both"]


def said(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["filtered_resps"][0] for sample in samples]


@pytest.mark.parametrize(("simple", "batch_size"), [(False, 3), (True, 1)])
def test_written_answers_are_those_of_our_own_task(world: Path, ours: dict, simple: bool, batch_size: int) -> None:
    found = evaluate(world, WRITERS, batch_size=batch_size, force_simple=simple)
    assert {name: said(samples) for name, samples in found.items()} == {name: ours[name] for name in WRITERS}
    assert len({answer for name in WRITERS for answer in ours[name]}) > 3
    assert all(sample["right"] == (said([sample])[0] == CHOICES[0]) for samples in found.values() for sample in samples)


def test_a_videos_own_sound_is_used_on_request(world: Path, ours: dict[str, list[str]]) -> None:
    found = evaluate(world, ["track"], batch_size=4, model_args="hear_videos=True")
    assert said(found["track"]) == ours["track"]
    deaf = evaluate(world, ["track"], batch_size=4)
    assert said(deaf["track"]) != ours["track"]


def test_choices_are_ranked_as_our_own_task_ranks_them(world: Path, ours: dict[str, list[str]]) -> None:
    samples = evaluate(world, ["image_choice"], batch_size=2, force_simple=True)["image_choice"]
    losses = [[float(loss) for loss, _ in sample["filtered_resps"]] for sample in samples]
    assert [CHOICES[int(np.argmin(each))] for each in losses] == ours["image_choice"]
    assert all(len(each) == len(CHOICES) for each in losses)
    assert [sample["acc"] for sample in samples] == [float(answer == CHOICES[0]) for answer in ours["image_choice"]]
    for sample, answer in zip(samples, ours["image"], strict=True):
        greedy = [choice for choice, (_, first) in zip(CHOICES, sample["filtered_resps"], strict=True) if first]
        assert greedy == ([answer] if answer in CHOICES else [])


def test_an_unreadable_medium_costs_its_own_request_only(world: Path, ours: dict[str, list[str]], caplog: Any) -> None:
    docs = (world / "image_docs.jsonl").read_text()
    (world / "broken_docs.jsonl").write_text(docs.replace("image1.png", "image1_gone.mp4"))
    _write_task(world, "broken", "broken", WRITTEN)
    found = said(evaluate(world, ["broken"], batch_size=4)["broken"])
    assert found == [ours["image"][0], "", *ours["image"][2:]]
    assert "image1_gone.mp4" in caplog.text


def test_the_command_of_the_guide(world: Path, ours: dict[str, list[str]], repository: Path) -> None:
    command = [sys.executable, "-m", "lmms_eval", "--model", "chatbridge", "--model_args", "pretrained=tiny"]
    command += ["--tasks", "chatbridge_audio", "--include_path", str(world), "--batch_size", "4"]
    command += ["--log_samples", "--output_path", str(world / "written")]
    run = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=580, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    [file] = (world / "written").rglob("*samples_chatbridge_audio.jsonl")
    samples = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda s: s["doc_id"])
    assert [sample["filtered_resps"] for sample in samples] == ours["audio"]  # one answer stands there without its list
